"""The only training loop: every stage and every method goes through :class:`Training`."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.console import Tracker, duration, event, say, tell, terms_text, track
from sfkt_cli.errors import Interrupted, RunError, need, on_stop
from sfkt_cli.files import write_text
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.checkpoint import resume, save, snapshot
from sfkt_cli.training.runtime import Runtime, seed_all
from sfkt_cli.training.trial import Tried, try_out

Batch = dict[str, Tensor]
NAMED_ROWS = 8  # rows of each table of a batch whose loss is not finite that the message names
TENSORBOARD = "tensorboard"  # folder below a stage's; ``tensorboard --logdir runs`` finds them all
Numbers = Mapping[str, float]


class Objective(nn.Module):
    """What is trained: a batch in, named loss terms out.

    It holds everything that is trained, and everything else that must survive an interruption, as
    buffers or extra state. In the middle of an epoch, those of process 0 are saved.
    """

    weights: dict[str, float]  # weight of each loss term, by name; a missing one counts 1
    skips_parameters = False  # whether some steps leave trained parameters out

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, the first of which is 0."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of a batch, scalars by name."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each step of the optimiser."""


@dataclass
class Progress:
    """How far a training is: what a resumed training needs besides the state of the networks."""

    epoch: int = 0  # the one to train, from 0
    step: int = 0  # its steps that are done
    best_score: float = -math.inf  # the largest one that the epochs were chosen by
    best_epoch: int = -1  # epoch whose weights are kept, from 0
    seconds: float = 0.0  # time spent, over all interruptions
    # Sum of each loss term over the steps of this epoch.
    totals: dict[str, float] = field(default_factory=dict)
    # One row of metrics an epoch, as in metrics.jsonl.
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Training:
    """A training: the objective, its batches and its optimiser; :meth:`fit` runs it."""

    title: str  # shown in front of messages; also part of the random seeds
    stage: Stage  # the settings, and the folder of metrics.jsonl and checkpoint/
    objective: Objective
    # (epoch, step) to a batch; called one step ahead in a thread. If the loss is not finite,
    # ``rows``, ``ti_rows`` and so on in it name the samples.
    batches: Callable[[int, int], Batch]
    optimizer: torch.optim.Optimizer  # over the trained parameters
    runtime: Runtime  # device, precision, processes
    _: KW_ONLY
    epochs: int  # number of epochs
    steps: int  # steps of each epoch
    images_per_step: int = 0  # for the rate
    schedule: Callable[[float], float]  # progress in [0, 1) to the factor of every learning rate
    keep: nn.Module  # the part of ``objective`` whose best weights are restored at the end
    # Called with the epoch after its end, in inference mode: label-free scores.
    scores: Callable[[int], dict[str, float]] = lambda epoch: {}
    # The score whose largest value picks the weights that are kept; None keeps the last.
    select: str | None = None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.best: dict[str, Any] = {}  # the weights of ``keep`` to be restored
        # Loss terms of the last step: names, a function that waits for their values, and rows.
        self.pending: tuple[list[str], Callable[[], list[float]], Batch] | None = None
        self.latest: dict[str, float] = {}  # the loss terms of the step before
        self.stopped = threading.Event()
        self.checkpoint = self.stage.checkpoint
        self.scaler = torch.amp.GradScaler(enabled=self.runtime.precision == torch.float16)
        self.mixed = self.runtime.autocast(self.objective)

    def fit(self) -> Progress:
        """Train until the last epoch (see ``patience``), from the saved state if there is one.

        Returns:
            The progress; ``keep`` then holds the selected weights.

        Raises:
            RunError: A loss, a weight or a score is not finite.
            Interrupted: A signal asked to stop; the state is saved.
            Tried: This is a dry run: two steps were tried, and nothing was written.
        """
        if self.runtime.dry_run is not None:
            try_out(self, self.runtime.dry_run)
            raise Tried(self.runtime.dry_run, self.stage.inputs)
        self.best = snapshot(self.keep)
        resume(self)
        self._run()
        self.keep.load_state_dict(self.best)
        return self.progress

    def _save(self) -> None:
        if self.runtime.main:
            save(self)
        self.last_saved = time.monotonic()

    def _is_late(self) -> bool:
        return time.monotonic() - self.last_saved >= self.stage.config.runtime.checkpoint_seconds

    def _run(self) -> None:
        """Train epoch after epoch: its steps, its scores, its report, its state."""
        runtime, progress, objective = self.runtime, self.progress, self.objective
        config = self.stage.config
        patience, curves = config.training.patience, config.runtime.tensorboard and runtime.main
        self.parallel = runtime.parallel(objective, skips_parameters=objective.skips_parameters)
        self.rates = [g.setdefault("full_rate", g["lr"]) for g in self.optimizer.param_groups]
        first, started = progress.epoch, time.monotonic()
        self.last_saved = started
        total, done = self.epochs * self.steps, first * self.steps + progress.step
        with (
            on_stop(self._stop),
            track(self.title, total, done=done, line_s=math.inf) as tracker,
            tensorboard_curves(self.stage.folder, first, curves) as draw,
        ):
            for epoch in range(first, self.epochs):
                if patience and epoch - progress.best_epoch > patience:
                    epochs = f"{patience} epoch{'s'[: patience != 1]}"
                    say(f"{self.title}: no better {self.select} in {epochs}, stopped")
                    break
                if self._pass(epoch, tracker):
                    break
                terms, scores = self._score_epoch(epoch)
                if runtime.main:
                    draw(epoch + 1, terms, scores)
                    taken = max((epoch + 1) * self.steps - done, 1)
                    step_s = (time.monotonic() - started) / taken
                    left_s = step_s * (self.epochs - epoch - 1) * self.steps
                    self._report(terms, scores, left_s, tracker)
                if self._is_late():
                    self._save()
            if runtime.any(self.stopped.is_set())[0]:
                self._save()
                raise Interrupted(f"{self.title} stopped; the same command continues from here")

    def _stop(self, number: signal.Signals) -> None:
        """Stop after the step or the scores that are being computed."""
        if self.runtime.main and not self.stopped.is_set():
            with contextlib.suppress(RuntimeError):  # the signal came while something was written
                tell(f"{self.title}: stopping after this step, the state is saved")
        self.stopped.set()

    def _pass(self, epoch: int, tracker: Tracker) -> bool:
        """Train for the remaining steps of an epoch; returns whether a signal cut it short."""
        runtime, progress, seed = self.runtime, self.progress, self.stage.config.seed
        began, stopping = time.monotonic(), False
        if progress.step == 0:
            seed_all(seed, self.title, epoch)
            self.objective.begin_epoch(epoch)
            runtime.share_buffers(self.objective)
        self.objective.train()
        self.latest = {}
        for step, batch in _ahead(self.batches, epoch, progress.step, self.steps):
            seed_all(seed, self.title, epoch, step)
            factor = self.schedule((epoch * self.steps + step) / (self.epochs * self.steps))
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            loss, terms = self.descend(self.parallel, batch)
            self._note(loss, terms, batch)
            progress.step = step + 1
            tracker.advance(1, self.images_per_step, terms_text(self.latest))
            late = runtime.main and self._is_late()
            stopping, due = runtime.any(self.stopped.is_set(), late)
            if stopping:
                break
            if due and progress.step < self.steps:
                self._check_weights()
                now = time.monotonic()
                progress.seconds, began = progress.seconds + now - began, now
                self._save()
        self._check_weights()
        runtime.wait()
        runtime.share_buffers(self.objective)
        progress.seconds += time.monotonic() - began
        return stopping

    def descend(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step down the weighted sum of the loss terms; returns the sum and the terms."""
        with self.mixed:
            terms: dict[str, Tensor] = model(batch)
        weighted = [self.objective.weights.get(name, 1.0) * term for name, term in terms.items()]
        loss = torch.stack(weighted).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if (clip_norm := self.stage.config.training.clip_norm) is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.after_step()
        return loss, terms

    def _note(self, loss: Tensor, terms: dict[str, Tensor], batch: Batch) -> None:
        """Check the terms of the step before, and note those of this one.

        Checking one step late keeps a GPU busy. Terms are means over the processes, so that all
        processes notice together if something is wrong.
        """
        values = torch.stack([loss.detach(), *(term.detach() for term in terms.values())])
        fetched = self.runtime.fetch(self.runtime.sum(values) / self.runtime.world)
        self._check()
        rows = {name: values for name, values in batch.items() if name.endswith("rows")}
        self.pending = (list(terms), fetched, rows)

    def _check(self) -> None:
        """Add the noted terms to the sums of the epoch; raises RunError if they are not finite."""
        if self.pending is None:
            return
        names, fetched, rows = self.pending
        self.pending, values, at = None, fetched(), self.progress
        self.latest = dict(zip(names, values[1:], strict=True))
        if not all(math.isfinite(value) for value in values):
            shares = self.runtime.gather({name: part.tolist() for name, part in rows.items()})
            named = ", ".join(_rows_text(name, [share[name] for share in shares]) for name in rows)
            raise self._diverged(f"the loss is {values[0]}", f"; rows of the batch: {named}")
        for name, value in self.latest.items():
            at.totals[name] = at.totals.get(name, 0.0) + value

    def _check_weights(self) -> None:
        """Raise RunError if terms or weights are not finite, before they are saved or kept."""
        self._check()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        if not torch.stack([weight.detach().isfinite().all() for weight in trained]).all():
            raise self._diverged("weights are not finite", "")

    def _diverged(self, what: str, rows: str) -> RunError:
        at, again = self.progress, "Start again with"
        if any(self.checkpoint.glob("*.pt")):
            again = (
                f"The same command continues from the last good state, in {self.checkpoint}; if it "
                "ends here again, start again with --force and"
            )
        return RunError(
            f"{self.title}: {what} in epoch {at.epoch + 1}, step {at.step} "
            f"({terms_text(self.latest)}){rows}. {again} a lower learning rate, "
            "or with training.clip_norm=1"
        )

    def _score_epoch(self, epoch: int) -> tuple[dict[str, float], dict[str, float]]:
        """Score a finished epoch, note it, and keep its weights if it is the best so far."""
        progress = self.progress
        self.objective.eval()
        with torch.inference_mode():
            scores = self.scores(epoch)
        if not all(map(math.isfinite, scores.values())):
            raise self._diverged(f"the scores are not finite ({terms_text(scores)})", "")
        terms = {name: total / progress.step for name, total in progress.totals.items()}
        progress.history.append(
            {
                "epoch": epoch + 1,
                "seconds": round(progress.seconds, 3),
                "learning_rate": self.optimizer.param_groups[-1]["lr"],  # not the backbone's
                **terms,
                **scores,
            }
        )
        score = scores[self.select] if self.select else float(epoch)
        if score > progress.best_score:
            progress.best_score, progress.best_epoch = score, epoch
            self.best = snapshot(self.keep)
        progress.epoch, progress.step, progress.totals = epoch + 1, 0, {}
        return terms, scores

    def _report(self, terms: Numbers, scores: Numbers, left_s: float, tracker: Tracker) -> None:
        """Report an epoch to people and scripts: terms, scores, rate and remaining time."""
        select, history = self.select, self.progress.history
        row = history[-1]
        rate = row["epoch"] * self.steps * self.images_per_step / max(row["seconds"], 1e-9)
        tracker.note = terms_text({select: scores[select]} if select else scores)
        tracker.report(
            f"{int(row['epoch'])}/{self.epochs}  {terms_text({**terms, **scores})}  "
            f"{rate:,.0f} images/s" + (f"  {duration(left_s)} left" if left_s else "")
        )
        event(
            "epoch", title=self.title, epoch=row["epoch"], epochs=self.epochs,
            seconds=row["seconds"], learning_rate=row["learning_rate"], terms=terms,
            scores=scores, images_per_second=round(rate, 1), remaining_seconds=round(left_s, 1),
        )  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_text(self.stage.folder / "metrics.jsonl", lines)


def _rows_text(name: str, shares: Iterable[list[int]]) -> str:
    """A few rows of a batch with the name of their table: ``ti [3, 8]``."""
    rows = [row for share in shares for row in share]
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"{name.removesuffix('rows').strip('_')} {rows[:NAMED_ROWS]}{more}".strip()


@contextlib.contextmanager
def tensorboard_curves(
    folder: Path, epoch: int, wanted: bool
) -> Iterator[Callable[[int, Numbers, Numbers], None]]:
    """A function that adds an epoch's loss terms and scores to TensorBoard's files, if ``wanted``.

    ``epoch`` is the number of finished epochs; what an interrupted run wrote for later ones is
    hidden.

    Raises:
        ConfigError: It is wanted, but tensorboard is not installed.
    """
    if not wanted:
        yield lambda epoch, terms, scores: None
        return
    user, instead = "runtime.tensorboard = true", ", or leave the setting out"
    need(user, "tensorboard", "tensorboard", instead=instead)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / TENSORBOARD, purge_step=epoch + 1) as writer:

        def add(epoch: int, terms: Numbers, scores: Numbers) -> None:
            for group, values in (("terms", terms), ("scores", scores)):
                for name, value in values.items():
                    writer.add_scalar(f"{group}/{name}", value, epoch)
            writer.flush()

        yield add


def _ahead(
    batches: Callable[[int, int], Batch], epoch: int, first: int, steps: int
) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches; each batch is made while the one before is being used.

    One thread makes them, without torch's own helpers, which would take cores from the step.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        coming = pool.submit(batches, epoch, first)
        for step in range(first, steps):
            batch = coming.result()
            if step + 1 < steps:
                coming = pool.submit(batches, epoch, step + 1)
            yield step, batch
