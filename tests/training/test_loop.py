"""The training loop: an interruption leaves no trace, and what goes wrong is told."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfkt_cli.console import duration
from sfkt_cli.errors import Interrupted, RunError
from sfkt_cli.settings.config import build
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.checkpoint import PREVIOUS, STATE, load_states, save_state
from sfkt_cli.training.loop import Batch, Objective, Progress, Training
from sfkt_cli.training.predicting import FEW, predict_rows
from sfkt_cli.training.recipes import cosine, inverse_decay
from sfkt_cli.training.runtime import DryRunFigures, Runtime, seed_all
from sfkt_cli.training.trial import Tried
from tests.training.worlds import Plain

EPOCHS, STEPS = 3, 4
RUNTIME = Runtime(torch.device("cpu"), torch.float32)
State = dict[str, Tensor]


class Regression(Objective):
    """Regression with batch norm, dropout, noise and a target that is refreshed each epoch."""

    goal: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2)
        )
        self.register_buffer("goal", torch.zeros(2))
        self.weights = {"small": 0.1}

    def begin_epoch(self, epoch: int) -> None:
        self.goal.copy_(torch.rand(2) + epoch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        said = self.network(batch["images"] + 0.1 * torch.randn_like(batch["images"]))
        return {
            "near": (said - self.goal).square().mean(),
            "small": said.abs().mean(),
        }


def batches(epoch: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    rows = torch.randint(1000, (6,), generator=generator)
    return {"images": torch.rand(6, 5, generator=generator), "rows": rows}


def make_training(
    folder: Path,
    objective: Regression | None = None,
    *,
    learning_rate: float = 0.05,
    settings: dict[str, Any] | None = None,  # of ``training``
    checkpoint_seconds: float = 1e9,
    inputs: dict[str, str] | None = None,
    **more: Any,
) -> Training:
    folder.mkdir(parents=True, exist_ok=True)
    objective = objective or Regression()
    runtime = {"checkpoint_seconds": checkpoint_seconds}
    config = build({"seed": 3, "training": settings or {}, "runtime": runtime})
    optimizer = torch.optim.SGD(
        objective.parameters(), lr=learning_rate, momentum=0.9, nesterov=True
    )
    usual: dict[str, Any] = {
        "batches": batches, "runtime": RUNTIME, "epochs": EPOCHS, "steps": STEPS,
        "schedule": cosine, "keep": objective.network,
    }  # fmt: skip
    stage = Stage("test", folder, config, inputs or {})
    return Training("test", stage, objective, optimizer=optimizer, **usual | more)


def train(
    folder: Path, objective: Regression | None = None, **more: Any
) -> tuple[Regression, Progress]:
    training = make_training(folder, objective, **more)
    fitted = training.fit()
    assert isinstance(training.objective, Regression)
    return training.objective, fitted


def test_a_dry_run_takes_two_steps_and_writes_nothing(tmp_path: Path) -> None:
    objective, figures, steps = Regression(), DryRunFigures(), list[int]()
    objective.register_forward_hook(lambda *given: steps.append(len(given[1][0]["images"])))
    with pytest.raises(Tried):
        train(
            tmp_path, objective, runtime=replace(RUNTIME, dry_run=figures),
            scores=lambda epoch: {"score": 1.0},
        )  # fmt: skip
    assert steps == [4, 6]
    assert (figures.epochs, figures.steps) == (EPOCHS, STEPS)
    assert figures.seconds > EPOCHS * STEPS * figures.step_s
    assert figures.state_bytes > 2 * figures.model_bytes > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_looks_at_a_few_rows_for_all() -> None:
    looked_at = []

    def model(images: Tensor) -> tuple[Tensor, Tensor]:
        looked_at.append(len(images))
        return images, images[:, :2]

    figures = DryRunFigures()
    images = np.arange(100 * 3, dtype=np.float32).reshape(100, 3)
    view = Plain(replace(RUNTIME, dry_run=figures), model)  # type: ignore[arg-type]
    features, logits = predict_rows(images, view)
    assert sum(looked_at) == 2 * FEW
    assert (features.shape, logits.shape) == ((100, 3), (100, 2))
    assert figures.skipped_s > 0


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Killed(Regression):
    """Sends a real signal to its own process in one step."""

    def __init__(self, at: tuple[int, int], number: signal.Signals) -> None:
        super().__init__()
        self._at, self._number, self._seen = at, number, 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if self._seen == self._at[0] * STEPS + self._at[1]:
            os.kill(os.getpid(), self._number)
        self._seen += 1
        return super().forward(batch)


@pytest.mark.parametrize("at", [(0, 0), (0, 3), (1, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, at: tuple[int, int], number: signal.Signals
) -> None:
    whole, fitted = train(tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="continues"):
        train(tmp_path / "parts", Killed(at, number))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed, again = train(tmp_path / "parts")
    assert same(whole.state_dict(), resumed.state_dict())
    assert without_time(fitted.history) == without_time(again.history)
    assert fitted.best_epoch == again.best_epoch
    assert len(fitted.history) == EPOCHS


class OneTerm(Killed):
    """Has a term that is 1 in each step."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {**super().forward(batch), "one": torch.ones(())}


