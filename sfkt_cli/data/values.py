"""What the numbers in one's own target images mean, and how they are stored.

The modality selects unit, valid range and default encoding, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.loading import describe_values
from sfkt_cli.data.resample import to_millimetres
from sfkt_cli.errors import DataError


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
