"""A few batches tried before a long run: what a training would take, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from sfkt_cli.training.loop import Batch, Fitted, Plan, fit
from sfkt_cli.training.runtime import Runtime

STEPS = 3
"""Of each of two short epochs, the second of which is timed."""


@dataclass(frozen=True)
class Trial:
    """What a few batches told.

    Attributes:
        epochs: Of the training that was not done.
        steps: Of each of them.
        images: That a step sees.
        trained: Parameters that are trained.
        parameters: All, the frozen ones too.
        step_s: Seconds of a step.
        epoch_s: Seconds of an epoch beside its steps: scores, pseudo-labels.
        model_bytes: Of the weights that are kept.
        state_bytes: Of the resumable states, while it runs.
        peak_memory_mb: So far.
    """

    epochs: int
    steps: int
    images: int
    trained: int
    parameters: int
    step_s: float
    epoch_s: float
    model_bytes: int
    state_bytes: int
    peak_memory_mb: float

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return self.epochs * (self.steps * self.step_s + self.epoch_s)


class Tried(Exception):
    """A dry run came to the training and tried it."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(f"{trial.epochs} epochs of {trial.steps} steps")
        self.trial = trial


def train(
    plan: Plan,
    objective: nn.Module,
    batches: Callable[[int, int], Batch],
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    *,
    schedule: Callable[[float], float],
    keep: nn.Module,
    begin_epoch: Callable[[int], None] = lambda epoch: None,
    scores: Callable[[int], dict[str, float]] = lambda epoch: {},
    dry: bool = False,
) -> Fitted:
    """Call :func:`fit`; in a dry run with two short epochs, the second of which is timed.

    Raises:
        Tried: In a dry run, always.
    """
    if not dry:
        return fit(
            plan, objective, batches, optimizer, runtime, schedule=schedule, keep=keep,
            begin_epoch=begin_epoch, scores=scores,
        )  # fmt: skip
    beside = 0.0

    def begin_last(epoch: int) -> None:
        nonlocal beside
        began = time.monotonic()
        begin_epoch(epoch * (plan.epochs - 1))
        runtime.wait()
        beside = time.monotonic() - began

    def timed_scores(epoch: int) -> dict[str, float]:
        nonlocal beside
        began = time.monotonic()
        found = scores(epoch)
        beside += time.monotonic() - began
        return found

    short = replace(plan, epochs=2, steps=STEPS, checkpoint_seconds=0.0, patience=0, quiet=True)
    fitted = fit(
        short, objective, batches, optimizer, runtime, schedule=schedule, keep=keep,
        begin_epoch=begin_last, scores=timed_scores,
    )  # fmt: skip
    parameters = list(objective.parameters())
    raise Tried(
        Trial(
            epochs=plan.epochs,
            steps=plan.steps,
            images=plan.images,
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            parameters=sum(p.numel() for p in parameters),
            step_s=(fitted.history[1]["seconds"] - fitted.history[0]["seconds"]) / STEPS,
            epoch_s=beside,
            model_bytes=sum(v.numel() * v.element_size() for v in keep.state_dict().values()),
            state_bytes=sum(p.stat().st_size for p in plan.folder.glob("checkpoint/*.pt")),
            peak_memory_mb=runtime.peak_memory_mb(),
        )
    )
