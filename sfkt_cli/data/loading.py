"""The loader for archives of image files; readers say what their target values mean."""

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
from sfkt_cli.data.resample import Fit, fit_rgb, fit_target
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
        content, shown = self.container.read(name), self.container.describe(name)
        return fit_rgb(decode_rgb(content, shown, size, self.max_pixels), size, self.fit)

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
        shown = self.container.describe(name)
        content = self.container.read(name)
        return decode_target(content, shown, self.max_pixels, self.no_reading)


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
