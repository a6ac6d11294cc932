"""Reading the prepared files: contiguous HDF5 columns, opened as read-only memory maps.

    transfer.h5   ti/{rgb,target,id,group,path_rgb,path_target}
                  target/{target,id,group,path_target}
    source.h5     source/{rgb,label,id,group,path_rgb}
    test.h5       labels/{id,label}  test/{target,label,id,group,path_target} and test/rgb
                  names/{id,name,group,path_rgb,path_target}  names/images

Ids, groups and paths in transfer.h5 are numbers; ``names`` tells what they stand for, and
``names/images`` (one row) which images these are: it is the :func:`digest_images` of transfer.h5.

Root attributes: ``schema``, ``role`` (source, transfer or test), ``dataset``, ``modality``,
``unit``, ``classes`` (a JSON list), ``digest`` and where the data came from. Each data set carries
``block_rows`` and ``sha256``, one checksum for each block of rows (over the SHA-256 of each row):
images are compared with it block by block as they are first read, all other columns as a whole.
HDF5 is only the description of the file: h5py reads it once, the pixels go through
:class:`numpy.memmap` (14 times h5py's rate at 64 pixels).

Behind the HDF5 data lies a trailer, which HDF5 ignores: the byte ranges of the description and
their checksum. It is looked at first, because one flipped bit in a description can make the HDF5
library hang or crash.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sfkt_cli.errors import DataError

SCHEMA = "sfkt-2"
ROLES = ("source", "transfer", "test")
IMAGES = ("rgb", "target")  # columns of pixels
TRAILER = b"\nsfkt-trailer "
TRAILER_BYTES = 16_384  # the trailer is searched in so many bytes at the end of the file


@dataclass(frozen=True)
class Column:
    """One data set: where its rows lie in the file and what they should hash to."""

    shape: tuple[int, ...]  # rows first
    dtype: np.dtype[Any]  # of one element
    offset: int  # of the first row, in bytes from the start of the file
    block_rows: int  # rows that share a checksum
    sha256: NDArray[np.uint8]  # uint8 (blocks, 32)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """First byte behind the last row."""
        return self.offset + self.shape[0] * self.row_bytes


class Pixels(np.memmap[Any, Any]):
    """Images of a store as a read-only memory map that compares them when they are first read."""

    # Called with an index of rows before they are read; raises DataError.
    compare: Callable[[Any], None] = staticmethod(lambda index: None)

    def __getitem__(self, index: Any) -> Any:
        rows = index[0] if isinstance(index, tuple) else index
        self.compare(slice(None) if getattr(rows, "dtype", None) == np.bool_ else rows)
        return np.asarray(super().__getitem__(index))


@dataclass(frozen=True)
class Store:
    """A prepared file; make it with :func:`open_store`."""

    path: Path
    attrs: Mapping[str, Any]  # root attributes as plain values
    columns: Mapping[str, Column]  # data sets by name, such as ``ti/rgb``
    digest: str  # hex SHA-256 of the description and of all block checksums: names the content
    dataset: str  # name of the data set it was prepared from
    modality: str  # what the target images measure: depth, nir, thermal or other
    unit: str  # unit of target values: ``mm`` with 0 = no reading, or ``raw``
    classes: list[str]  # names of the TR classes; labels are indices into it
    registered: bool  # whether the two images of a pair show the same scene pixel by pixel
    # For each column that was read, its blocks that are still to be compared.
    unchecked: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The rows of a data set as a read-only memory map.

        Raises:
            DataError: The file has no such data set, or cannot be mapped any more; other columns
                than images do not match their checksum. Images are compared as they are read.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.path} has no {name}: it holds {', '.join(self.columns) or 'nothing'}"
            )
        column = self.columns[name]
        if not column.shape[0]:
            return np.zeros(column.shape, column.dtype)
        rows = self._map(name)
        if name.rpartition("/")[2] in IMAGES:
            rows.compare = functools.partial(self._compare, name)
        else:
            self._compare(name, slice(None))
        return rows

    def count(self, group: str) -> int:
        """Samples of a group such as ``ti``; 0 where the group is absent."""
        rows = [c.shape[0] for name, c in self.columns.items() if name.startswith(f"{group}/")]
        return rows[0] if rows else 0

    def strings(self, name: str) -> list[str]:
        """The texts of a column such as ``ti/id``; raises DataError if it is damaged."""
        try:
            return [bytes(text).decode("utf-8") for text in self[name]]
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"{name}: {error}") from None

    def names(self) -> dict[str, tuple[str, str]]:
        """Name and scene of the samples of transfer.h5, by id; only test.h5 has them."""
        if "names/id" not in self:
            return {}
        columns = (self.strings(f"names/{column}") for column in ("id", "name", "group"))
        return {sample: (name, group) for sample, name, group in zip(*columns, strict=True)}

    def files(self) -> dict[str, str]:
        """Path of the target images of transfer.h5 in the archive, by id; only test.h5 has them."""
        if "names/path_target" not in self:
            return {}
        return dict(zip(self.strings("names/id"), self.strings("names/path_target"), strict=True))

    def labels(self, group: str) -> NDArray[np.int64]:
        """Class indices (N,) of a group such as ``source``, ``labels`` or ``test``."""
        return np.array(self[f"{group}/label"], dtype=np.int64)

    def verify(self) -> None:
        """Read every row again; raises DataError at the first block that does not match."""
        self.unchecked.clear()
        for name, column in self.columns.items():
            if column.shape[0]:
                self._compare(name, slice(None))

    def _map(self, name: str) -> Pixels:
        column = self.columns[name]
        try:
            return Pixels(self.path, column.dtype, "r", column.offset, column.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: {name} cannot be mapped: {error}") from None

    def _compare(self, name: str, index: Any) -> None:
        """Compare the blocks of some rows, each only once; raises DataError if one differs."""
        column = self.columns[name]
        unchecked = self.unchecked.setdefault(name, np.ones(len(column.sha256), np.bool_))
        if not unchecked.any():
            return
        rows = index if isinstance(index, int) else np.arange(column.shape[0])[index]
        blocks = np.unique(np.asarray(rows) % column.shape[0] // column.block_rows)
        for block in blocks[unchecked[blocks]].tolist():
            first = block * column.block_rows
            rows = self._map(name)[first : first + column.block_rows]
            if hash_rows(rows.tobytes(), column.row_bytes) != column.sha256[block].tobytes():
                raise DataError(
                    f"{self.path}: rows {first}..{first + len(rows) - 1} of {name} do not match "
                    "their checksum: the file is damaged, run `sfkt prepare` again with --force"
                )
            unchecked[block] = False

    def _check_ids(self) -> None:
        """Ids name samples and files: each is there once, and is the name of a file in a folder."""
        for column in self.columns:
            if not column.endswith("/id"):
                continue
            seen = set[str]()
            for sample in self.strings(column):
                if sample in seen:
                    raise _damaged(self.path, f"{column} has {sample!r} twice")
                if not sample or sample.startswith(".") or set(sample) & set("/\0"):
                    raise _damaged(self.path, f"{column} has {sample!r}, which names no file")
                seen.add(sample)


def open_store(path: Path) -> Store:
    """Open a prepared file; its rows are compared with their checksums when they are first read.

    Raises:
        DataError: The file is missing, unfinished, damaged, of another schema or role; a sample id
            occurs twice or cannot be the name of a file.
        OSError: The file system refuses it.
    """
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: name a file in it, such as prepare/transfer.h5 of a run"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist: first run `sfkt prepare NAME`")
    columns: dict[str, Column] = {}

    def note(name: str, member: Any) -> None:
        if isinstance(member, h5py.Dataset):
            columns[name] = _read_column(member)

    try:
        _check_trailer(path)
        with h5py.File(path, "r", locking=False) as file:
            attrs = _read_attrs(path, file)
            file.visititems(note)  # follows no link to another file
        if describe(attrs, columns) != attrs["digest"]:
            raise ValueError("its header does not match its checksum")
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # of HDF5, or of a place before the file's start
            raise _damaged(path, str(error)) from None
        error.filename = str(path)
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(path, str(error)) from None
    if path.stem in ROLES and attrs["role"] != path.stem:
        raise DataError(
            f"{path} was written under another name (role {attrs['role']!r}): put the right file "
            "there, or run `sfkt prepare` again with --force"
        )
    named = {name: attrs[name] for name in ("digest", "dataset", "modality", "unit", "classes")}
    store = Store(path, attrs, columns, registered=bool(attrs.get("registered", True)), **named)
    store._check_ids()
    return store


def describe(attrs: Mapping[str, Any], columns: Mapping[str, Column]) -> str:
    """Hex SHA-256 over attributes, layout and block checksums: what ``digest`` should be."""
    described = {
        "attrs": {name: value for name, value in attrs.items() if name != "digest"},
        "columns": {
            name: [list(c.shape), c.dtype.str, c.offset, c.block_rows, c.sha256.tobytes().hex()]
            for name, c in columns.items()
        },
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def digest_images(columns: Mapping[str, Column]) -> str:
    """Hex SHA-256 of the block checksums of all images of a file."""
    images = sorted(name for name in columns if name.rpartition("/")[2] in IMAGES)
    return hashlib.sha256(b"".join(columns[name].sha256.tobytes() for name in images)).hexdigest()


def spread(count: int, most: int = 1000) -> NDArray[np.int64]:
    """At most so many row numbers, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def hash_rows(content: bytes, row_bytes: int) -> bytes:
    """The checksum of a block of rows: the SHA-256 over the SHA-256 of each row."""
    rows, digest = memoryview(content), hashlib.sha256()
    for start in range(0, len(content), row_bytes):
        digest.update(hashlib.sha256(rows[start : start + row_bytes]).digest())
    return digest.digest()