def test_means_of_a_resumed_epoch_are_over_the_steps_that_were_done(tmp_path: Path) -> None:
    """Another number of processes makes other batches, and other steps of an epoch."""
    with pytest.raises(Interrupted):
        train(tmp_path, OneTerm((0, 2), signal.SIGTERM))
    _, fitted = train(tmp_path, OneTerm((99, 0), signal.SIGTERM), steps=2)
    assert [row["one"] for row in fitted.history] == [1.0] * EPOCHS


def test_the_time_left_counts_the_steps_since_a_run_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    clock = SimpleNamespace(monotonic=lambda: 10.0 * len(steps))  # ten seconds a step
    monkeypatch.setattr("sfkt_cli.training.loop.time", clock)
    with pytest.raises(Interrupted):
        train(tmp_path, Killed((0, 2), signal.SIGTERM))
    capsys.readouterr()
    train(tmp_path, Crashed(1000, steps))
    told = re.findall(r"images/s  (.+) left", capsys.readouterr().err)
    assert told == [duration(80), duration(40)]


class Crashed(Regression):
    """Dies without a word in one step, and counts all steps that were begun."""

    def __init__(self, after: int, steps: list[int]) -> None:
        super().__init__()
        self._left, self._steps = after, steps

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self._steps.append(len(self._steps))
        return super().forward(batch)


@pytest.mark.parametrize("interval", [0, 2, 5])
def test_no_more_than_one_interval_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    steps: list[int] = []
    clock = SimpleNamespace(monotonic=lambda: float(len(steps)))  # a second a step
    monkeypatch.setattr("sfkt_cli.training.loop.time", clock)
    whole, _ = train(tmp_path / "whole")
    for after in range(1, EPOCHS * STEPS):
        steps.clear()
        folder = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            train(folder, Crashed(after, steps), checkpoint_seconds=interval)
        resumed, _ = train(folder, Crashed(1000, steps), checkpoint_seconds=interval)
        assert same(whole.state_dict(), resumed.state_dict())
        assert len(steps) - EPOCHS * STEPS <= interval


def test_a_run_may_be_stopped_many_times(tmp_path: Path) -> None:
    whole, fitted = train(tmp_path / "whole")
    for at in [(0, 1), (0, 0), (0, 3), (0, 2)]:
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", Killed(at, signal.SIGTERM))
    resumed, again = train(tmp_path / "parts")
    assert same(whole.state_dict(), resumed.state_dict())
    assert without_time(fitted.history) == without_time(again.history)


def test_a_signal_while_scores_are_taken_is_not_lost(tmp_path: Path) -> None:
    def scores(epoch: int) -> dict[str, float]:
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
        return {}

    done: list[int] = []
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", scores=scores, epochs=1)
    resumed, fitted = train(tmp_path / "parts", scores=scores, epochs=1)
    whole, _ = train(tmp_path / "whole", epochs=1)
    assert same(whole.state_dict(), resumed.state_dict())
    assert len(fitted.history) == 1


