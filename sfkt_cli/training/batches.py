"""From store rows to augmented batches: seeded order, paired geometry, no Python per sample.

A CPU shifts and mirrors while it copies rows; for a GPU rows are copied as they are stored, and it
shifts and mirrors the batch itself. The pictures are the same byte for byte.

Order and augmentation depend on (seed, stream, epoch, pass, sample) alone: not on the number of
processes, and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.training.gather import Gatherer, geometry, shift_and_mirror
from sfkt_cli.training.runtime import Runtime

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
        runtime: Device and processes; each process takes every ``world``-th row of a batch.
        rows: The rows that are drawn from; None: all.
        views: Views of each image, with a geometry of its own each; the second one of ``target`` is
            called ``target_2``.
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
        runtime: Runtime,
        rows: NDArray[np.int64] | None = None,
        views: int = 1,
    ) -> None:
        self._rows = np.arange(len(next(iter(arrays.values())))) if rows is None else rows
        self.count = len(self._rows)
        self._shape = next(iter(arrays.values())).shape[1:3]
        self.arrays = list(arrays.values())
        self._gatherers = {name: Gatherer(array) for name, array in arrays.items()}
        self._key = (seed, zlib.crc32(name.encode()))
        self._batch_size = batch_size
        self._shift = shift
        self._flip = flip
        self._views = views
        self._runtime = runtime
        self._share = slice(runtime.rank, None, runtime.world)
        self._pass: tuple[int, int] | None = None

    def rows(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Row numbers (b,) of this process's share of a batch, and random numbers (views, b, 3)."""
        first, end = step * self._batch_size, (step + 1) * self._batch_size
        rows, noise = [], []
        while first < end:
            number, place = divmod(first, self.count)
            self._shuffle(epoch, number)
            part = self._order[place : place + end - first]
            rows.append(part)
            noise.append(self._noise[:, part])
            first += len(part)
        drawn = np.concatenate(noise, axis=1)[:, self._share]
        return self._rows[np.concatenate(rows)[self._share]], drawn

    def batch(self, epoch: int, step: int) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
        """Augmented images by name, as stored but on the device, and the row of each sample."""
        rows, noise = self.rows(epoch, step)
        images: dict[str, Tensor] = {}
        for view, numbers in enumerate(noise, start=1):
            suffix = "" if view == 1 else f"_{view}"
            images |= {name + suffix: image for name, image in self._view(rows, numbers)}
        return images, rows

    def _view(
        self, rows: NDArray[np.int64], noise: NDArray[np.float32]
    ) -> Iterator[tuple[str, Tensor]]:
        place = self._runtime.tensor
        offsets, mirrored = geometry(noise, self._shape, shift=self._shift, flip=self._flip)
        for name, gatherer in self._gatherers.items():
            if not self._flip and not self._shift:
                yield name, place(gatherer.plain(rows))
            elif self._runtime.device.type == "cpu":
                yield name, place(gatherer.shifted(rows, offsets, mirrored))
            else:
                stored = place(gatherer.plain(rows))
                yield name, shift_and_mirror(stored, place(offsets), place(mirrored))

    def _shuffle(self, epoch: int, number: int) -> None:
        if self._pass != (epoch, number):
            generator = np.random.default_rng([*self._key, epoch, number])
            self._order = generator.permutation(self.count)
            self._noise = generator.random((self._views, self.count, 3), np.float32)
            self._pass = (epoch, number)
