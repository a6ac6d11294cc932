"""A dry run of a training: how long its steps and epochs take, and how large everything gets."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfkt_cli.training.batch_size import TRANSIENT, kept_bytes
from sfkt_cli.training.runtime import Trial, seed_all

if TYPE_CHECKING:
    from sfkt_cli.training.loop import Training

FEW_ROWS = 4  # rows of the batch with which a dry run warms up
PATIENCE_S = 4.0  # a step with all rows is timed where it takes no longer than this on a CPU


class Tried(Exception):
    """A dry run came to the training and measured it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial


def try_out(training: Training, trial: Trial) -> None:
    """Time what an epoch does beside its steps, and one step after a smaller one to warm up.

    Where a step with all rows would take long on a CPU, the timed one has few rows, too.
    """
    runtime, objective = training.runtime, training.objective
    skipped_s, began = trial.skipped_s, time.monotonic()
    objective.begin_epoch(0)
    objective.eval()
    with torch.inference_mode():
        training.scores(0)
    runtime.wait()
    trial.epoch_s = time.monotonic() - began + trial.skipped_s - skipped_s
    trial.skipped_s = skipped_s

    batch = training.batches(0, 0)
    rows = len(next(iter(batch.values())))
    few = min(rows, FEW_ROWS)
    objective.train()
    seed_all(training.stage.config.seed, training.title, 0)

    def step(count: int) -> float:
        began = time.monotonic()
        training.descend(objective, {name: values[:count] for name, values in batch.items()})
        runtime.wait()
        return time.monotonic() - began

    took: list[float] = []
    kept = kept_bytes(lambda: took.append(step(few)))
    trial.scaled = runtime.device.type == "cpu" and took[0] * rows / few > PATIENCE_S
    tried = few if trial.scaled else rows
    trial.step_s = step(tried) * rows / tried
    trial.peak_memory_mb = runtime.peak_memory_mb()
    trial.peak_memory_mb += (rows / tried - 1) * kept * TRANSIENT / 2**20

    trial.epochs, trial.steps, trial.images = training.epochs, training.steps, training.images
    parameters = list(objective.parameters())
    trial.parameters = sum(p.numel() for p in parameters)
    trial.trained = sum(p.numel() for p in parameters if p.requires_grad)
    momenta = [value for state in training.optimizer.state.values() for value in state.values()]
    trial.model_bytes = _bytes(training.keep.state_dict().values())
    trial.state_bytes = 2 * (  # two states are kept
        _bytes(objective.state_dict().values()) + _bytes(momenta) + trial.model_bytes
    )


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
