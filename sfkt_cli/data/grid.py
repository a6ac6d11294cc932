"""The square grid of stored images: cropping and resampling.

The shorter side decides on the grid: the middle square is kept, so that shapes keep their
proportions (a squashed 1920 x 1080 image is 44 % off, and source models were trained on unsquashed
ones). ``squash`` keeps everything instead.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Fit = Literal["crop", "squash"]


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
