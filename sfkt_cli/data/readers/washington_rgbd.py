"""Washington RGB-D Object (Lai et al., ICRA 2011): 51 categories of objects on a turntable.

    rgbd-dataset/                                or the folder above, or a zip file of it
        apple/                                   category
            apple_1/                             instance: its images stay together in a split
                apple_1_1_1_crop.png             RGB, 8 bit; <instance>_<video>_<frame>
                apple_1_1_1_depthcrop.png        16-bit millimetres, 0 = no reading
                apple_1_1_1_maskcrop.png         1 bit, the object
                apple_1_1_1_loc.txt              not read

Every third category in alphabetical order is TI unless ``classes`` says otherwise. With
``washington_rgbd.background=remove`` only the object is kept, in both images.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.archive import open_container
from sfkt_cli.data.decode import decode_mask, decode_rgb
from sfkt_cli.data.loading import (
    FileLoader,
    archive_of_files,
    fit_rgb,
    fit_target,
    plane_of_millimetres,
)
from sfkt_cli.data.records import Archive, Record, collect
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

_IMAGE = re.compile(
    r"(?:.*/)?(?P<label>[^/]+)/(?P<group>(?P=label)_\d+)/(?P<stem>(?P=group)_\d+_\d+)"
    r"_(?P<view>crop|depthcrop|maskcrop)\.png"
)


@dataclass(frozen=True)
class ObjectLoader(FileLoader):
    """Keeps only the object, by its mask."""

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        name = record.rgb or ""
        content, place = self.container.read(name), self.container.describe(name)
        pixels = np.array(decode_rgb(content, place, 0, self.max_pixels))
        pixels[~self._mask(name.replace("_crop.", "_maskcrop."), pixels.shape[:2])] = 0
        return fit_rgb(Image.fromarray(pixels), size, self.fit)

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        name = record.target or ""
        depth_mm = self.target_values(name).copy()
        depth_mm[~self._mask(name.replace("_depthcrop.", "_maskcrop."), depth_mm.shape)] = 0
        return fit_target(depth_mm, size, self.fit, missing=True)

    def _mask(self, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        place = self.container.describe(name)
        mask = decode_mask(self.container.read(name), place, self.max_pixels)
        if mask.shape != shape:
            raise DataError(f"{place} has shape {mask.shape}, its image has {shape}")
        return mask


def read(config: Config, root: Path) -> Archive:
    """List the crops; raises DataError if a partner is missing."""
    container = open_container(root, (), ("rgbd-dataset.zip",))
    remove = config.washington_rgbd.background == "remove"
    needed = ("crop", "depthcrop", "maskcrop") if remove else ("crop", "depthcrop")
    frames = collect(container, _place, needed)
    records = [
        Record(stem, group, label, views["crop"], views["depthcrop"])
        for (label, group, stem), views in frames.items()
    ]
    return archive_of_files(
        config, container, records, plane_of_millimetres,
        loader=ObjectLoader if remove else FileLoader,
        more=(views["maskcrop"] for views in frames.values() if remove),
        usual_ti=tuple(sorted({label for label, _, _ in frames})[2::3]),
    )  # fmt: skip


def _place(name: str) -> tuple[tuple[str, str, str], str] | None:
    match = _IMAGE.fullmatch(name)
    return ((match["label"], match["group"], match["stem"]), match["view"]) if match else None
