"""`sfkt benchmark`: methods x seeds x data sets x variants, each cell an ordinary run folder.

    <output>/cells/<data set>/<variant>/seed-<n>/   a run folder; its stages are links into
    <output>/stages/<stage>-<digest>/               what one stage made from one set of settings
    <output>/benchmark.{md,csv,json}, sweep-*.png   the tables and curves
    <output>/claims/                                who works on what (locks), and what failed

Cells whose settings agree up to a stage share its folder. Finished stages are not run again.
Several commands, on one machine or on several that share the folder, divide the stages among
themselves. If a stage fails for one of them, the others do not try it, but a command that starts
later does.
"""

import multiprocessing
import os
import secrets
import signal
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from sfkt_cli.benchmark.plan import BenchmarkPlan, Cell, cells_of, trial_cells, tuned
from sfkt_cli.console import console, duration, event, say, warn
from sfkt_cli.data.readers import archive_root
from sfkt_cli.errors import DataError, Interrupted, RunError, SfktError, explain, follow_parent
from sfkt_cli.files import Busy, locking, read_record, sha256_json, write_text
from sfkt_cli.machine import cores
from sfkt_cli.settings.config import build, merge, section_of, values_of
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import STAGE_FIELDS, Done, Stage, deciding_settings
from sfkt_cli.stages import run_stage

_READ_OUTSIDE = ("prepare", "source")
"""Stages that read what may change while the settings stay: an archive, a model brought along."""
_KILLED = "its process was killed, perhaps because memory ran out: use fewer --processes"
LOCK = ".lock"
FAILED = ".failed"  # ends the name of the file, beside the lock, that says why a stage failed
POLL_S = 1.0  # how often a command looks again for stages that others have claimed


@dataclass(frozen=True)
class Task:
    """One stage of one cell, as plain values that travel between processes."""

    key: str  # name of its folder below ``stages``; for ``evaluate`` that of the cell
    folder: Path  # where that is
    stage: str  # such as ``bridge`` or ``transfer/shot``
    cell: Path  # the run folder to run it in
    settings: Mapping[str, Any]  # all settings
    needs: tuple[str, ...]  # keys of the tasks without which it cannot run
    after: tuple[str, ...] = ()  # keys of the tasks that have to end first, well or not

    @property
    def finished(self) -> bool:
        """Whether it is done, seen without the links of its cell."""
        return (self.folder / "done.json").is_file()


def benchmark(
    plan: BenchmarkPlan,
    output: Path,
    *,
    processes: int = 1,
    overrides: Mapping[str, Any] | None = None,
    command: str = "sfkt benchmark",
) -> None:
    """Run all cells that are not done, then write tables and curves into ``output``.

    Several such commands may work on one output: each stage is claimed by one of them. At most
    ``processes`` run at a time, each of which runs one stage and ends, which keeps their memory and
    time apart; 0: all stages run in this process. ``overrides`` are settings that win over those of
    the plan, ``command`` is as typed.

    Raises:
        ConfigError: The plan is wrong.
        DataError: Archives or models that cells need are missing.
        RunError: A stage failed; the tables are written.
    """
    from sfkt_cli.benchmark.report import write_report

    cells = cells_of(plan, overrides or {})
    check_inputs(cells, output)
    output.mkdir(parents=True, exist_ok=True)
    for path in output.glob(f"claims/*{FAILED}"):
        path.unlink(missing_ok=True)
    trials, failed = trial_cells(cells), dict[str, str]()
    try:
        ran = run_cells(trials, output, processes, failed)
        ran += run_cells(tuned(cells, trials, output)[0], output, processes, failed)
    finally:  # what there is, also when it is stopped
        cells, tuning = tuned(cells, trials, output)
        last = [(cell, tasks_of(cell, output)[-1]) for cell in cells]
        evaluated = [cell for cell, task in last if task.key not in failed and done(task)]
        write_report(plan, cells, evaluated, tuning, output, failed, command)
    say(f"benchmark: {len(ran)} stages run, tables are in {output / 'benchmark.md'}")
    if failed:
        first = next(iter(failed.values()))
        raise RunError(
            f"{len(failed)} stages failed or were left out, the first: {first}\n"
            f"The tables in {output} show the rest; the same command tries these again"
        )


