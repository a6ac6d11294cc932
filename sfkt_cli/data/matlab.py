"""The one thing needed of MATLAB's version 5 files: vectors of numbers, by name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sfkt_cli.errors import DataError

MAX_BYTES = 1 << 26
_COMPRESSED, _MATRIX = 15, 14
_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}


def read_indices(path: Path, name: str) -> list[int]:
    """The integers of a numeric variable.

    Raises:
        DataError: The file is damaged, has no such variable, or it is not numeric.
    """
    try:
        content = path.read_bytes()
        if len(content) > MAX_BYTES or not content.startswith(b"MATLAB 5.0"):
            raise ValueError("no MATLAB file of version 5")
        for kind, element in _elements(content[128:]):
            if kind != _MATRIX:
                continue
            fields = list(_elements(element))
            if fields[2][1].decode("ascii", "replace") == name:
                kind, values = fields[3]
                return [int(value) for value in np.frombuffer(values, f"<{_TYPES[kind]}")]
    except (OSError, ValueError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): download it again") from None
    raise DataError(f"{path} has no variable {name}: is it the official file?")


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
