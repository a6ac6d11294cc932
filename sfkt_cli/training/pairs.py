"""What bridge and transfer share: batches of transfer.h5, held-out pairs, and the epoch to keep.

A label-free score may choose the epoch. Both stages write the classes predicted after each epoch to
``epochs.npy``; only ``evaluate`` compares them with labels, afterwards.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.files import write_bytes
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Stage
from sfkt_cli.training.batch_size import settle_batch_size
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.cpu import prefer_large_pages
from sfkt_cli.training.loop import Batch, Plan
from sfkt_cli.training.runtime import Runtime

HELD_OUT = 2000
MIN_HELD_OUT = 50
SELECTORS = (
    "ti_closeness", "ti_rank", "ti_agreement", "ti_kappa", "tr_information", "tr_density",
    "tr_mirror",
)  # fmt: skip
"""Label-free scores that may choose, larger is better."""
FILE = "epochs.npy"


@dataclass(frozen=True)
class Streams:
    """The two streams of transfer.h5."""

    ti: Stream | None  # TI pairs; None where there are none
    tr: Stream  # TR target images
    batch_size: int  # rows of each in a step, over all processes
    shuffle_pairs: bool = False  # give each TI image another pair's partner


def open_streams(
    config: Config,
    store: Store,
    runtime: Runtime,
    batch_size: int,
    *,
    ti: bool = True,
    ti_rgb: bool = True,
    tr_views: int = 1,
) -> Streams:
    """Open the streams of transfer.h5; both images of a pair get one geometry.

    Each gives ``batch_size`` rows a step, over all processes. Without ``ti`` there is no stream of
    pairs; without ``ti_rgb`` only their target images are read. Of each TR target image there are
    ``tr_views`` augmented views.

    Raises:
        DataError: There are fewer than two target images.
    """
    if store.count("target") < 2:
        raise DataError(
            f"{store.path} holds {store.count('target')} TR target images: at least 2 are needed"
        )

    def stream(
        name: str, names: dict[str, str], rows: NDArray[np.int64] | None, views: int = 1
    ) -> Stream:
        return Stream(
            {short: store[column] for short, column in names.items()},
            name=name,
            rows=rows,
            seed=config.seed,
            batch_size=batch_size,
            shift=config.training.shift,
            flip=config.training.flip,
            runtime=runtime,
            views=views,
        )

    ti_columns = {"target": "ti/target"} | ({"rgb": "ti/rgb"} if ti_rgb else {})
    trained, _ = held_out_pairs(store, config.seed)
    if len(trained):
        order = np.random.default_rng([config.seed, 8]).permutation(len(trained))
        kept = max(round(config.training.ti_fraction * len(trained)), 1)
        trained = np.sort(trained[order[:kept]])
    pairs = stream("ti", ti_columns, trained) if ti and len(trained) else None
    targets = stream("tr", {"target": "target/target"}, None, tr_views)
    return Streams(pairs, targets, batch_size, config.training.shuffle_pairs)


def settle_streams(
    config: Config,
    store: Store,
    folder: Path,
    runtime: Runtime,
    objective: nn.Module,
    *,
    ti_rgb: bool = True,
    tr: bool = True,
    ti: bool = True,
) -> tuple[Streams, Callable[[int, int], Batch]]:
    """The streams with batches of the size that is set or that fits, and their batches.

    Where the size is ``auto``, the objective is tried out. One with ``needs_second_view`` gets a
    second view of each TR target image, ``tr_target_2``. For the rest see :func:`open_streams` and
    :func:`transfer_batches`.
    """
    views = 2 if getattr(objective, "needs_second_view", False) else 1

    def opened(size: int) -> Streams:
        return open_streams(config, store, runtime, size, ti=ti, ti_rgb=ti_rgb, tr_views=views)

    def batch_of(size: int) -> Batch:
        return transfer_batches(opened(size * runtime.world), runtime, tr=tr)(0, 0)

    count = max(store.count("ti") * ti, store.count("target"))
    setting = config.runtime.batch_size
    size = settle_batch_size(setting, count, folder, runtime, objective, batch_of)
    streams = opened(size)
    drawn = [streams.ti, streams.tr if tr else None]
    prefer_large_pages([array for stream in drawn if stream is not None for array in stream.arrays])
    return streams, transfer_batches(streams, runtime, tr=tr)


def held_out_pairs(store: Store, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the TI pairs that are trained on, and of those that only score.

    A tenth of the pairs is held out, in whole groups and at most HELD_OUT; where that would be
    fewer than MIN_HELD_OUT, a fifth. Where no group is that small, all pairs are trained on, and
    some of them score, too.
    """
    count = store.count("ti")
    groups, of_group = np.unique(np.array(store.strings("ti/group")), return_inverse=True)
    order = np.random.default_rng([seed, 7]).permutation(len(groups)).tolist()
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