def hash_ranges(path: Path, ranges: Iterable[Sequence[int]]) -> str:
    """Hex SHA-256 of some byte ranges (first, end) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for first, end in ranges:
            file.seek(first)
            digest.update(file.read(end - first))
    return digest.hexdigest()


def _check_trailer(path: Path) -> None:
    """Compare the description's bytes with the checksum in the trailer, without HDF5."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TRAILER_BYTES, 0))
        tail = file.read()
    start = tail.rfind(TRAILER)
    if start < 0:
        raise DataError(
            f"{path} is not a finished file of `sfkt prepare`, or was cut off: run it again"
        )
    trailer = json.loads(tail[start + len(TRAILER) :])
    if hash_ranges(path, trailer["ranges"]) != trailer["sha256"]:
        raise ValueError("its header does not match its checksum")


def _read_attrs(path: Path, file: h5py.File) -> dict[str, Any]:
    """The root attributes as plain values; raises DataError where their schema is another."""
    attrs: dict[str, Any] = {}
    for name, value in file.attrs.items():
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        attrs[name] = value.item() if isinstance(value, np.generic) else value
    if attrs["schema"] != SCHEMA:
        raise DataError(
            f"{path} has schema {attrs['schema']!r}, this version reads {SCHEMA!r}: "
            "run `sfkt prepare` again with --force"
        )
    attrs["classes"] = json.loads(attrs["classes"])
    return attrs


def _read_column(dataset: h5py.Dataset) -> Column:
    return Column(
        shape=dataset.shape,
        dtype=np.dtype(dataset.dtype.str),
        offset=int(dataset.id.get_offset() or 0),
        block_rows=int(dataset.attrs["block_rows"]),
        sha256=np.asarray(dataset.attrs["sha256"], dtype=np.uint8).reshape(-1, 32),
    )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged ({why}): run `sfkt prepare` again with --force")
