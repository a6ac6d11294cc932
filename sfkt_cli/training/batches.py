"""From store rows to augmented batches: a seeded order, one geometry for all views of a sample.

:class:`Stream` draws from one group of a store, :class:`TransferBatches` what bridge and transfer
look at. Some TI pairs are held out: no batch holds them.

A CPU shifts and mirrors rows before they become a batch, a GPU the batch that it already holds. The
pictures are the same byte for byte.

Order and augmentation depend on (seed, stream, epoch, pass, sample) alone: not on the number of
processes, and a resumed run draws what an uninterrupted one would have drawn.
"""

import zlib
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.machine import prefer_large_pages
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.loop import Batch, Objective
from sfkt_cli.training.runtime import Runtime
from sfkt_cli.training.trial import settle_batch_size

Images = NDArray[Any]
HELD_OUT = 2000  # TI pairs that only score, at most
MIN_HELD_OUT = 50  # with fewer, a fifth of the pairs scores in place of a tenth
FEWEST_HELD_OUT = 10  # fewer cannot rank models
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types that torch can mirror and look up, by bytes of an element; values are only moved."""


def geometry(
    noise: NDArray[np.float32], shape: tuple[int, ...], *, shift: float, flip: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Offsets (B, 2) in pixels and whether to mirror (B,), from random numbers (B, 3) in [0, 1).

    ``shift`` is the largest offset, as a share of the sides ``shape``. With ``flip``, half the
    images are mirrored.
    """
    reach = np.array([shift * shape[0], shift * shape[1]])
    offsets = np.rint((2.0 * noise[:, :2] - 1.0) * reach).astype(np.int64)
    return offsets, (noise[:, 2] < 0.5) & flip


def shift_and_mirror(
    images: Images, offsets: NDArray[np.int64], mirrored: NDArray[np.bool_]
) -> Images:
    """Images (B, H, W) or (B, H, W, C), shifted and then, if asked, mirrored left to right.

    ``offsets`` (B, 2) say where the first pixel is taken, in pixels down and right, fewer than the
    image has. Pixels from outside repeat the edge. ``mirrored`` is (B,).
    """
    height, width = images.shape[1:3]
    shifted = np.empty_like(images)
    for image, stored, (down, right) in zip(shifted, images, offsets.tolist(), strict=True):
        top, bottom = max(-down, 0), height - max(down, 0)
        left, end = max(-right, 0), width - max(right, 0)
        image[top:bottom, left:end] = stored[top + down : bottom + down, left + right : end + right]
        image[top:bottom, :left] = image[top:bottom, left, None]
        image[top:bottom, end:] = image[top:bottom, end - 1, None]
        image[:top], image[bottom:] = image[top], image[bottom - 1]
    _mirror(shifted, np.flatnonzero(mirrored))
    return shifted