def passes_of_epoch(config: Config, streams: Streams) -> float:
    """How often an epoch passes the target images, at least 1."""
    return max(steps_of_epoch(config, streams) * streams.batch_size / streams.tr.count, 1.0)


def steps_of_epoch(config: Config, streams: Streams) -> int:
    """Steps in which the larger stream is passed once, and at least ``training.min_steps``.

    A method that draws no TI pairs has one stream, and its batches are no larger than that.
    """
    pairs = round(streams.ti.count / config.training.ti_fraction) if streams.ti else 0
    largest = max(streams.tr.count, pairs)
    return max(largest // streams.batch_size, config.training.min_steps)


def plan_of(
    config: Config,  # settings that both share
    streams: Streams,  # their batches
    *,
    title: str,  # shown in front of messages
    epochs: int,  # number of epochs
    weights: Mapping[str, float],  # weights of the loss terms
    stage: Stage,  # stage that trains; its folder is written to
    kinds: int,  # kinds of images in a step, of TI pairs and TR target images: 1 or 2
    ti: bool,  # whether label-free scores on TI pairs may choose the epoch
    # The score that ``training.select=auto`` stands for; None: the last epoch is kept.
    auto: str | None = None,
) -> Plan:
    """The plan of bridge or transfer."""
    return Plan(
        title=title, seed=config.seed, epochs=epochs, steps=steps_of_epoch(config, streams),
        weights=weights, folder=stage.folder, select=selector(config, ti=ti, auto=auto),
        images=kinds * streams.batch_size, clip_norm=config.training.clip_norm,
        checkpoint_seconds=config.runtime.checkpoint_seconds, patience=config.training.patience,
        made_for=stage.digest,
    )  # fmt: skip


def transfer_batches(
    streams: Streams, runtime: Runtime, *, tr: bool = True
) -> Callable[[int, int], Batch]:
    """(epoch, step) to a batch of what an objective looks at.

    Of pairs it is ``ti_target`` and ``ti_rows``, and ``ti_rgb`` where the partners are read; with
    ``tr`` also ``tr_target`` and ``tr_rows``, and with two views ``tr_target_2``.
    """

    def batches(epoch: int, step: int) -> Batch:
        batch: Batch = {}
        if streams.ti is not None:
            pairs, ti_rows = streams.ti.batch(epoch, step)
            batch |= {f"ti_{name}": images for name, images in pairs.items()}
            batch["ti_rows"] = runtime.tensor(ti_rows)
            batch["rows"] = torch.from_numpy(ti_rows)
            if streams.shuffle_pairs:  # rows stand for the partners' features
                for name in {"ti_rgb", "ti_rows"} & set(batch):
                    batch[name] = batch[name].roll(1, dims=0)
        if tr:
            targets, tr_rows = streams.tr.batch(epoch, step)
            batch |= {f"tr_{name}": images for name, images in targets.items()}
            batch["tr_rows"] = runtime.tensor(tr_rows)
            batch["rows"] = torch.from_numpy(tr_rows)
        return batch

    return batches


def selector(config: Config, *, ti: bool, auto: str | None = None) -> str | None:
    """The score that chooses the epoch, ``auto`` where the settings say so; None: the last is kept.

    ``ti``: whether the scores on TI pairs are known.
    """
    chosen = auto if config.training.select == "auto" else config.training.select
    return None if chosen == "last" or (not ti and chosen and chosen[:3] == "ti_") else chosen


def remember(folder: Path, epoch: int, logits: Tensor) -> None:
    """Write the classes predicted after an epoch as row ``epoch``, from 0; later rows go.

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
