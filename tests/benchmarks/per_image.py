"""Transfer against a loader as research scripts have it.

There, every image is a PNG file of its own, decoded by Pillow, augmented and encoded by itself in a
worker process, one process for TI and one for TR images, and collated into batches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfkt_cli import losses
from sfkt_cli.data.images import Encoding, choose_encoding, encode
from sfkt_cli.data.store import open_store
from sfkt_cli.models.saving import load_model
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages import transfer
from sfkt_cli.training.recipes import classifier_optimizer
from tests.benchmarks.made import CLASSES, make_run, settings
from tests.benchmarks.measuring import Row, alternate, ratio_row
from tests.benchmarks.step_time import capture, elsewhere

BATCH, WORKERS, SIZE, REACH = 64, 2, 48, 4


class PerImage(Dataset[tuple[Tensor, int]]):
    """One encoded depth image at a time, from a 16-bit PNG, shifted and mirrored by itself."""

    def __init__(self, files: list[Path], encoding: Encoding) -> None:
        self._files, self._encoding = files, encoding

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        random = np.random.default_rng(number)
        with Image.open(self._files[number]) as image:
            depth = np.asarray(image, np.int32)
        down, right = random.integers(-REACH, REACH + 1, 2)
        depth = np.pad(depth, REACH, mode="edge")[REACH + down :, REACH + right :][:SIZE, :SIZE]
        depth = depth[:, ::-1] if random.random() < 0.5 else depth
        return encode(torch.from_numpy(depth.copy())[None], self._encoding)[0], number


def run(quick: bool) -> list[Row]:
    """Images a second of one epoch of TGKT, over one with the loader above; the small network."""
    count, rounds = (640, 5) if quick else (3200, 7)
    config = settings(SIZE)
    with tempfile.TemporaryDirectory(prefix="sfkt-bench-") as name:
        made = make_run(Path(name) / "run", config, pairs=count, targets=count)
        ours = _ours(config, made, count // BATCH)
        plain = _plain(config, made, Path(name))
        first, second = alternate(ours, plain, rounds)
    images = 2 * (count // BATCH) * BATCH
    return [
        Row("transfer, this program", images / median(first), "images/s"),
        Row("transfer, per-image loader", images / median(second), "images/s"),
        ratio_row("transfer / per-image loader", second, first, ">= 2"),
    ]


def _ours(config: Config, made: Run, steps: int) -> Callable[[], None]:
    """An epoch of the stage's own training."""
    training = capture(lambda: transfer.transfer(config, made))
    training.objective.begin_epoch = lambda epoch: None  # type: ignore[method-assign]

    def epoch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            elsewhere(training, folder, epochs=1, steps=steps).fit()

    return epoch


def _plain(config: Config, made: Run, folder: Path) -> Callable[[], None]:
    """An epoch over files, with the same networks, terms and optimiser."""
    store = open_store(made.transfer_store)
    encoding = choose_encoding(config.encoding, store.modality, store["target/target"][:256])
    loaders = []
    for group in ("ti", "target"):
        (folder / group).mkdir()
        files = [folder / group / f"{row}.png" for row in range(store.count(group))]
        for file, image in zip(files, store[f"{group}/target"], strict=True):
            Image.fromarray(np.asarray(image)).save(file)
        loaders.append(
            DataLoader(
                PerImage(files, encoding), BATCH, shuffle=True, num_workers=WORKERS // 2,
                drop_last=True,
            )
        )  # fmt: skip
    student: Any = load_model(made.path("source")).module.train()
    optimizer = classifier_optimizer(student, 0.01, 1.0, 1e-3)
    teacher = torch.full((store.count("target"), len(CLASSES)), 1 / len(CLASSES))
    partners = torch.zeros(store.count("ti"), config.source.bottleneck)

    def epoch() -> None:
        for (ti, ti_rows), (tr, tr_rows) in zip(*loaders, strict=True):
            _, logits = student(tr)
            features = student.features(ti)
            loss = losses.distillation(logits, teacher[tr_rows])
            loss = loss + losses.feature_matching(features, partners[ti_rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return epoch