@pytest.mark.parametrize("step", range(2 * STEPS))
def test_a_run_that_died_goes_on_from_its_last_state(tmp_path: Path, step: int) -> None:
    """No signal to catch: power cut, or killed by force."""

    def until(epoch: int, number: int) -> Batch:
        if epoch * STEPS + number == step:
            raise KeyboardInterrupt
        return batches(epoch, number)

    whole, fitted = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", batches=until, checkpoint_seconds=0.0)
    resumed, again = train(tmp_path / "parts", checkpoint_seconds=0.0)
    assert same(whole.state_dict(), resumed.state_dict())
    assert without_time(fitted.history) == without_time(again.history)


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    _, fitted = train(tmp_path)
    last = [(epoch * STEPS + STEPS - 1) / (EPOCHS * STEPS) for epoch in range(EPOCHS)]
    assert [row["learning_rate"] for row in fitted.history] == [0.05 * cosine(p) for p in last]


def test_the_learning_rate_that_is_told_is_that_of_the_head(tmp_path: Path) -> None:
    objective = Regression()
    groups = [{"params": objective.network[0].parameters(), "lr": 0.005},
              {"params": objective.network[4].parameters(), "lr": 0.05}]  # fmt: skip
    training = make_training(tmp_path, objective)
    training.optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = [row["learning_rate"] for row in training.fit().history]
    assert rates[0] == 0.05 * cosine((STEPS - 1) / (EPOCHS * STEPS))


@pytest.mark.parametrize("schedule", [cosine, inverse_decay])
def test_schedules_stay_in_range(schedule: Callable[[float], float]) -> None:
    factors = [schedule(number / 200) for number in range(200)]
    assert min(factors) > 0
    assert max(factors) <= 1
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert factors[-1] < 0.2


@pytest.mark.parametrize(("values", "best"), [([0.2, 0.9, 0.5], 1), ([0.2, 0.2, 0.2], 0)])
def test_the_weights_of_the_best_score_are_kept(
    tmp_path: Path, values: list[float], best: int
) -> None:
    objective, seen = Regression(), list[State]()

    def scores(epoch: int) -> dict[str, float]:
        assert not objective.training
        assert torch.is_inference_mode_enabled()
        seen.append(copy.deepcopy(objective.network.state_dict()))
        return {"agreement": values[epoch]}

    _, fitted = train(tmp_path, objective, scores=scores, select="agreement")
    assert fitted.best_epoch == best
    assert not same(seen[1], seen[2])
    assert same(objective.network.state_dict(), seen[best])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_training(tmp_path: Path, value: float) -> None:
    """The weights and the loss of a student may be finite while its outputs are not."""

    def scores(epoch: int) -> dict[str, float]:
        return {"agreement": 0.5, "density": 0.5 if epoch < EPOCHS - 1 else value}

    with pytest.raises(RunError, match=f"density {value}.* in epoch {EPOCHS}"):
        train(tmp_path, Regression(), scores=scores, select="agreement")
    assert not (tmp_path / "done.json").exists()


