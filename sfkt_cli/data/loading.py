"""The loader for archives of image files; readers say what their target values mean.

For your own images the modality says it: unit, valid range and default encoding, nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.archive import Container
from sfkt_cli.data.decode import decode_rgb, decode_target
from sfkt_cli.data.records import Record
from sfkt_cli.data.resample import Fit, fit_rgb, fit_target, to_millimetres
from sfkt_cli.errors import DataError

MAX_ID_BYTES = 96
"""Ids become file names, which may have 255 bytes with all that is added."""
Convert = Callable[[NDArray[Any], str], NDArray[Any]]
"""Decoded values and the file's name to values in the store's unit; raises DataError."""


@dataclass(frozen=True)
class FileLoader:
    """Decodes, converts and resamples image files of a folder or zip file.

    Attributes:
        container: Where the files are.
        convert: What target values mean; a function of a module, so that it can be pickled.
        missing: Whether 0 in target images means "no reading".
        fit: ``crop`` or ``squash``.
        max_pixels: Larger images are refused.
        no_reading: Values of target files that become 0.
    """

    container: Container
    convert: Convert
    missing: bool
    fit: Fit
    max_pixels: int
    no_reading: tuple[float, ...] = ()

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        name = record.rgb or ""
        content, place = self.container.read(name), self.container.describe(name)
        return fit_rgb(decode_rgb(content, place, size, self.max_pixels), size, self.fit)

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return fit_target(
            self.target_values(record.target or ""), size, self.fit, missing=self.missing
        )

    def target_values(self, name: str) -> NDArray[Any]:
        """A target image in the store's unit, at its own resolution.

        Raises:
            DataError: The image is missing, damaged, or not what it should be.
        """
        return self.convert(self.decode(name), self.container.describe(name))

    def decode(self, name: str) -> NDArray[Any]:
        """A target image as it is stored, but for what stands for no reading.

        Raises:
            DataError: The image is missing or damaged.
        """
        place = self.container.describe(name)
        content = self.container.read(name)
        return decode_target(content, place, self.max_pixels, self.no_reading)


def plane_of_bytes(values: NDArray[Any], name: str) -> NDArray[Any]:
    """One channel of 8 bit, as it is.

    Raises:
        DataError: It is anything else.
    """
    if values.ndim != 2 or values.dtype != np.uint8:
        raise DataError(f"{name} holds {describe_values(values)}, expected one channel of 8 bit")
    return values


def plane_of_millimetres(values: NDArray[Any], name: str) -> NDArray[Any]:
    """One channel of 16-bit millimetres, as it is.

    Raises:
        DataError: It is anything else.
    """
    if values.ndim != 2 or values.dtype != np.uint16:
        raise DataError(
            f"{name} holds {describe_values(values)}, expected one channel of 16-bit depth"
        )
    return values


def describe_values(values: NDArray[Any]) -> str:
    """Such as ``3 channels of uint8``."""
    channels = values.shape[2] if values.ndim == 3 else 1
    return f"{channels} channel{'s'[: channels > 1]} of {values.dtype}"


def with_safe_ids(records: Iterable[Record]) -> list[Record]:
    """Turn ids that are paths into file names; a record without a group becomes its own.

    ``/`` becomes ``-``, and what else is unsafe ``_``. A short hash follows where that loses
    something: after other changes, and where two paths would have one id: ``a/b-c``, ``a-b/c``.
    """
    listed = list(records)
    ids = {record.id: _safe(record.id) for record in listed}
    counts = Counter(ids.values())
    for path, safe in ids.items():
        if safe != path.replace("/", "-") or counts[safe] > 1:
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
            ids[path] = f"{safe}-{digest[:6]}"
    return [
        replace(record, id=ids[record.id], group=record.group or ids[record.id])
        for record in listed
    ]


def _safe(path: str) -> str:
    safe = re.sub(r"[^\w.-]+", "_", path.replace("/", "-")).strip(".")
    return safe.encode()[:MAX_ID_BYTES].decode("utf-8", "ignore")


@dataclass(frozen=True)
class TargetValues:
    """Converts decoded values; its bound method is a loader's ``convert``.

    Attributes:
        modality: depth, nir, thermal or other.
        unit: auto, mm, m or raw, as in ``folders.unit``.
        dtype: What the result must be; empty: anything.
        channels: How many channels it must have; 0: any number.
        scale: Millimetres that 1 stands for; None: as the unit says.
    """

    modality: str
    unit: str
    dtype: str = ""
    channels: int = 0
    scale: float | None = None

    @property
    def stored_unit(self) -> str:
        """``mm`` for depth in a known unit, else ``raw``."""
        return "mm" if self.modality == "depth" and self.unit != "raw" else "raw"

    def convert(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """Values in the stored unit, uint8 or uint16.

        Raises:
            DataError: Type, range or channels are not what they should be.
        """
        if self.modality == "depth" and values.ndim == 3:
            raise DataError(
                f"{name} holds {describe_values(values)}, depth has one: "
                "is it an RGB image, or are rgb and target swapped?"
            )
        stored = self._depth(values, name) if self.stored_unit == "mm" else self._raw(values, name)
        channels = stored.shape[2] if stored.ndim == 3 else 1
        wrong_type = self.dtype and stored.dtype.name != self.dtype
        if wrong_type or (self.channels and channels != self.channels):
            raise DataError(
                f"{name} holds {describe_values(stored)}, the first target image "
                f"{self.channels} of {self.dtype}: all must be alike"
            )
        return stored

    def _depth(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        if self.scale is not None:
            return to_millimetres(values * (self.scale / 1000.0), name)
        metres = self.unit == "m" or (self.unit == "auto" and values.dtype.kind == "f")
        if metres:
            return to_millimetres(values.astype(np.float32), name)
        if values.dtype.kind == "f":
            return to_millimetres(values / 1000.0, name)
        if values.dtype == np.uint8 and self.unit == "auto":
            raise DataError(
                f"{name} holds depth of 8 bit, expected 16-bit millimetres or float metres: "
                "set folders.unit=raw if that is all there is"
            )
        return values.astype(np.uint16)

    def _raw(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        if values.dtype.kind != "f":
            return values
        finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(finite.min()), float(finite.max())
        largest = 65535.0 if self.unit == "raw" else 1.0
        if low < 0 or high > largest:
            raise DataError(
                f"{name} has values from {low:g} to {high:g}, expected 0..{largest:g}"
                + (
                    ": add an offset and scale, degrees to hundredths of a kelvin for example"
                    if self.unit == "raw"
                    else ": scale to that, or set folders.unit=raw, which takes 0..65535 and "
                    "rounds to whole numbers"
                )
            )
        scaled: NDArray[Any] = np.rint(finite * (65535.0 / largest)).astype(np.uint16)
        return scaled
