"""Resumable state: written whole or not at all, loaded without running code."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sfkt_cli.console import say, warn
from sfkt_cli.errors import first_line
from sfkt_cli.files import read_bytes, replacing
from sfkt_cli.machine import full_memory

if TYPE_CHECKING:
    from sfkt_cli.training.loop import Training

STATE = "state.pt"
PREVIOUS = "previous.pt"


def save(training: Training) -> None:
    """Write all that a resumed training needs into its stage's folder."""
    state = {
        "objective": training.objective.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "best": training.best,
        "progress": vars(training.progress),
        "environment": training.runtime.environment(training.objective),
        "made_for": training.stage.digest,
    }
    save_state(training.checkpoint, state)


def resume(training: Training) -> None:
    """Continue from the newest state that fits; without one, nothing changes."""
    if not any(training.checkpoint.glob("*.pt")):
        return
    title, fresh = training.title, snapshot(training.objective)
    momenta = copy.deepcopy(training.optimizer.state_dict())
    for state in load_states(training.checkpoint, training.runtime.device, training.stage.digest):
        try:
            _take_over(training, state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if full_memory(type(error).__name__, str(error)):
                raise
            training.objective.load_state_dict(fresh)
            training.optimizer.load_state_dict(momenta)
            warn(f"{title}: a state of another version is skipped ({first_line(error)})")
        else:
            at = training.progress
            if at.epoch < training.epochs:
                say(f"{title}: continues at epoch {at.epoch + 1}, step {at.step + 1}")
            _compare_environments(training, state.get("environment", {}))
            return
    warn(
        f"{title}: no state in {training.checkpoint} can be used, the training starts from scratch"
    )


def _take_over(training: Training, state: dict[str, Any]) -> None:
    progress, best = replace(training.progress, **state["progress"]), state["best"]
    now, then = ({k: v.shape for k, v in weights.items()} for weights in (training.best, best))
    if now != then:
        raise ValueError("its best weights are those of another network")
    training.objective.load_state_dict(state["objective"])
    training.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    training.progress, training.best = progress, best


def _compare_environments(training: Training, before: Mapping[str, str | int]) -> None:
    """Warn if a training continues in an environment that rounds differently."""
    runtime = training.runtime
    changes = [
        f"{name} {before[name]} -> {value}"
        for name, value in runtime.environment(training.objective).items()
        if before.get(name, value) != value
    ]
    if changes:
        other = before.get("processes", runtime.world) != runtime.world
        effect = "batches and their statistics differ" if other else "they agree to rounding"
        warn(
            f"{training.title}: the state was saved elsewhere ({', '.join(changes)}): results are "
            f"not the same bit for bit; {effect}"
        )


def snapshot(module: nn.Module) -> dict[str, Any]:
    """A copy of a module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state; the one before is kept beside it until the next call."""
    folder.mkdir(exist_ok=True)
    current = folder / STATE
    # Made in memory: on a full disk torch raises a RuntimeError of its own, Python an OSError.
    written = io.BytesIO()
    torch.save(state, written)
    with replacing(current) as partial:
        partial.write_bytes(written.getbuffer())
        if current.exists():
            current.replace(folder / PREVIOUS)


def load_states(folder: Path, device: torch.device, made_for: str) -> Iterator[dict[str, Any]]:
    """The states from which a training can continue, the newest first.

    A warning names a state that is damaged or belongs to other settings or inputs.

    Raises:
        OSError: The file system refuses a state; also raises what a full memory does.
    """
    for name in (STATE, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        content = read_bytes(path)  # what the file system refuses may be whole
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                damaged = archive.testzip()  # torch would load a flipped bit without a word
            if damaged is not None:
                raise ValueError(f"{damaged} does not match its checksum")
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location=device, weights_only=True
            )
            if state.get("made_for") != made_for:
                raise ValueError("it belongs to other settings or inputs")
        except Exception as error:  # damaged archives raise almost anything, such as zlib.error
            if full_memory(type(error).__name__, str(error)):
                raise
            warn(f"checkpoint {path} cannot be used ({first_line(error)}): it is skipped")
        else:
            yield state
