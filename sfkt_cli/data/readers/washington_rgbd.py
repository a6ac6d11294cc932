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

from sfkt_cli.data.archive import open_container, tree_drawn_in
from sfkt_cli.data.decode import decode_mask
from sfkt_cli.data.records import Archive, FileLoader, Record, archive_of_files, collect
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

_IMAGE = re.compile(
    r"(?:.*/)?(?P<label>[^/]+)/(?P<group>(?P=label)_\d+)/(?P<stem>(?P=group)_\d+_\d+)"
    r"_(?P<view>crop|depthcrop|maskcrop)\.png"
)


@dataclass(frozen=True)
class ObjectLoader(FileLoader):
    """Keeps only the object, by its mask."""

    def picture(self, name: str, size: int = 0) -> Image.Image:
        """An RGB image at its full size, black around the object."""
        return Image.fromarray(self._object(np.asarray(super().picture(name)), name))

    def target_values(self, name: str) -> NDArray[Any]:
        """A depth image, without readings around the object."""
        return self._object(super().target_values(name), name)

    def _object(self, pixels: NDArray[Any], name: str) -> NDArray[Any]:
        """A copy of an image (H, W) or (H, W, 3) that is 0 around the object."""
        mask_name = re.sub(r"_(depth)?crop\.", "_maskcrop.", name)
        place = self.container.describe(mask_name)
        mask = decode_mask(self.container.read(mask_name), place, self.sensor.max_pixels)
        if mask.shape != pixels.shape[:2]:
            raise DataError(f"{place} has shape {mask.shape}, its image has {pixels.shape[:2]}")
        kept = pixels.copy()
        kept[~mask] = 0
        return kept


def read(config: Config, root: Path) -> Archive:
    """List the crops; raises DataError if a partner is missing."""
    advice = f"give the unpacked archive or its zip file with --root; {tree_drawn_in(__doc__)}"
    container = open_container(root, (), ("rgbd-dataset.zip",), advice, _place)
    remove = config.washington_rgbd.background == "remove"
    needed = ("crop", "depthcrop", "maskcrop") if remove else ("crop", "depthcrop")
    frames = collect(container, _place, needed)
    records = [
        Record(stem, group, label, views["crop"], views["depthcrop"])
        for (label, group, stem), views in frames.items()
    ]
    return archive_of_files(
        config, container, records,
        loader=ObjectLoader if remove else FileLoader,
        more=(views["maskcrop"] for views in frames.values() if remove),
        usual_ti=tuple(sorted({label for label, _, _ in frames})[2::3]),
    )  # fmt: skip


def _place(name: str) -> tuple[tuple[str, str, str], str] | None:
    match = _IMAGE.fullmatch(name)
    return ((match["label"], match["group"], match["stem"]), match["view"]) if match else None
