"""Step time of bridge and transfer over that of the bare networks on tensors in memory.

Both alternate in one process: some bare steps, then as many of the real stage's, through the real
training loop, batches from the store on disk, augmentation and encoding included. The bare step is
forward, backward and optimiser of networks of the same shape, in the same precision, with the
cheapest loss there is. The bridge is measured against networks as they are loaded, and as it holds
them itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sfkt_cli.models.classifier import freeze
from sfkt_cli.models.frozen import fold_batch_norms
from sfkt_cli.models.saving import load_model
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages import bridge, transfer
from sfkt_cli.training.loop import Training
from sfkt_cli.training.recipes import classifier_optimizer
from sfkt_cli.training.runtime import make_runtime
from tests.benchmarks.made import make_run, settings
from tests.benchmarks.measuring import Row, ratio_row, seconds, time_row

BATCH, TARGET = 32, "<= 1.08"


def run(quick: bool) -> list[Row]:
    """Both stages at 64 and, unless quick, 128 pixels, resnet18, batches of 32."""
    steps, rounds = (1, 5) if quick else (5, 7)
    rows = []
    for size in (64,) if quick else (64, 128):
        config = settings(
            size,
            source={"backbone": "resnet18"},
            runtime={"batch_size": BATCH, "gpus": 0, "checkpoint_seconds": 1e9},
        )
        with tempfile.TemporaryDirectory(prefix="sfkt-bench-") as name:
            for stage, networks, measure, target in (
                ("transfer", "bare networks", transfer_steps, TARGET),
                ("bridge", "bare networks", bridge_steps, TARGET),
                ("bridge", "bare networks, folded", partial(bridge_steps, folded=True), ""),
            ):
                folder = Path(tempfile.mkdtemp(dir=name)) / "run"
                made = make_run(folder, config, pairs=10 * BATCH, targets=4 * BATCH)
                ours, bare = measure(config, made, steps, rounds)
                rows += [
                    time_row(f"{stage} step, {size} px", [t / steps for t in ours]),
                    time_row(f"{stage}: {networks}, {size} px", [t / steps for t in bare]),
                    ratio_row(f"{stage} step / {networks}, {size} px", ours, bare, target),
                ]
    return rows


def bridge_steps(
    config: Config, run: Run, steps: int, rounds: int, folded: bool = False
) -> tuple[list[float], list[float]]:
    """Seconds of so many steps of the bridge, and of its bare networks, for each round.

    Folded: the bare source model bears no batch norms and is held in the precision of training, as
    the stage holds its own.
    """
    source = freeze(load_model(run.path("source")).module)
    if folded:
        source = fold_batch_norms(source, config.image_size)
    card = load_model(run.path("bridge")).card
    runtime = make_runtime(config.runtime)
    translator = runtime.place(make_translator(**card.architecture)).train()
    runtime.place(source)
    if folded:
        runtime.cast_frozen(source, translator)
    optimizer = torch.optim.Adam(
        translator.parameters(), config.bridge.learning_rate, betas=(0.9, 0.99), fused=True
    )
    channels = card.architecture["channels"]
    encoded = torch.cat([pictures(channels, config), pictures(channels, config)])
    rgb = pictures(3, config)

    def bare() -> None:
        with runtime.autocast(translator):
            with torch.no_grad():
                partners = source.features(rgb)  # type: ignore[operator]
            features, logits = source(translator(encoded))
        loss = (features[: len(rgb)] - partners).float().square().mean()
        _step(loss + logits[len(rgb) :].float().square().mean(), optimizer)

    anew = Run(run.folder, force=True)
    return in_turn(capture(lambda: bridge.bridge(config, anew)), bare, steps, rounds)


def transfer_steps(
    config: Config, run: Run, steps: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Likewise for TGKT."""
    runtime = make_runtime(config.runtime)
    saved = load_model(run.path("source"))
    student: Any = runtime.place(saved.module).train()
    optimizer = classifier_optimizer(student, 0.01, 1.0, 1e-3)
    ti, tr = pictures(3, config), pictures(3, config)

    def bare() -> None:
        with runtime.autocast(student):
            _, logits = student(tr)
            features = student.features(ti)
        _step(logits.float().square().mean() + features.float().square().mean(), optimizer)

    return in_turn(capture(lambda: transfer.transfer(config, run)), bare, steps, rounds)


def capture(stage: Callable[[], None]) -> Training:
    """What a stage would train, before it does."""

    def note(training: Training) -> None:
        raise _Captured(training)

    with mock.patch.object(Training, "fit", note):
        try:
            stage()
        except _Captured as captured:
            training: Training = captured.args[0]
            return training
    raise AssertionError("the stage did not train")


def elsewhere(training: Training, folder: str, **more: Any) -> Training:
    """The same training in another folder, without scores."""
    stage = replace(training.stage, folder=Path(folder))
    return replace(training, stage=stage, select=None, scores=lambda epoch: {}, **more)


def in_turn(
    training: Training, bare: Callable[[], None], steps: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of ``steps`` steps of the loop and of the bare networks, in each round.

    The loop asks for the learning rate once a step: these calls are the clock. The first step of
    an epoch, whose batch nobody made ahead, and the first epoch do not count.
    """
    marks: list[float] = []
    bare_times: list[float] = []

    def repeated() -> None:
        for _ in range(steps):
            bare()

    begin_own = training.objective.begin_epoch

    def begin_epoch(epoch: int) -> None:
        begin_own(epoch)
        bare()
        bare_times.append(seconds(repeated))

    def schedule(progress: float) -> float:
        marks.append(time.perf_counter())
        return training.schedule(progress)

    training.objective.begin_epoch = begin_epoch  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        elsewhere(training, folder, epochs=rounds + 1, steps=steps + 2, schedule=schedule).fit()
    epochs = [marks[first : first + steps + 2] for first in range(0, len(marks), steps + 2)]
    ours = [epoch[-1] - epoch[1] for epoch in epochs]
    return ours[1:], bare_times[1:]


def pictures(channels: int, config: Config) -> Tensor:
    """Noise in [0, 1], channels last, as the networks get it."""
    size = config.image_size
    images = torch.rand(BATCH, channels, size, size)
    return images.contiguous(memory_format=torch.channels_last)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


class _Captured(Exception):
    """The stage came as far as training."""
