"""From image files to stored images: what their values mean, and the square grid of the store.

Each reader knows what its target values mean. For your own images, the modality decides on the
unit, the valid range and the default encoding, and on nothing else.

The shorter side decides on the grid: the middle square is kept, so that shapes keep their
proportions (a squashed 1920 x 1080 image is 44 % off, and source models were trained on unsquashed
ones). ``squash`` keeps everything instead.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.archive import Container
from sfkt_cli.data.decode import decode_rgb, decode_target
from sfkt_cli.data.records import Archive, Record, image_names
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

Fit = Literal["crop", "squash"]
FINER = "add an offset and scale, degrees C to hundredths of a kelvin for example"
Convert = Callable[[NDArray[Any], str], NDArray[Any]]
"""Decoded values and the file's name to values in the store's unit; raises DataError."""


@dataclass(frozen=True)
class FileLoader:
    """Decodes, converts and resamples image files of a folder or zip file.

    ``convert`` is a function of a module, so that it can be pickled. ``missing``: whether 0 in
    target images means "no reading"; ``no_reading``: other values that do, as in
    :func:`~sfkt_cli.data.decode.known_type`.
    """

    container: Container
    convert: Convert
    missing: bool
    fit: Fit
    max_pixels: int
    no_reading: tuple[float, ...] = ()

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return fit_rgb(self.picture(record.rgb or "", size), size, self.fit)

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        values = self.target_values(record.target or "")
        return fit_target(values, size, self.fit, missing=self.missing)

    def picture(self, name: str, size: int = 0) -> Image.Image:
        """An RGB image; a JPEG possibly at a fraction of its size, as in :func:`decode_rgb`."""
        content, place = self.container.read(name), self.container.describe(name)
        return decode_rgb(content, place, size, self.max_pixels)

    def target_values(self, name: str) -> NDArray[Any]:
        """A target image in the store's unit, at its own resolution."""
        return self.convert(self.decode(name), self.container.describe(name))

    def decode(self, name: str) -> NDArray[Any]:
        """A target image as it is in its file, but for values that stand for no reading."""
        content, place = self.container.read(name), self.container.describe(name)
        return decode_target(content, place, self.max_pixels, self.no_reading, missing=self.missing)


def archive_of_files(
    config: Config,
    container: Container,
    records: Sequence[Record],
    convert: Convert,
    *,
    loader: type[FileLoader] = FileLoader,
    more: Iterable[str] = (),
    **about: Any,
) -> Archive:
    """The archive of samples that are image files.

    ``more`` are other files that its digest is to name, ``about`` further fields of the archive.
    """
    missing = about.get("modality", "depth") == "depth"
    fit, max_pixels = config.prepare.fit, config.prepare.max_pixels
    names = [*image_names(records), *more]
    return Archive(
        tuple(records),
        loader(container, convert, missing, fit, max_pixels),
        container.digest(names),
        container.digest(names, times=False),
        **about,
    )


def describe_values(values: NDArray[Any]) -> str:
    """Such as ``3 channels of uint8``."""
    channels = values.shape[2] if values.ndim == 3 else 1
    return f"{channels} channel{'s'[: channels > 1]} of {values.dtype}"


