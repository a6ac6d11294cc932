"""Writing a prepared file so that it appears whole or not at all.

h5py only lays the file out: a full disk kills a process inside of the HDF5 library, and rows that
are lost in a crash would read as zeros. So the space is claimed first (:func:`os.posix_fallocate`,
a full disk is then an ordinary error), rows are written at their offsets by any process, and
checksums follow into space that was set aside for them, and a trailer behind it.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from sfkt_cli import __version__
from sfkt_cli.data.store import ROLES, SCHEMA, TRAILER, Column, describe, hash_ranges, hash_rows
from sfkt_cli.files import replacing

DESCRIPTION_BYTES = 1 << 20  # more than the HDF5 description and its checksums take
MAX_BLOCKS = 1024  # checksums of a column at most: HDF5's header takes attributes of up to 64 kB
Shapes = Mapping[str, tuple[tuple[int, ...], DTypeLike]]  # shape (rows first) and type by name


@dataclass(frozen=True)
class StoreWriter:
    """An unfinished file; make it with :func:`writing`. Any process may write rows with a copy."""

    path: Path
    attrs: Mapping[str, Any]
    columns: Mapping[str, Column]

    def open(self) -> FileIO:
        """The file, for :meth:`write`."""
        return self.path.open("rb+", buffering=0)

    def write(self, file: FileIO, name: str, first: int, rows: NDArray[Any]) -> None:
        """Write rows of a column, from row ``first`` on.

        Raises:
            ValueError: Shape or type are not the column's.
            OSError: From the file system.
        """
        column = self.columns[name]
        shape, dtype = column.shape[1:], column.dtype
        if rows.shape[1:] != shape or rows.dtype != dtype:
            raise ValueError(f"rows of {rows.dtype} {rows.shape}, expected {dtype.str} {shape}")
        file.seek(column.offset + first * column.row_bytes)
        written = file.write(rows.tobytes())
        if written != rows.nbytes:
            raise OSError(f"{self.path}: wrote {written} of {rows.nbytes} bytes")

    def note(self, name: str, first: int, sha256: bytes) -> None:
        """Keep the checksum of the block that begins with row ``first``."""
        column = self.columns[name]
        column.sha256[first // column.block_rows] = np.frombuffer(sha256, np.uint8)

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole small column, such as labels."""
        column = self.columns[name]
        with self.open() as file:
            for first in range(0, len(values), column.block_rows):
                rows = values[first : first + column.block_rows]
                self.write(file, name, first, rows)
                self.note(name, first, hash_rows(rows.tobytes(), column.row_bytes))

    def seal(self) -> None:
        """Write checksums, digest and trailer."""
        with h5py.File(self.path, "r+", libver="latest", locking=False) as file:
            for name, column in self.columns.items():
                if column.shape[0]:
                    file[name].attrs.modify("sha256", column.sha256)
            digest = describe(self.attrs, self.columns)
            file.attrs.modify("digest", np.bytes_(digest.encode()))
        ranges = _between(self.columns.values(), self.path.stat().st_size)
        trailer = {"ranges": ranges, "sha256": hash_ranges(self.path, ranges)}
        with self.path.open("ab") as plain:
            plain.write(TRAILER + json.dumps(trailer).encode())


@contextlib.contextmanager
def writing(
    path: Path,
    attrs: Mapping[str, Any],
    columns: Mapping[str, NDArray[Any]],
    images: Shapes | None = None,
) -> Iterator[StoreWriter]:
    """Lay out ``path`` under a temporary name; it appears, sealed, when the block ends well.

    Args:
        path: The file to be.
        attrs: Root attributes: dataset, modality, unit, classes (a list) and provenance.
        columns: Small data sets, such as labels, by name.
        images: Data sets whose rows are written inside the block.

    Raises:
        OSError: From the file system, such as a full disk; ``path`` is then what it was.
    """
    role = path.stem if path.stem in ROLES else "none"
    attrs = {"schema": SCHEMA, "role": role, "sfkt_version": __version__, **attrs}
    images = images or {}
    shapes: Shapes = {**images, **{n: (c.shape, c.dtype) for n, c in columns.items()}}
    with replacing(path) as partial:
        _check_room(partial, file_bytes(columns, images))
        writer = StoreWriter(partial, attrs, _lay_out(partial, attrs, shapes))
        _claim_space(partial, partial.stat().st_size)
        for name, values in columns.items():
            writer.put(name, values)
        yield writer
        writer.seal()


def file_bytes(columns: Mapping[str, NDArray[Any]], images: Shapes) -> int:
    """How much room a file with these columns needs, at most."""
    pixels = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in images.values())
    return pixels + sum(column.nbytes for column in columns.values()) + DESCRIPTION_BYTES


def text_column(texts: Iterable[str | None]) -> NDArray[np.bytes_]:
    """Texts as a column of fixed-length UTF-8; None is empty."""
    encoded = [(text or "").encode("utf-8") for text in texts]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def _check_room(path: Path, size: int) -> None:
    """Take all the room once, and give it back: h5py crashes on a full disk, this raises OSError.

    Some file systems (ext4) hand out all they have before they say that it is not enough, and
    whatever else writes to the disk fails meanwhile; so the free room is asked for first.
    """
    room = shutil.disk_usage(path.parent)
    if room.total and size > room.free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    path.touch()
    _claim_space(path, size)


def _lay_out(path: Path, attrs: Mapping[str, Any], columns: Shapes) -> dict[str, Column]:
    laid: dict[str, Column] = {}
    with h5py.File(
        path, "w", libver="latest", alignment_threshold=1024, alignment_interval=64, locking=False
    ) as file:
        for name, value in attrs.items():
            file.attrs[name] = json.dumps(value) if isinstance(value, list) else value
        file.attrs.create("digest", np.bytes_(b"0" * 64), dtype="S64")
        for name, (shape, dtype) in columns.items():
            kind = np.dtype(dtype)
            stored: Any = h5py.string_dtype("utf-8", kind.itemsize) if kind.kind == "S" else kind
            group, _, own = name.rpartition("/")
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.CONTIGUOUS)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            dataset = file.require_group(group).create_dataset(own, shape, stored, dcpl=plist)
            block_rows = max(32, -(-shape[0] // MAX_BLOCKS))
            blocks = -(-shape[0] // block_rows)
            checksums = np.zeros((blocks, 32), np.uint8)
            dataset.attrs["block_rows"] = block_rows
            dataset.attrs["sha256"] = checksums
            offset = int(dataset.id.get_offset() or 0)
            laid[name] = Column(shape, kind, offset, block_rows, checksums)
    return laid


def _between(columns: Iterable[Column], size: int) -> list[tuple[int, int]]:
    """The byte ranges of a file that no column's rows occupy."""
    ranges, first = [], 0
    for column in sorted((c for c in columns if c.shape[0]), key=lambda c: c.offset):
        ranges.append((first, column.offset))
        first = column.end
    return [(start, end) for start, end in [*ranges, (first, size)] if end > start]


def _claim_space(path: Path, size: int) -> None:
    """Take room for a file of so many bytes, where the system can be asked for it."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)