def check_inputs(cells: Iterable[Cell], output: Path) -> None:
    """Raise one DataError for all missing archives and models that cells still need."""
    missing: dict[str, list[str]] = {}
    for cell in cells:
        config, (prepare, source, *_) = cell.config, tasks_of(cell, output, link=False)
        needed = dict[Path, str]()
        if config.dataset != "synthetic" and not prepare.finished:
            needed[archive_root(config)] = ""
        if not source.finished:
            brought = (config.source.checkpoint, *config.source.mixture)
            needed |= dict.fromkeys(filter(None, brought), "the source model ")
        for path, what in needed.items():
            if not path.exists():
                missing.setdefault(f"{what}{path} does not exist", []).append(cell.dataset)
    if missing:
        lines = (f"  {what}, for {', '.join(dict.fromkeys(of))}" for what, of in missing.items())
        raise DataError(
            "nothing was run, because some inputs are missing:\n"
            + "\n".join(lines)
            + "\nset prepare.root in the data set's `settings`, or remove it from `datasets`"
        )


def dry_run(plan: BenchmarkPlan, output: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a benchmark would run, what is shared, and how long and large it is; runs nothing.

    Time and size are means over finished stages of the same kind in ``output``. A method without
    finished stages counts as the median of the others; everything else is unknown.

    Raises:
        ConfigError: The plan is wrong.
        DataError: Archives or models that cells need are missing.
    """
    cells = cells_of(plan, overrides)
    planned = [
        task
        for cell in [*trial_cells(cells), *cells]
        for task in tasks_of(cell, output, link=False)
    ]
    tasks = {task.key: task for task in planned}
    total, asked = (Counter(task.stage for task in some) for some in (tasks.values(), planned))
    to_run = Counter(task.stage for task in tasks.values() if not task.finished)
    of_methods = _costs("transfer/*", output)
    lines = [f"benchmark: dry run, nothing is written; {len(cells)} cells in {output}"]
    seconds, room, guessed, unknown = 0.0, 0, list[str](), list[str]()
    order = [*STAGE_FIELDS]
    for kind in sorted(total, key=lambda stage: order.index(stage.partition("/")[0])):
        count, left, measured = total[kind], to_run[kind], _costs(kind, output)
        text = f"  {kind:24}{count:5} stages, {asked[kind] - count} shared, {count - left} done"
        known = measured or (of_methods if "/" in kind else [])
        if left and known:
            typical = np.mean if measured else np.median
            took, size = (left * typical(known, axis=0)).tolist()
            seconds, room = seconds + took, room + int(size)
            text += f"; {duration(took)}, {size / 1e6:,.0f} MB"
            if not measured:
                guessed.append(kind)
                text += " (a guess: as the other methods)"
        elif left:
            unknown.append(kind)
            text += "; time and room unknown"
        lines.append(text)
    if seconds or room:
        lines.append(f"  in all about {duration(seconds)} of one process and {room / 1e6:,.0f} MB")
    if unknown:
        lines.append(
            f"  not counted: {', '.join(unknown)} (known once one of each is done here; "
            "`sfkt run --dry-run` with the same settings tries the stages of one run)"
        )
    say("\n".join(lines))
    check_inputs(cells, output)
    return {
        "folder": output, "cells": len(cells), "stages": len(tasks), "to_run": to_run.total(),
        "seconds": seconds, "bytes": room, "guessed": guessed, "unknown": sorted(unknown),
    }  # fmt: skip


def run_cells(
    cells: Iterable[Cell], output: Path, processes: int, failed: dict[str, str]
) -> list[str]:
    """Run what is missing, and return the keys of the tasks that were run.

    A stage runs as soon as its inputs are there, unless another command has claimed it. Cells come
    one after the other, so that a stopped benchmark has whole cells to show. A stage that fails
    only stops its own cells: ``failed`` gets messages by key, which are empty if another stage
    failed before.
    """
    tasks = {task.key: task for cell in cells for task in tasks_of(cell, output)}
    waiting = {key: task for key, task in tasks.items() if key not in failed}
    workers, ran = Workers(output, processes), list[str]()

    def fail(task: Task, problem: str) -> None:
        failed[task.key] = f"{task.cell}: {task.stage}: {problem}"
        warn(failed[task.key])

    try:
        while waiting or workers.running:
            before = len(waiting)
            for task in list(waiting.values()):
                if {*task.needs, *task.after} & (waiting.keys() | workers.keys()):
                    continue
                if any(key in failed for key in task.needs):
                    failed[task.key] = ""
                elif not done(task):
                    if workers.full or not is_free(task, output):
                        continue
                    workers.start(task)
                elif task.stage in _READ_OUTSIDE:
                    changed = run_task(task, output, console.quiet).problem
                    if changed is not None:
                        fail(task, f"{changed}\nfor a benchmark: another --output")
                del waiting[task.key]
            for task, end in workers.ended(idle=len(waiting) == before):
                if not end.ran and end.problem is None:
                    waiting[task.key] = task
                    continue
                ran += [task.key] * end.ran
                number, total = len(tasks) - len(waiting) - len(workers.running), len(tasks)
                say(f"benchmark: {number}/{total}  {task.cell}  {task.stage}")
                event("cell", level=task.stage.partition("/")[0], number=number, total=total,
                      name=str(task.cell), part=task.stage, problem=end.problem)  # fmt: skip
                if end.problem is not None:
                    fail(task, end.problem)
    finally:
        workers.stop()
    return ran


def tasks_of(cell: Cell, output: Path, *, link: bool = True) -> list[Task]:
    """The stages of a cell in order; its run folder gets links to where they belong."""
    from sfkt_cli.methods import find_method

    folder, gpus = output / cell.folder, cell.config.runtime.gpus
    # Whole stages run side by side: each on one GPU at most.
    limited = {"runtime": {"gpus": gpus and min(gpus, 1), "processes": 1}}
    settings = merge(values_of(cell.config), limited)
    made: dict[str, Task] = {}
    links: dict[Path, Path] = {}

    def add(stage: str, *needs: str, name: str = "", own: Mapping[str, Any] = settings) -> None:
        name = name or stage
        before = tuple(made[need].key for need in needs)
        identity = {"settings": deciding_settings(stage, build(dict(own))), "needs": before}
        key = f"{stage.replace('/', '-')}-{sha256_json(identity)[:16]}"
        run, place = folder, output / "stages" / key
        links[folder / name] = place
        if name != stage:  # two students of one method: a run for each
            run = folder / "tuned" / name.partition("/")[2]
            links.update({run / need: made[need].folder for need in needs})
            links[run / stage] = place
        made[name] = Task(key, place, stage, run, own, before)

    add("prepare")
    add("source", "prepare")
    bridged = {row for row, (name, _) in cell.students.items() if find_method(name).needs_bridge}
    if bridged or "bridge-only" in cell.rows:
        add("bridge", "prepare", "source")
    for row, (name, changes) in cell.students.items():
        needs = ("prepare", "source", "bridge") if row in bridged else ("prepare", "source")
        own = {"transfer.method": name, section_of(name): changes}
        add(f"transfer/{name}", *needs, name=f"transfer/{row}", own=merge(settings, own))
    if link:
        there = {path for path in folder.rglob("*") if path.is_symlink() and path.name[0] != "."}
        for path in there - links.keys():
            path.unlink()
        for path, place in links.items():
            _link(path, place)
    tasks = list(made.values())
    if not cell.trial:
        # A method that failed is missing in the tables; the others are measured all the same.
        (prepare, source), after = tasks[:2], tuple(task.key for task in tasks)
        key, place, before = str(cell.folder), folder / "evaluate", (prepare.key, source.key)
        tasks.append(Task(key, place, "evaluate", folder, settings, before, after))
    return tasks


def done(task: Task) -> bool:
    """Whether a task's folder is finished; ``evaluate`` with all inputs as they are now."""
    run = Run(task.cell)
    if task.stage != "evaluate" or not run.finished(task.stage):
        return run.finished(task.stage)
    from sfkt_cli.stages.evaluate import inputs_of, open_stores

    config = build(dict(task.settings))
    try:
        record = read_record(task.folder / "done.json", Done)
        now = inputs_of(config, run, *open_stores(run))
    except SfktError:
        return False
    # It may have seen models that are no longer shown, and whose links are gone.
    used = {
        name: digest
        for name, digest in record.inputs.items()
        if name in now or run.path(name).exists()
    }
    seen = record.model_copy(update={"inputs": used})
    return not Stage("evaluate", task.folder, config, now).changes_since(seen)


def is_free(task: Task, output: Path) -> bool:
    """Whether no process works on a stage now, found out by locking it for a moment."""
    try:
        with _claim(task, output):
            return True
    except Busy:
        return False


def _claim(task: Task, output: Path) -> AbstractContextManager[None]:
    """The lock of a stage; if its process is killed, it is free again."""
    return locking(_claims(task, output, LOCK), f"another command runs {task.stage}")


def _claims(task: Task, output: Path, ending: str) -> Path:
    folder = output / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{task.key.replace('/', '-')}{ending}"


class End(NamedTuple):
    """How a task ended."""

    problem: str | None = None
    ran: bool = True  # False: another process had done it, or failed, or works on it


class Workers:
    """The running stages: at most ``processes``, each in its own; with 0 in this process."""

    def __init__(self, output: Path, processes: int) -> None:
        self._output, self._processes = output, processes
        self._ended: list[tuple[Task, End]] = []
        self._free = gpus_of(processes)
        self.running: dict[Connection, tuple[Task, SpawnProcess, str]] = {}

    def keys(self) -> set[str]:
        """Keys of the tasks that run, or whose end :meth:`ended` has not returned yet."""
        running = {task.key for task, _, _ in self.running.values()}
        return running | {task.key for task, _ in self._ended}

    @property
    def full(self) -> bool:
        """Whether another task has to wait."""
        return len(self.running) >= max(self._processes, 1) or bool(self._ended)

    def start(self, task: Task) -> None:
        """Run a task."""
        if not self._processes:
            self._ended.append((task, run_task(task, self._output, console.quiet)))
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        gpu = self._free.pop()
        quiet = console.quiet or self._processes > 1
        process = context.Process(
            target=_work, args=(task, self._output, self._processes, gpu, quiet, theirs)
        )
        process.start()
        theirs.close()
        self.running[ours] = (task, process, gpu)

    def ended(self, *, idle: bool) -> list[tuple[Task, End]]:
        """The tasks that have ended; if there is none, wait a moment for one."""
        ends, self._ended = self._ended, []
        # Where nothing runs here, this only waits for what other commands have claimed.
        for place in wait(list(self.running), POLL_S if idle and not ends else 0):
            pipe = cast("Connection", place)
            task, process, gpu = self.running.pop(pipe)
            try:
                ends.append((task, pipe.recv()))
            except EOFError:
                write_text(_claims(task, self._output, FAILED), _KILLED)
                ends.append((task, End(_KILLED)))
            process.join()
            self._free.append(gpu)
        return ends

    def stop(self) -> None:
        """Make the running tasks save their state and end."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.join()


def _work(
    task: Task, output: Path, processes: int, gpu: str, quiet: bool, pipe: Connection
) -> None:
    """Run a task on its GPU or its share of the cores; torch is not loaded yet.

    A worker whose parent was killed saves its state and ends, as if it had been told to.
    """
    follow_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if processes > 1:
        share = max(cores() // processes, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        pipe.send(run_task(task, output, quiet))
    except Interrupted as error:
        pipe.send(End(str(error)))


def run_task(task: Task, output: Path, quiet: bool) -> End:
    """Run one stage here, unless another process does, or has failed since a command began."""
    console.quiet = quiet or task.stage == "evaluate"  # one table at the end, not one a cell
    try:
        with _claim(task, output):
            failure = _claims(task, output, FAILED)
            if failure.is_file():
                return End(failure.read_text(encoding="utf-8", errors="replace"), ran=False)
            if done(task) and task.stage not in _READ_OUTSIDE:
                return End(ran=False)
            problem = problem_of(task)
            if problem is not None:
                write_text(failure, problem)
            elif task.stage not in _READ_OUTSIDE:  # what is done is not claimed again
                _claims(task, output, LOCK).unlink(missing_ok=True)  # or the user cleaned up
            return End(problem)
    except Busy:
        return End(ran=False)
    except (OSError, RunError) as error:
        return End(str(error))
    finally:
        console.quiet = quiet


def problem_of(task: Task) -> str | None:
    """Run one stage; returns why it failed, or None."""
    try:
        run_stage(task.stage, build(dict(task.settings)), Run(task.cell))
    except Exception as error:  # a bug or a full GPU in one cell is no reason to lose a night
        message, _ = explain(error)
        if message is None:
            traceback.print_exc()
        return message or f"{type(error).__name__}: {error}"
    return None


def gpus_of(processes: int) -> list[str]:
    """A GPU for each of several processes, as CUDA_VISIBLE_DEVICES names it; "" for none."""
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there)))).split(",")
    return [gpus[number % len(gpus)] for number in range(processes)]


def _link(link: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    place = os.path.relpath(folder, link.parent)
    if link.is_symlink() and str(link.readlink()) == place:
        return
    if link.is_dir() and not link.is_symlink():
        raise RunError(f"{link} is a folder, but benchmark puts a link there: use another --output")
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    fresh.symlink_to(place, target_is_directory=True)
    fresh.replace(link)


def _costs(stage: str, output: Path) -> list[tuple[float, int]]:
    """Seconds and bytes of the finished stages of one kind, such as ``transfer/*``."""
    name = "cells/*/*/*/evaluate"
    if stage != "evaluate":
        name = f"stages/{stage.replace('/', '-')}-{'?' * 16}"
    costs = []
    for path in output.glob(f"{name}/done.json"):
        sizes = (file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        costs.append((read_record(path, Done).seconds, sum(sizes)))
    return costs
