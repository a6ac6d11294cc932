"""From images of any size to the square grid of the store.

The shorter side decides: the middle square is kept, so that shapes keep their proportions (a
squashed 1920 x 1080 image is 44 % off, and source models were trained on unsquashed ones).
``squash`` keeps everything instead.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.errors import DataError

Fit = Literal["crop", "squash"]


def kept_box(width: int, height: int, fit: Fit) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of what is kept of an image."""
    if fit == "squash":
        return 0, 0, width, height
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def fit_rgb(image: Image.Image, size: int, fit: Fit) -> NDArray[np.uint8]:
    """Resample an RGB image with antialiasing.

    Args:
        image: Mode RGB.
        size: Side of the result in pixels.
        fit: ``crop`` or ``squash``.

    Returns:
        (size, size, 3); the very pixels where nothing needs resampling.
    """
    box = kept_box(*image.size, fit)
    if (box[2] - box[0], box[3] - box[1]) == (size, size):
        return np.asarray(image.crop(box))
    return np.asarray(
        image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    )


def fit_target(values: NDArray[Any], size: int, fit: Fit, *, missing: bool) -> NDArray[Any]:
    """Resample a target image by area; pixels without a reading take no part.

    Args:
        values: (H, W) or (H, W, C), uint8 or uint16.
        size: Side of the result in pixels.
        fit: ``crop`` or ``squash``.
        missing: Whether 0 means "no reading". Such pixels never blend into others: a stored pixel
            is the mean of the readings in its area, or 0 where less than half of it has one.

    All is whole numbers, halves are rounded up: exported models come to the very same values.

    Returns:
        (size, size) or (size, size, C) of the same type; bit-exact where nothing needs resampling.
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
