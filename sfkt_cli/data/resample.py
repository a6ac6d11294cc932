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
VALID_SHARE = 0.5
"""A stored pixel has a reading where at least this share of its area has one."""


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


def _by_area(plane: NDArray[Any], size: int, missing: bool) -> NDArray[Any]:
    mean = _area_mean(plane, size)
    if missing:
        share = _area_mean(plane > 0, size)
        mean = np.where(share >= VALID_SHARE - 1e-4, mean / np.maximum(share, 1e-6), 0)
    rounded: NDArray[Any] = np.rint(mean).astype(plane.dtype)
    return rounded


def _area_mean(plane: NDArray[Any], size: int) -> NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def to_millimetres(metres: NDArray[np.floating[Any]], name: str) -> NDArray[np.uint16]:
    """Depth in metres as uint16 millimetres; NaN, infinities and negative values are no reading.

    Raises:
        DataError: The values are no metres: the median lies beyond 65.5 m.
    """
    valid = np.isfinite(metres) & (metres > 0)
    found = metres[valid]
    if found.size and float(np.median(found)) > 65.535:
        raise DataError(
            f"{name} has a median depth of {float(np.median(found)):,.0f}: these are no metres; "
            "set folders.unit=mm"
        )
    millimetres = np.where(valid, metres, 0) * 1000.0
    millimetres = np.where(millimetres > 65535, 0, millimetres)
    return np.rint(millimetres).astype(np.uint16)
