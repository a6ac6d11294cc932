"""Shifted and mirrored rows of an array, at close to the rate of copying them.

A line of a shifted image is a run of the pixels of the stored one, so it is copied whole, straight
from the store; only what a shift brings in from outside is filled in afterwards, by repeating the
edge. Mirrored images are turned round by torch, which has vector instructions for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Images = NDArray[Any]
_OF_SIZE = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
"""Types that torch can mirror, by bytes of an element; values are only moved."""


class Gatherer:
    """Rows of one array of images.

    Args:
        images: (N, H, W) or (N, H, W, C), contiguous, such as a memory map; never copied whole.
    """

    def __init__(self, images: Images) -> None:
        if not images.flags.c_contiguous:
            raise ValueError("images must lie in memory one after the other")
        self._images = images
        count, height, width = images.shape[:3]
        self._pixels = images.reshape(count * height * width, *images.shape[3:])
        runs = (max(len(self._pixels) - width + 1, 0), width, *images.shape[3:])
        strides = (self._pixels.strides[0], *self._pixels.strides)
        self._runs = as_strided(self._pixels, runs, strides, writeable=False)

    def plain(self, rows: NDArray[np.int64]) -> Images:
        """The images of these rows as they are stored."""
        return np.asarray(self._images[rows])

    def shifted(
        self,
        rows: NDArray[np.int64],
        offsets: NDArray[np.int64],
        mirrored: NDArray[np.bool_],
    ) -> Images:
        """Images of these rows, shifted, then mirrored.

        Args:
            rows: (B,).
            offsets: (B, 2) pixels down and right at which the first pixel is taken; what lies
                outside repeats the edge. Smaller than the image.
            mirrored: (B,), left to right.
        """
        height, width = self._images.shape[1:3]
        down = np.clip(np.arange(height) + offsets[:, :1], 0, height - 1)
        lines = rows[:, None] * height + down
        starts = lines * width + offsets[:, 1:]
        within = np.clip(starts, 0, len(self._runs) - 1)
        taken: Images = self._runs[within]
        for right in np.unique(offsets[:, 1]).tolist():
            if right:
                _repeat_edge(taken, np.flatnonzero(offsets[:, 1] == right), right)
        # The first and the last line of the array, where a run would begin or end outside.
        batch, line = np.nonzero(starts != within)
        columns = np.clip(np.arange(width) + offsets[batch, 1:], 0, width - 1)
        taken[batch, line] = self._pixels[lines[batch, line, None] * width + columns]
        _mirror(taken, np.flatnonzero(mirrored))
        return taken


def geometry(
    noise: NDArray[np.float32], shape: tuple[int, ...], *, shift: float, flip: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Offsets (B, 2) in pixels and whether to mirror (B,), from random numbers.

    Args:
        noise: (B, 3) in [0, 1): shift down, shift right, mirror.
        shape: H, W.
        shift: Largest shift as a share of the image side.
        flip: Whether to mirror half of the images.
    """
    reach = np.array([shift * shape[0], shift * shape[1]])
    offsets = np.rint((2.0 * noise[:, :2] - 1.0) * reach).astype(np.int64)
    return offsets, (noise[:, 2] < 0.5) & flip


def _repeat_edge(images: Images, which: NDArray[np.int64], right: int) -> None:
    width = images.shape[2]
    if right > 0:
        images[which, :, width - right :] = images[which, :, width - right - 1 : width - right]
    else:
        images[which, :, :-right] = images[which, :, -right : 1 - right]


def _mirror(images: Images, which: NDArray[np.int64]) -> None:
    if not len(which):
        return
    moved = torch.from_numpy(images.view(_OF_SIZE[images.itemsize]))
    places = torch.from_numpy(which)
    part = moved.index_select(0, places)
    # torch mirrors fast along the last axis, or along W before channels of bytes.
    turned = part.flip(2) if part.ndim == 3 else _flip_pixels(part)
    moved.index_copy_(0, places, turned)


def _flip_pixels(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
