"""Could an image be one of the sensor's? Judged by what the model was trained on.

A classifier names a class for anything: a black frame, a lens cap, the images of another sensor.
Three numbers of each image tell most of these apart, and their usual range is in model.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 96
"""Pixels across, at most, that are looked at."""
MORE_MISSING = 0.15
"""Share of missing pixels beyond the usual that is no cause for doubt."""
WIDER = 0.5
"""Likewise for values, as a share of their usual range."""
FLATTER = 0.25
"""An image with less than this share of the usual contrast is doubted."""


def describe_images(images: NDArray[Any], missing: bool) -> dict[str, Any]:
    """What is usual, for model.json: the middle 98 % of the training images.

    Args:
        images: (N, H, W) or (N, H, W, C), as stored.
        missing: Whether 0 means "no reading".

    Returns:
        dtype, and lowest and highest of: missing (share of pixels without a reading), middle (the
        median value), contrast (from the 5th to the 95th percentile). Nothing, where no image has
        a reading.
    """
    numbers = np.array([_numbers(image, missing) for image in images])
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    if not len(numbers):
        return {}
    low, high = np.percentile(numbers, (1, 99), axis=0).round(4)
    names = ("missing", "middle", "contrast")
    ranges = zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True)
    return {"dtype": images.dtype.name, **{name: list(both) for name, both in ranges}}


def doubt(image: NDArray[Any], usual: Mapping[str, Any], missing: bool) -> str:
    """Why an image may be none of the sensor's; empty: nothing speaks against it.

    Args:
        image: (H, W) or (H, W, C), as stored.
        usual: As :func:`describe_images` gave it; empty: nothing is known.
        missing: Whether 0 means "no reading".
    """
    if not usual:
        return ""
    share, middle, contrast = _numbers(image, missing)
    if image.dtype.name != usual["dtype"]:
        return f"values of type {image.dtype.name} (training images: {usual['dtype']})"
    most = usual["missing"][1]
    if share > min(most + MORE_MISSING, 0.999):
        return f"no reading in {share:.0%} of the pixels (training images: up to {most:.0%})"
    low, high = usual["middle"]
    margin = WIDER * max(high - low, 0.2 * high)
    if not max(low - margin, WIDER * low) <= middle <= high + margin:
        return f"values around {middle:,.0f} (training images: {low:,.0f} to {high:,.0f})"
    least = usual["contrast"][0]
    if contrast < FLATTER * least:
        return f"values differ by only {contrast:,.0f} (training images: {least:,.0f} or more)"
    return ""


def _numbers(image: NDArray[Any], missing: bool) -> tuple[float, float, float]:
    """Share of pixels without a reading, median, and contrast; the last two NaN without any."""
    step = max(1, image.shape[0] // LARGEST)
    few = image[::step, ::step]
    readings = few[few > 0] if missing else few
    if not readings.size:
        return 1.0, float("nan"), float("nan")
    low, middle, high = np.percentile(readings, (5, 50, 95))
    return 1.0 - readings.size / few.size, float(middle), float(high - low)
