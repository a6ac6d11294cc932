"""From store rows to augmented batches: seeded order, paired geometry, no Python per sample.

Order and augmentation depend on (seed, stream, epoch, pass, sample) alone: not on the number of
processes, and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[Any]


class Stream:
    """Endless batches of the rows of one group of a store.

    Args:
        arrays: Images by name, each (N, H, W) or (N, H, W, C), with the same N, H and W; memory
            maps are read a batch at a time. All views of a sample get the same geometry.
        name: Tells streams of one seed apart.
        seed: Of order and augmentation.
        batch_size: Rows in a batch, over all processes.
        shift: Largest shift as a share of the image side; edges are repeated.
        flip: Mirror half of the samples.
        rank: This process.
        world: Number of processes; each takes every ``world``-th row of a batch.
        rows: The rows that are drawn from; None: all.
    """

    def __init__(
        self,
        arrays: Mapping[str, Images],
        *,
        name: str,
        seed: int,
        batch_size: int,
        shift: float,
        flip: bool,
        rank: int = 0,
        world: int = 1,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._rows = np.arange(len(next(iter(arrays.values())))) if rows is None else rows
        self.count = len(self._rows)
        self._arrays = dict(arrays)
        self._key = (seed, zlib.crc32(name.encode()))
        self._batch_size = batch_size
        self._shift = shift
        self._flip = flip
        self._share = slice(rank, None, world)
        self._pass: tuple[int, int] | None = None

    def rows(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Row numbers (b,) of this process's share of a batch, and their random numbers (b, 3)."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)[self._share]
        rows = np.empty(len(places), np.int64)
        noise = np.empty((len(places), 3), np.float32)
        for number in np.unique(places // self.count):
            self._shuffle(epoch, int(number))
            here = places // self.count == number
            rows[here] = self._order[places[here] % self.count]
            noise[here] = self._noise[rows[here]]
        return self._rows[rows], noise

    def batch(self, epoch: int, step: int) -> tuple[dict[str, Images], NDArray[np.int64]]:
        """Augmented images by name, and the row number of each sample."""
        rows, noise = self.rows(epoch, step)
        shape = next(iter(self._arrays.values())).shape[1:3]
        down, right = geometry(noise, shape, shift=self._shift, flip=self._flip)
        images = {
            name: np.asarray(array[rows])[np.arange(len(rows))[:, None, None], down, right]
            for name, array in self._arrays.items()
        }
        return images, rows

    def _shuffle(self, epoch: int, number: int) -> None:
        if self._pass != (epoch, number):
            generator = np.random.default_rng([*self._key, epoch, number])
            self._order = generator.permutation(self.count)
            self._noise = generator.random((self.count, 3), np.float32)
            self._pass = (epoch, number)


def geometry(
    noise: NDArray[np.float32], shape: tuple[int, ...], *, shift: float, flip: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row (B, H, 1) and column (B, 1, W) numbers that shift and mirror each image of a batch.

    Args:
        noise: (B, 3) in [0, 1): shift down, shift right, mirror.
        shape: H, W.
        shift: Largest shift as a share of the image side.
        flip: Whether to mirror.
    """
    height, width = shape
    reach = np.array([shift * height, shift * width])
    offsets = np.rint((2.0 * noise[:, :2] - 1.0) * reach).astype(np.int64)
    down = np.clip(np.arange(height) + offsets[:, :1], 0, height - 1)
    right = np.clip(np.arange(width) + offsets[:, 1:], 0, width - 1)
    if flip:
        right = np.where(noise[:, 2:] < 0.5, right[:, ::-1], right)
    return down[:, :, None], right[:, None, :]