@dataclass(frozen=True)
class TargetValues:
    """Converts decoded values; its bound method is a loader's ``convert``."""

    modality: str  # depth, nir, thermal or other
    unit: str  # auto, mm, m or raw, as in ``folders.unit``
    dtype: str = ""  # what the result must be; empty: anything
    channels: int = 0  # how many channels it must have; 0: any number
    scale: float | None = None  # millimetres that 1 stands for; None: as the unit says

    @property
    def stored_unit(self) -> str:
        """``mm`` for depth in a known unit, else ``raw``."""
        return "mm" if self.modality == "depth" and self.unit != "raw" else "raw"

    def convert(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """Values in the stored unit, uint8 or uint16; raises DataError if they do not fit."""
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
                f"{name} holds {describe_values(stored)}, expected {self.channels} of "
                f"{self.dtype}: all target images must be alike"
            )
        return stored

    def _depth(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        if self.scale is not None:
            return to_millimetres(values * (self.scale / 1000.0), name)
        if self.unit == "m" or (self.unit == "auto" and values.dtype.kind == "f"):
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
            other = f"scale to that, or {FINER}, and set folders.unit=raw, which rounds them"
            raise DataError(
                f"{name} has values from {low:g} to {high:g}, expected 0..{largest:g}: "
                f"{FINER if self.unit == 'raw' else other}; name values that stand for no reading "
                "in folders.missing"
            )
        scaled: NDArray[Any] = np.rint(finite * (65535.0 / largest)).astype(np.uint16)
        return scaled


plane_of_bytes = TargetValues("other", "raw", "uint8", 1).convert
plane_of_millimetres = TargetValues("other", "raw", "uint16", 1).convert  # 0 = no reading


def kept_box(width: int, height: int, fit: Fit) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of what is kept of an image."""
    if fit == "squash":
        return 0, 0, width, height
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def fit_rgb(image: Image.Image, size: int, fit: Fit) -> NDArray[np.uint8]:
    """Resample an RGB image to (size, size, 3), with antialiasing where it has another size."""
    box = kept_box(*image.size, fit)
    if (box[2] - box[0], box[3] - box[1]) == (size, size):
        return np.asarray(image.crop(box))
    return np.asarray(
        image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    )


def fit_target(values: NDArray[Any], size: int, fit: Fit, *, missing: bool) -> NDArray[Any]:
    """Resample a target image by area; bit-exact where it has the size already.

    Values are (H, W) or (H, W, C), uint8 or uint16. With ``missing``, 0 means "no reading". Such
    pixels never blend into others: a stored pixel is the mean of the readings in its area, or 0
    where less than half of it has one. All is whole numbers, halves are rounded up: exported models
    come to the very same values.
    """
    height, width = values.shape[:2]
    left, upper, right, lower = kept_box(width, height, fit)
    kept = values[upper:lower, left:right]
    if kept.shape[:2] == (size, size):
        return np.ascontiguousarray(kept)
    if kept.ndim == 3:
        planes = [_by_area(kept[:, :, c], size, missing) for c in range(kept.shape[2])]
        return np.stack(planes, axis=2)
    return _by_area(kept, size, missing)


def place_targets(stored: NDArray[Any], height: int, width: int, fit: Fit) -> NDArray[Any]:
    """Images (N, H, W) or (N, H, W, C) of which :func:`fit_target` makes those stored.

    ``stored`` are (N, S, S) or (N, S, S, C). The pixels are repeated, beyond what is kept, too. The
    way back is exact unless less than S x S pixels are kept.
    """
    left, upper, right, lower = kept_box(width, height, fit)

    def sources(length: int, first: int, end: int) -> NDArray[np.int64]:
        kept = np.clip(np.arange(length) - first, 0, end - first - 1)
        starts, _ = areas(end - first, stored.shape[1])
        return np.searchsorted(starts, kept, side="right") - 1

    down, across = sources(height, upper, lower), sources(width, left, right)
    return np.ascontiguousarray(stored[:, down][:, :, across])


def areas(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First pixel and number of pixels of each of ``size`` areas along a side of ``length`` pixels.

    A pixel belongs to the area that its centre lies in, as in Pillow's box filter; where there are
    more areas than pixels, each takes the nearest one.
    """
    number = np.arange(size + 1)
    if size >= length:
        return (2 * number[:-1] + 1) * length // (2 * size), np.ones(size, np.int64)
    edges = (2 * number * length + size) // (2 * size)
    return edges[:-1], np.diff(edges)


def _by_area(plane: NDArray[Any], size: int, missing: bool) -> NDArray[Any]:
    (top, heights), (left, widths) = (areas(length, size) for length in plane.shape)

    def total(values: NDArray[Any]) -> NDArray[np.int64]:
        rows = np.add.reduceat(values, top, axis=0, dtype=np.int64)
        sums: NDArray[np.int64] = np.add.reduceat(rows, left, axis=1)
        return sums

    count = np.outer(heights, widths)
    readings = total(plane > 0) if missing else count
    whole = np.maximum(readings, 1)
    mean = (2 * total(plane) + whole) // (2 * whole)
    return np.where(2 * readings >= count, mean, 0).astype(plane.dtype)


def to_millimetres(metres: NDArray[np.floating[Any]], name: str) -> NDArray[np.uint16]:
    """Depth in metres as uint16 millimetres; NaN, infinities and negative values are no reading.

    Raises:
        DataError: The values are no metres: the median lies beyond 65.5 m.
    """
    valid = np.isfinite(metres) & (metres > 0)
    readings = metres[valid]
    if readings.size and float(np.median(readings)) > 65.535:
        raise DataError(
            f"{name} has a median depth of {float(np.median(readings)):,.0f} m: say what the "
            "values are with folders.unit or folders.scale, and what stands for no reading with "
            "folders.missing"
        )
    millimetres = np.where(valid, np.minimum(metres, 100.0), 0) * 1000.0
    millimetres = np.where(millimetres > 65535, 0, millimetres)
    return np.rint(millimetres).astype(np.uint16)
