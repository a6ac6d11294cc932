"""NYU Depth v2, the labelled part (Silberman et al., ECCV 2012): 1,449 pairs of indoor scenes.

    nyu_depth_v2_labeled.mat       the file or its folder; MATLAB v7.3, which is HDF5
        images      (1449, 3, 640, 480) uint8     axes reversed: N, C, W, H
        depths      (1449, 640, 480) float32      metres, in-painted: N, W, H
        rawDepths   (1449, 640, 480) float32      metres, 0 = no reading
        sceneTypes  (1, 1449) references to texts such as "bedroom"
        scenes      (1, 1449) references to texts such as "bedroom_0020"
    splits.mat                     optional, beside it: trainNdxs 795, testNdxs 654, from 1

TR are the nine scene types that are usually classified, TI the other eighteen. Parts are dealt out
by physical scene: a random split puts nine of ten held-out images into scenes that were seen.
"""

import functools
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.archive import Container
from sfkt_cli.data.records import TR_PARTS, Archive, FileLoader, Record
from sfkt_cli.data.sensor import sensor_of_config
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

FILE = "nyu_depth_v2_labeled.mat"
PUBLISHED = 1449
TR_CLASSES = (
    "bathroom", "bedroom", "bookstore", "classroom", "dining_room", "home_office", "kitchen",
    "living_room", "office",
)  # fmt: skip
DEPTHS = {"raw": "rawDepths", "filled": "depths"}
_TEXT_LENGTH = 200
_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError)


class MatLoader(FileLoader):
    """Reads single images of the .mat file, such as ``images/12``, and turns them upright."""

    def picture(self, name: str, size: int = 0) -> Image.Image:
        """An RGB image at its full size."""
        return Image.fromarray(np.ascontiguousarray(self.decode(name)))

    def decode(self, name: str) -> NDArray[Any]:
        """An image (H, W, 3) or (H, W) as it is in the file."""
        column, number = name.split("/")
        try:
            planes: NDArray[Any] = _file(self.container.path, os.getpid())[column][int(number) - 1]
        except _ERRORS as error:
            raise DataError(
                f"{self.container.path}: image {number} of {column} cannot be read ({error}): "
                "the file is damaged, download it again"
            ) from None
        return planes.T


def read(config: Config, root: Path) -> Archive:
    """List the images; raises DataError if the file is not the labelled part, intact."""
    path = root / FILE if root.is_dir() else root
    if not path.is_file():
        raise DataError(f"{path} does not exist: give it with --root, or use --download")
    depth = DEPTHS[config.nyu_depth.depth]
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_shapes(path, file, depth)
            types, scenes = _texts(path, file, "sceneTypes"), _texts(path, file, "scenes")
    except _ERRORS as error:
        raise DataError(
            f"{path} cannot be read as MATLAB v7.3 ({error}): is it {FILE}? Download it again"
        ) from None
    held_out = _held_out(path.parent / "splits.mat", len(types), config)
    not_held_out = ("source", "target", "ti") if held_out else (*TR_PARTS, "ti")
    records = [
        Record(
            id=f"nyu-{number:04d}",
            group=re.sub(r"(?<=\d)[a-z]$", "", scene),
            label=label,
            rgb=f"images/{number}",
            target=f"{depth}/{number}",
            parts=("test", "ti") if number in held_out else not_held_out,
        )
        for number, (label, scene) in enumerate(zip(types, scenes, strict=True), 1)
    ]
    size = path.stat().st_size
    other_count = f"nyu-depth: {len(records)} images, published are {PUBLISHED}"
    return Archive(
        records=tuple(records),
        loader=MatLoader(
            Container(path), sensor_of_config(config, modality="depth", dtype="uint16", channels=1)
        ),
        digest=hashlib.sha256(f"{size} {types} {scenes}".encode()).hexdigest(),
        usual_tr=TR_CLASSES,
        notes=(other_count,) if len(records) != PUBLISHED else (),
    )


def _check_shapes(path: Path, file: h5py.File, depth: str) -> None:
    count = len(file["images"])
    for name, kind in (("images", "u1"), (depth, "f4")):
        _check_inside(path, file, name)
        shape, dtype = file[name].shape, file[name].dtype
        expected = (count, 3, *shape[-2:]) if name == "images" else (count, *shape[-2:])
        if shape != expected or dtype != np.dtype(kind) or max(shape) > 20_000:
            raise DataError(
                f"{path}: {name} holds {dtype} {shape}, expected {np.dtype(kind)} {expected}"
            )
    if file[depth].shape[1:] != file["images"].shape[2:]:
        raise DataError(f"{path}: {depth} has shape {file[depth].shape}, images has another size")


def _check_inside(path: Path, file: h5py.File, name: str) -> None:
    """Refuse data whose values lie in other files."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: {name} is a link; links are refused")
    _check_plain(path, name, file[name])


def _check_plain(path: Path, name: str, dataset: h5py.Dataset) -> None:
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: {name} keeps its values in other files; this is refused")


def _texts(path: Path, file: h5py.File, name: str) -> list[str]:
    """A cell array of texts: references to columns of character codes."""
    _check_inside(path, file, name)
    references = file[name][0]
    if len(references) != len(file["images"]):
        raise DataError(f"{path}: {name} has {len(references)} entries for {len(file['images'])}")
    texts: list[str] = []
    for reference in references:
        codes = file[reference]
        _check_plain(path, name, codes)
        if codes.ndim != 2 or codes.shape[0] > _TEXT_LENGTH:
            raise DataError(f"{path}: {name} holds shape {codes.shape}, expected a short text")
        texts.append("".join(map(chr, codes[:, 0])))
    return texts


def _held_out(path: Path, count: int, config: Config) -> set[int]:
    """Numbers of the official test images; empty unless they are asked for."""
    if config.nyu_depth.split != "official":
        return set()
    if not path.is_file():
        raise DataError(f"nyu_depth.split is official, and {path} does not exist: download it")
    try:
        numbers = _test_numbers(path.read_bytes())
    except (OSError, ValueError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): download it again") from None
    if not numbers or min(numbers) < 1 or max(numbers) > count:
        raise DataError(f"{path}: testNdxs is not a list of image numbers from 1 to {count}")
    return numbers


@functools.lru_cache(maxsize=1)
def _file(path: Path, process: int) -> h5py.File:
    return h5py.File(path, "r", locking=False)


MAX_BYTES = 1 << 26
_COMPRESSED, _MATRIX = 15, 14
_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip


def _test_numbers(content: bytes) -> set[int]:
    """The integers of the variable ``testNdxs`` of a MATLAB file of version 5."""
    if len(content) > MAX_BYTES or not content.startswith(b"MATLAB 5.0"):
        raise ValueError("it is not a MATLAB file of version 5")
    for kind, element in _elements(content[128:]):
        fields = list(_elements(element)) if kind == _MATRIX else []
        if fields and fields[2][1] == b"testNdxs":
            kind, values = fields[3]
            return set(np.frombuffer(values, f"<{_TYPES[kind]}").astype(int).tolist())
    raise ValueError("it has no variable testNdxs")


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of each data element; compressed ones are unpacked."""
    position = 0
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, position)
        if kind >> 16:
            kind, size, start, step = kind & 0xFFFF, kind >> 16, position + 4, 8
        else:
            start, step = position + 8, 8 + size + (-size % 8 if kind != _COMPRESSED else 0)
        element = content[start : start + size]
        if len(element) != size:
            raise ValueError("cut off")
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            yield from _elements(unpacker.decompress(element, MAX_BYTES))
        else:
            yield kind, element
        position += step
