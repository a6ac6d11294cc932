"""What bridge and transfer share: batches of transfer.h5, held-out pairs, and the epoch to keep.

A label-free score may choose the epoch. Both stages write the classes predicted after each epoch to
``epochs.npy``; only ``evaluate`` compares them with labels, afterwards.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.console import warn
from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.files import write_bytes
from sfkt_cli.machine import prefer_large_pages
from sfkt_cli.settings.config import Config, LabelFree
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.batch_size import settle_batch_size
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.loop import Batch, Plan
from sfkt_cli.training.runtime import Runtime

HELD_OUT = 2000  # TI pairs that only score, at most
MIN_HELD_OUT = 50  # with fewer, a fifth of the pairs scores in place of a tenth
SELECTORS: tuple[str, ...] = get_args(LabelFree)
FILE = "epochs.npy"  # in the folder of a stage: the classes predicted after each epoch


@dataclass(frozen=True)
class TransferBatches:
    """(epoch, step) to a batch of what an objective of bridge or transfer looks at.

    Of pairs it is ``ti_target`` and ``ti_rows``, and ``ti_rgb`` where the partners are read; of
    target images ``tr_target`` and ``tr_rows``, and with two views ``tr_target_2``.
    """

    config: Config
    runtime: Runtime
    batch_size: int  # rows of each kind in a step, over all processes
    ti: Stream | None  # TI pairs; None where there are none, or none are wanted
    tr: Stream  # TR target images
    draws_tr: bool  # whether target images are in the batches
    paired: bool  # whether there are TI pairs, so that scores on them are known

    def __call__(self, epoch: int, step: int) -> Batch:
        """One batch, on the device."""
        batch: Batch = {}
        if self.ti is not None:
            batch |= self._drawn("ti", self.ti, epoch, step)
            if self.config.training.shuffle_pairs:  # rows stand for the partners' features
                for name in {"ti_rgb", "ti_rows"} & set(batch):
                    batch[name] = batch[name].roll(1, dims=0)
        if self.draws_tr:
            batch |= self._drawn("tr", self.tr, epoch, step)
        return batch

    def _drawn(self, kind: str, stream: Stream, epoch: int, step: int) -> Batch:
        images, rows = stream.batch(epoch, step)
        drawn = {f"{kind}_{name}": image for name, image in images.items()}
        return {**drawn, f"{kind}_rows": self.runtime.tensor(rows)}

    @property
    def streams(self) -> list[Stream]:
        """What batches are drawn from."""
        pairs = [] if self.ti is None else [self.ti]
        return [*pairs, self.tr] if self.draws_tr else pairs

    @property
    def steps(self) -> int:
        """Steps of an epoch: the larger stream passes once, and at least ``training.min_steps``."""
        training = self.config.training
        pairs = round(self.ti.count / training.ti_fraction) if self.ti else 0
        return max(max(self.tr.count, pairs) // self.batch_size, training.min_steps)

    @property
    def passes(self) -> float:
        """How often an epoch passes the target images, at least 1."""
        return max(self.steps * self.batch_size / self.tr.count, 1.0)

    def plan(
        self,
        stage: Stage,  # stage that trains; its folder is written to
        title: str,  # shown in front of messages
        epochs: int,  # number of epochs
        weights: Mapping[str, float],  # weights of the loss terms
        # The score that ``training.select=auto`` stands for; None: the last epoch is kept.
        auto: str | None = None,
    ) -> Plan:
        """The plan of a training with these batches."""
        config = self.config
        return Plan(
            title=title, seed=config.seed, epochs=epochs, steps=self.steps, weights=weights,
            folder=stage.folder, select=selector(config, ti=self.paired, auto=auto),
            images=len(self.streams) * self.batch_size, clip_norm=config.training.clip_norm,
            checkpoint_seconds=config.runtime.checkpoint_seconds, patience=config.training.patience,
            made_for=stage.digest,
        )  # fmt: skip


def open_batches(
    config: Config,
    store: Store,
    runtime: Runtime,
    batch_size: int,
    *,
    ti: bool = True,
    ti_rgb: bool = True,
    tr: bool = True,
    tr_views: int = 1,
) -> TransferBatches:
    """Batches of transfer.h5 with ``batch_size`` rows of each kind, over all processes.

    Without ``ti`` there are no pairs in them; without ``ti_rgb`` only their target images; without
    ``tr`` no TR target images, of which else there are ``tr_views`` augmented views.

    Raises:
        DataError: There are fewer than two target images.
    """
    if store.count("target") < 2:
        raise DataError(
            f"{store.path} holds {store.count('target')} TR target images: at least 2 are needed"
        )
    stream = partial(
        Stream, seed=config.seed, batch_size=batch_size, shift=config.training.shift,
        flip=config.training.flip, runtime=runtime,
    )  # fmt: skip
    trained, _ = held_out_pairs(store)
    if len(trained):
        order = np.random.default_rng([config.seed, 8]).permutation(len(trained))
        kept = max(round(config.training.ti_fraction * len(trained)), 1)
        trained = np.sort(trained[order[:kept]])
    pairs = None
    if ti and len(trained):
        views = {name: store[f"ti/{name}"] for name in ("target", *(["rgb"] if ti_rgb else []))}
        pairs = stream(views, name="ti", rows=trained)
    targets = stream({"target": store["target/target"]}, name="tr", views=tr_views)
    return TransferBatches(config, runtime, batch_size, pairs, targets, tr, len(trained) > 0)


def settle_batches(
    config: Config,
    store: Store,
    folder: Path,
    runtime: Runtime,
    objective: nn.Module,
    *,
    ti: bool = True,
    ti_rgb: bool = True,
    tr: bool = True,
) -> TransferBatches:
    """The batches of :func:`open_batches` in the size that is set or that fits.

    Where the size is ``auto``, the objective is tried out. One with ``needs_second_view`` gets a
    second view of each TR target image.
    """
    views = 2 if getattr(objective, "needs_second_view", False) else 1
    opened = partial(
        open_batches, config, store, runtime, ti=ti, ti_rgb=ti_rgb, tr=tr, tr_views=views
    )
    count = max(store.count("ti") * ti, store.count("target"))
    setting = config.runtime.batch_size
    batches = opened(settle_batch_size(setting, count, folder, runtime, objective, opened))
    prefer_large_pages([array for stream in batches.streams for array in stream.arrays.values()])
    return batches


def held_out_pairs(store: Store) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the TI pairs that are trained on, and of those that only score.

    A tenth of the pairs is held out, in whole groups and at most HELD_OUT; where that would be
    fewer than MIN_HELD_OUT, a fifth. Where no group is that small, all pairs are trained on, and
    some of them score, too. The seed of ``sfkt prepare`` draws them, so that they are the same for
    all stages.
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
        if total >= MIN_HELD_OUT:
            break
    rows = np.arange(count)
    held_out = np.flatnonzero(np.isin(of_group, sorted(chosen)))
    if not len(held_out):
        return rows, rows[spread(count, HELD_OUT)]
    return np.setdiff1d(rows, held_out), held_out


def selector(config: Config, *, ti: bool, auto: str | None = None) -> str | None:
    """The score that chooses the epoch, ``auto`` where the settings say so; None: the last is kept.

    ``ti``: whether the scores on TI pairs are known. Settings that have no effect are warned of.
    """
    wanted, patience = config.training.select, config.training.patience
    chosen = auto if wanted == "auto" else wanted
    if chosen is not None and chosen.startswith("ti_") and not ti:
        warn(f"training.select={chosen}: there are no TI pairs to score on, the last epoch is kept")
        chosen = "last"
    if chosen not in (None, "last"):
        return chosen
    if patience:
        warn(
            f"training.patience={patience} stops nothing, because no score chooses the epoch: set "
            "training.select, such as tr_mirror, or leave it out"
        )
    return None


def write_epoch(folder: Path, epoch: int, logits: Tensor) -> None:
    """Write the classes predicted after an epoch as row ``epoch``, from 0; drop later rows.

    ``logits`` are (R, K) on the rows ``spread(N)`` of the target images.
    """
    predicted = logits.argmax(dim=1).numpy().astype(np.int16)[None]
    before = load_epochs(folder)[:epoch]
    alike = before.shape[1:] == predicted.shape[1:]
    rows = np.concatenate([before, predicted]) if alike else predicted
    written = io.BytesIO()
    np.save(written, rows)
    content = written.getvalue()
    write_bytes(folder / FILE, content + hashlib.sha256(content).digest())


def load_epochs(folder: Path) -> NDArray[np.int16]:
    """Classes predicted (E, R) after each epoch of a stage; (0, 0) where there is no file."""
    path = folder / FILE
    if not path.is_file():
        return np.zeros((0, 0), np.int16)
    content = path.read_bytes()
    file = io.BytesIO(content)
    try:
        predicted = np.asarray(np.load(file, allow_pickle=False), np.int16)
        expected = hashlib.sha256(content[: file.tell()]).digest()
        intact = predicted.ndim == 2 and file.read() in (expected, b"")  # earlier versions had none
    except Exception:  # damaged headers raise almost anything, such as tokenize.TokenError
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged: delete it; the report then lacks a table")
    return predicted