def shift_and_mirror_on_gpu(images: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
    """The same as :func:`shift_and_mirror`, for a batch that a GPU already holds.

    It looks up each pixel, which takes next to no time on a GPU, and three to five times as long on
    a CPU.
    """
    batch, height, width = images.shape[:3]
    lines = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + offsets[:, 1:]
    lines, columns = lines.clamp(0, height - 1), columns.clamp(0, width - 1)
    which = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.view(_OF_SIZE[images.itemsize])
    return moved[which, lines[:, :, None], columns[:, None, :]].view(images.dtype)


def _mirror(images: Images, which: NDArray[np.int64]) -> None:
    part = torch.from_numpy(images[which]).view(_OF_SIZE[images.itemsize])
    # torch mirrors fast along the last axis, or along W before channels of bytes.
    if part.ndim == 3:
        turned = part.flip(2)
    else:
        turned = part.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
    images[which] = turned.numpy().view(images.dtype)


@dataclass(eq=False)
class Stream:
    """Endless batches of the rows of one group of a store."""

    # Images by name, each (N, H, W) or (N, H, W, C), with the same N, H and W; memory maps are read
    # a batch at a time. All views of a sample get the same geometry.
    arrays: Mapping[str, Images]
    _: KW_ONLY
    name: str  # tells streams of one seed apart
    seed: int  # seed of order and augmentation
    batch_size: int  # rows in a batch, over all processes
    shift: float  # largest shift as a share of the image side; edges are repeated
    flip: bool  # mirror half of the samples
    runtime: Runtime  # device and processes; each takes every ``shares``-th row of a batch
    rows: NDArray[np.int64] | None = None  # the rows that are drawn from; None: all
    # Views of each image, with a geometry of its own each; the second one of ``target`` is called
    # ``target_2``.
    views: int = 1

    def __post_init__(self) -> None:
        first = next(iter(self.arrays.values()))
        self._rows = np.arange(len(first)) if self.rows is None else self.rows
        self.count = len(self._rows)
        self._shape = first.shape[1:3]
        self._key = (self.seed, zlib.crc32(self.name.encode()))
        self._share = slice(self.runtime.rank, None, self.runtime.shares)
        self._pass: tuple[int, int] | None = None

    def draw(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Row numbers (b,) of this process's share of a batch, and random numbers (views, b, 3)."""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        rows, noise = [], []
        while first < end:
            number, place = divmod(first, self.count)
            if self._pass != (epoch, number):
                generator = np.random.default_rng([*self._key, epoch, number])
                self._order = generator.permutation(self.count)
                self._noise = generator.random((self.views, self.count, 3), np.float32)
                self._pass = (epoch, number)
            part = self._order[place : place + end - first]
            rows.append(part)
            noise.append(self._noise[:, part])
            first += len(part)
        drawn = np.concatenate(noise, axis=1)[:, self._share]
        return self._rows[np.concatenate(rows)[self._share]], drawn

    def batch(self, epoch: int, step: int) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
        """Augmented images by name, as stored but on the device, and the row of each sample."""
        rows, noise = self.draw(epoch, step)
        images = dict[str, Tensor]()
        for name, array in self.arrays.items():
            stored = np.asarray(array[rows])
            for view, numbers in enumerate(noise, start=1):
                images[name if view == 1 else f"{name}_{view}"] = self._augmented(stored, numbers)
        return images, rows

    def _augmented(self, stored: Images, noise: NDArray[np.float32]) -> Tensor:
        place = self.runtime.tensor
        if not self.flip and not self.shift:
            return place(stored)
        offsets, mirrored = geometry(noise, self._shape, shift=self.shift, flip=self.flip)
        if self.runtime.device.type == "cpu":
            return place(shift_and_mirror(stored, offsets, mirrored))
        return shift_and_mirror_on_gpu(place(stored), place(offsets), place(mirrored))


class TransferBatches:
    """Batches of what an objective of bridge or transfer looks at, by epoch and step.

    Args:
        config: The settings.
        store: The prepared transfer.h5.
        images: Names of the images in a batch: ``ti_target`` and ``ti_rgb`` of pairs, ``tr_target``
            of target images and, shifted and mirrored anew, ``tr_target_2``. A batch also holds
            their row numbers, ``ti_rows`` and ``tr_rows``. Without pairs, it has no ``ti_``
            entries.
        runtime: Device and processes.
        batch_size: Rows of each kind in a step, over all processes.

    Raises:
        DataError: There are fewer than two target images.
    """

    def __init__(
        self, config: Config, store: Store, images: Collection[str], runtime: Runtime,
        batch_size: int,
    ) -> None:  # fmt: skip
        targets, training = store.count("target"), config.training
        if targets < 2:
            raise DataError(f"{store.path} holds {targets} TR target images: at least 2 are needed")
        stream = partial(
            Stream, seed=config.seed, batch_size=batch_size, shift=training.shift,
            flip=training.flip, runtime=runtime,
        )  # fmt: skip
        trained, _ = divide_pairs(store)
        views = {v: store[f"ti/{v}"] for v in ("target", "rgb") if f"ti_{v}" in images}
        pairs = len(trained) if views else 0
        order = np.random.default_rng([config.seed, 8]).permutation(len(trained))
        kept = max(round(training.ti_fraction * len(trained)), 1)
        trained = np.sort(trained[order[:kept]])
        self.paired = len(trained) > 0  # whether there are pairs, so that scores on them are known
        self.streams: dict[str, Stream] = {}  # what batches are drawn from
        if views and self.paired:
            self.streams["ti"] = stream(views, name="ti", rows=trained)
        if "tr_target" in images:
            both = 2 if "tr_target_2" in images else 1
            self.streams["tr"] = stream({"target": store["target/target"]}, name="tr", views=both)
        self.batch_size = batch_size
        # Images that a step sees; a pair counts as one.
        self.images_per_step = sum(s.views for s in self.streams.values()) * batch_size
        # Steps of an epoch: the larger stream passes once.
        self.steps = max(max(targets, pairs) // batch_size, training.min_steps)
        # How often an epoch passes the target images.
        self.passes = max(self.steps * batch_size / targets, 1.0)
        self._runtime, self._shuffled = runtime, training.shuffle_pairs

    def __call__(self, epoch: int, step: int) -> Batch:
        """One batch, on the device."""
        batch: Batch = {}
        for kind, stream in self.streams.items():
            images, rows = stream.batch(epoch, step)
            batch |= {f"{kind}_{name}": image for name, image in images.items()}
            batch[f"{kind}_rows"] = self._runtime.tensor(rows)
        if self._shuffled:  # rows stand for the partners' features
            for name in {"ti_rgb", "ti_rows"} & set(batch):
                batch[name] = batch[name].roll(1, dims=0)
        return batch


def settle_batches(
    stage: Stage, store: Store, images: Collection[str], runtime: Runtime, objective: Objective
) -> TransferBatches:
    """Batches of these images, in the size of the settings or, with ``auto``, in the one that fits.

    For ``auto``, the objective is tried out.
    """
    opened = partial(TransferBatches, stage.config, store, images, runtime)
    count = max(store.count("ti") * ("ti_target" in images), store.count("target"))
    setting = stage.config.runtime.batch_size
    batches = opened(settle_batch_size(setting, count, stage.folder, runtime, objective, opened))
    drawn_from = batches.streams.values()
    prefer_large_pages([array for stream in drawn_from for array in stream.arrays.values()])
    return batches


def divide_pairs(store: Store) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the TI pairs that are trained on, and of those that only score.

    A tenth of the pairs is held out, in whole groups and at most HELD_OUT. If that is fewer than
    MIN_HELD_OUT, or a single group, it is a fifth. If that gives fewer than FEWEST_HELD_OUT pairs,
    all are trained on, and some of these score, too. The seed of ``sfkt prepare`` draws the pairs,
    so that they are the same for all stages.
    """
    count = store.count("ti")
    groups, of_group = np.unique(np.array(store.strings("ti/group")), return_inverse=True)
    order = np.random.default_rng([store.attrs.get("seed", 0), 7]).permutation(len(groups)).tolist()
    sizes = np.bincount(of_group, minlength=len(groups)).tolist()
    chosen, total = set[int](), 0
    for share in (10, 5):
        for group in order:
            if group not in chosen and total + sizes[group] <= min(HELD_OUT, count // share):
                chosen.add(group)
                total += sizes[group]
        if total >= MIN_HELD_OUT and len(chosen) > 1:
            break
    rows = np.arange(count)
    held_out = np.flatnonzero(np.isin(of_group, sorted(chosen)))
    if len(held_out) < FEWEST_HELD_OUT:
        return rows, rows[spread(count, HELD_OUT)]
    return np.setdiff1d(rows, held_out), held_out
