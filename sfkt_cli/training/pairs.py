"""What bridge and transfer share: batches of transfer.h5, held-out pairs, and the epoch to keep.

A label-free score may choose the epoch. Both stages write the classes predicted after each epoch to
``epochs.npy``; only ``evaluate`` compares them with labels, afterwards.
"""

import hashlib
import io
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

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
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.loop import Batch
from sfkt_cli.training.runtime import Runtime
from sfkt_cli.training.trial import settle_batch_size

HELD_OUT = 2000  # TI pairs that only score, at most
MIN_HELD_OUT = 50  # with fewer, a fifth of the pairs scores in place of a tenth
SELECTORS: tuple[str, ...] = get_args(LabelFree)
FILE = "epochs.npy"  # in the folder of a stage: the classes predicted after each epoch


class TransferBatches:
    """(epoch, step) to a batch of what an objective of bridge or transfer looks at.

    Args:
        config: The settings.
        store: The prepared transfer.h5.
        images: Names of the images in a batch: ``ti_target`` and ``ti_rgb`` of pairs, ``tr_target``
            of target images and, shifted and mirrored anew, ``tr_target_2``. Their row numbers come
            along, ``ti_rows`` and ``tr_rows``. Where there are no pairs, nothing of them comes.
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
        trained, _ = held_out_pairs(store)
        order = np.random.default_rng([config.seed, 8]).permutation(len(trained))
        kept = max(round(training.ti_fraction * len(trained)), 1)
        trained = np.sort(trained[order[:kept]])
        views = {v: store[f"ti/{v}"] for v in ("target", "rgb") if f"ti_{v}" in images}
        self.paired = len(trained) > 0  # whether there are pairs, so that scores on them are known
        self.streams: dict[str, Stream] = {}  # what batches are drawn from
        if views and self.paired:
            self.streams["ti"] = stream(views, name="ti", rows=trained)
        if "tr_target" in images:
            both = 2 if "tr_target_2" in images else 1
            self.streams["tr"] = stream({"target": store["target/target"]}, name="tr", views=both)
        pairs = (
            round(self.streams["ti"].count / training.ti_fraction) if "ti" in self.streams else 0
        )
        self.batch_size = batch_size
        self.images = len(self.streams) * batch_size  # images that a step sees
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
    stage: Stage, store: Store, images: Collection[str], runtime: Runtime, objective: nn.Module
) -> TransferBatches:
    """The batches of these images, in the size that is set, or in the one that fits.

    Where the size is ``auto``, the objective is tried out.
    """
    opened = partial(TransferBatches, stage.config, store, images, runtime)
    count = max(store.count("ti") * ("ti_target" in images), store.count("target"))
    setting = stage.config.runtime.batch_size
    batches = opened(settle_batch_size(setting, count, stage.folder, runtime, objective, opened))
    drawn_from = batches.streams.values()
    prefer_large_pages([array for stream in drawn_from for array in stream.arrays.values()])
    return batches


class PairRows(NamedTuple):
    """Rows of the TI pairs that are trained on, and of those that score."""

    trained: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @property
    def unseen(self) -> bool:
        """Whether nothing is trained on the pairs that score."""
        return not np.isin(self.held_out, self.trained).any()


def held_out_pairs(store: Store) -> PairRows:
    """Divide the TI pairs into those that are trained on, and those that only score.

    A tenth of the pairs is held out, in whole groups and at most HELD_OUT; where that would be
    fewer than MIN_HELD_OUT, or a single group, a fifth. Where no group is that small, all pairs are
    trained on, and some of them score, too. The seed of ``sfkt prepare`` draws them, so that they
    are the same for all stages.
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
    if not len(held_out):
        return PairRows(rows, rows[spread(count, HELD_OUT)])
    return PairRows(np.setdiff1d(rows, held_out), held_out)


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