def test_the_best_weights_survive_an_interruption(tmp_path: Path) -> None:
    def train_on(folder: str, objective: Regression | None = None) -> tuple[Regression, Progress]:
        return train(tmp_path / folder, objective, scores=scores, select="agreement")

    def scores(epoch: int) -> dict[str, float]:
        return {"agreement": 0.9 - 0.4 * epoch}

    whole, _ = train_on("whole")
    with pytest.raises(Interrupted):
        train_on("parts", Killed((2, 1), signal.SIGTERM))
    resumed, fitted = train_on("parts")
    assert fitted.best_epoch == 0
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("at", [(0, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    tmp_path: Path, at: tuple[int, int], value: float
) -> None:
    def poisoned(epoch: int, step: int) -> Batch:
        batch = batches(epoch, step)
        if (epoch, step) == at:
            batch["images"][2, 1] = value
        return batch

    with pytest.raises(RunError) as caught:
        train(tmp_path, batches=poisoned)
    message = str(caught.value)
    assert f"epoch {at[0] + 1}, step {at[1] + 1} " in message
    assert str(batches(*at)["rows"].tolist()) in message
    assert "near" in message
    assert "Start again with a lower learning rate" in message
    assert str(tmp_path) not in message  # no state was saved


def test_of_many_rows_with_an_infinite_loss_a_few_are_named(tmp_path: Path) -> None:
    def poisoned(epoch: int, step: int) -> Batch:
        return {"images": torch.full((64, 5), math.inf), "rows": torch.arange(64)}

    with pytest.raises(RunError, match=r"batch: \[0, 1, 2, 3, 4, 5, 6, 7\] and 56 more\. Start"):
        train(tmp_path, batches=poisoned)


def test_the_rows_of_pairs_are_named_beside_those_of_target_images(tmp_path: Path) -> None:
    def poisoned(epoch: int, step: int) -> Batch:
        rows = {"ti_rows": torch.tensor([5, 3]), "tr_rows": torch.tensor([8, 9])}
        return {"images": torch.full((2, 5), math.inf), **rows}

    with pytest.raises(RunError, match=r"rows of the batch: ti \[5, 3\], tr \[8, 9\]\. Start"):
        train(tmp_path, batches=poisoned)


class BrokenGradient(torch.autograd.Function):
    """Identity whose gradient is no number."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


class BreaksItsWeights(Regression):
    """All its losses are finite; in one step its gradients are not."""

    def __init__(self, at: tuple[int, int]) -> None:
        super().__init__()
        self._left = at[0] * STEPS + at[1]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(batch)
        if self._left == 0:
            terms["near"] = BrokenGradient.apply(terms["near"])
        self._left -= 1
        return terms


@pytest.mark.parametrize("at", [(0, 1), (1, 3), (EPOCHS - 1, STEPS - 1)])
def test_weights_that_are_not_finite_are_neither_saved_nor_kept(
    tmp_path: Path, at: tuple[int, int]
) -> None:
    whole, _ = train(tmp_path / "whole")
    folder = tmp_path / "parts"
    where = f"weights are not finite in epoch {at[0] + 1}, step {at[1] + 1} "
    with pytest.raises(RunError, match=where) as caught:
        train(folder, BreaksItsWeights(at), checkpoint_seconds=0.0)
    assert f"continues from the last good state, in {folder / 'checkpoint'};" in str(caught.value)
    assert "--force" in str(caught.value)
    resumed, _ = train(folder)
    assert same(whole.state_dict(), resumed.state_dict())


def test_each_step_of_the_optimiser_is_followed_by_after_step(tmp_path: Path) -> None:
    objective, weights = Regression(), list[Tensor]()
    first = next(objective.parameters())
    objective.after_step = lambda: weights.append(first.detach().clone())  # type: ignore[method-assign]
    train(tmp_path, objective)
    assert len(weights) == EPOCHS * STEPS
    assert not any(torch.equal(weight, later) for weight, later in pairwise(weights))
    assert torch.equal(weights[-1], first)


def test_metrics_have_one_row_an_epoch(tmp_path: Path) -> None:
    _, fitted = train(tmp_path, scores=lambda epoch: {"agreement": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == fitted.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    names = {"epoch", "seconds", "learning_rate", "near", "small", "agreement"}
    assert all(set(row) == names for row in rows)
    assert rows[0]["seconds"] <= rows[1]["seconds"] <= rows[2]["seconds"]
    objective = Regression()
    seed_all(3, "test", 0)
    objective.begin_epoch(0)
    terms = []
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(STEPS):
        seed_all(3, "test", 0, step)
        optimizer.param_groups[0]["lr"] = 0.05 * cosine(step / (EPOCHS * STEPS))
        found = objective.train()(batches(0, step))
        optimizer.zero_grad()
        torch.autograd.backward(found["near"] + 0.1 * found["small"])
        optimizer.step()
        terms.append(float(found["near"].detach()))
    assert rows[0]["near"] == pytest.approx(sum(terms) / STEPS, rel=1e-6)


def test_the_gradient_norm_is_clipped(tmp_path: Path) -> None:
    def large(epoch: int, step: int) -> Batch:
        return {"images": 1e3 * batches(epoch, step)["images"]}

    objective, _ = train(
        tmp_path, batches=large, settings={"clip_norm": 1e-3}, learning_rate=1.0, epochs=1, steps=1
    )
    before, after = Regression().state_dict(), objective.state_dict()
    names = [name for name, _ in objective.named_parameters()]
    moved = torch.stack([(before[name] - after[name]).square().sum() for name in names])
    step = float(moved.sum().sqrt())
    assert step == pytest.approx(1.9 * 1e-3 * cosine(0), rel=1e-3)  # Nesterov's first step


def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> list[dict[str, Any]]:
        return list(load_states(tmp_path, torch.device("cpu"), "this"))

    first = {"step": 1, "made_for": "this"}
    assert load() == []
    save_state(tmp_path, first)
    save_state(tmp_path, {"step": 2, "weights": torch.arange(1000.0), "made_for": "this"})
    assert [state["step"] for state in load()] == [2, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, STATE]
    content = (tmp_path / STATE).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a state" * 100):
        (tmp_path / STATE).write_bytes(damaged)
        assert load() == [first]
        assert STATE in capsys.readouterr().err
    (tmp_path / PREVIOUS).write_bytes(b"neither")
    assert load() == []


def stopped(folder: Path, **more: Any) -> Path:
    """A training that was stopped in its second epoch, after two states; the newest of them."""
    with pytest.raises(Interrupted):
        train(folder, Killed((1, 2), signal.SIGTERM), checkpoint_seconds=0.0, **more)
    return folder / "checkpoint" / STATE


def test_a_run_whose_state_is_damaged_goes_on_from_the_one_before(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    state = stopped(tmp_path / "parts")
    state.write_bytes(state.read_bytes()[:-200])
    resumed, _ = train(tmp_path / "parts")
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("reader", "error"),
    [
        ((Path, "read_bytes"), OSError(errno.ESTALE, "stale")),
        ((torch, "load"), torch.OutOfMemoryError("CUDA out of memory")),
        ((torch.optim.SGD, "load_state_dict"), torch.OutOfMemoryError("CUDA out of memory")),
        ((torch, "load"), MemoryError()),
    ],
)
def test_a_state_that_cannot_be_read_for_a_moment_is_kept(
    tmp_path: Path, reader: tuple[Any, str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "whole")
    state = stopped(tmp_path / "parts")
    content = state.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(*reader, fail)
    with pytest.raises(type(error)):
        train(tmp_path / "parts")
    monkeypatch.undo()
    assert state.read_bytes() == content
    resumed, _ = train(tmp_path / "parts")
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("change", ["objective", "optimizer", "best", "progress"])
def test_a_state_of_another_structure_gives_way_to_the_one_before(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train(tmp_path / "whole")
    state = stopped(tmp_path / "parts")
    held = torch.load(state, weights_only=True)
    held[change] = {"added": torch.zeros(3)} | dict(list(held[change].items())[:-1])
    torch.save(held, state)
    resumed, _ = train(tmp_path / "parts")
    said = capsys.readouterr().err
    assert "another version is skipped" in said
    assert "continues at epoch 2" in said
    assert same(whole.state_dict(), resumed.state_dict())


def test_states_of_other_settings_are_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train(tmp_path / "whole")
    stopped(tmp_path / "parts", inputs={"images": "others"})
    resumed, fitted = train(tmp_path / "parts")
    said = capsys.readouterr().err
    assert "belongs to other settings" in said
    assert "starts from scratch" in said
    assert len(fitted.history) == EPOCHS
    assert same(whole.state_dict(), resumed.state_dict())


def test_patience_stops_after_epochs_without_a_better_score(tmp_path: Path) -> None:
    values = [0.1, 0.5, 0.4, 0.3, 0.9, 0.2]

    def scores(epoch: int) -> dict[str, float]:
        return {"label_free": values[epoch]}

    more: dict[str, Any] = {"epochs": 6, "select": "label_free", "settings": {"patience": 2}}
    _, fitted = train(tmp_path / "whole", scores=scores, **more)
    assert (fitted.best_epoch, len(fitted.history)) == (1, 4)
    killed = Killed((2, 1), signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", killed, scores=scores, **more)
    _, again = train(tmp_path / "parts", scores=scores, **more)
    assert without_time(again.history) == without_time(fitted.history)
    _, patient = train(tmp_path / "patient", scores=scores, **more | {"settings": {"patience": 3}})
    assert patient.best_epoch == 4
