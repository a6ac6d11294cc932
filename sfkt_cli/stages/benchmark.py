"""`sfkt benchmark`: methods x seeds x data sets x variants, each cell an ordinary run folder.

    <output>/cells/<data set>/<variant>/seed-<n>/   a run folder; its stages are links into
    <output>/stages/<stage>-<digest>/               what one stage made from one set of settings
    <output>/benchmark.{md,csv,json}, sweep-*.png   the tables and curves

Cells whose settings agree up to a stage share its folder. What is done is not done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from sfkt_cli.config import Config, as_dict, build, merge, nest
from sfkt_cli.console import console, event, quieten, say, warn
from sfkt_cli.errors import Interrupted, RunError, SfktError
from sfkt_cli.files import locking
from sfkt_cli.runs import Run, digest_settings, stage_settings
from sfkt_cli.signals import follow_parent
from sfkt_cli.stages.benchmark_plan import BenchmarkPlan, Cell, cells_of

Free = SimpleQueue[str]
LEVELS = ("prepare", "source", "bridge", "transfer", "evaluate")
_READ_OUTSIDE = ("prepare", "source")
"""Stages that read what may change while the settings stay: an archive, a model brought along."""
_KILLED = (
    "this or another process of the benchmark was killed, perhaps for want of memory: fewer "
    "--processes need less"
)


@dataclass(frozen=True)
class Task:
    """One stage of one cell, as plain values that travel between processes.

    Attributes:
        key: Name of its folder below ``stages``; for ``evaluate`` that of the cell.
        stage: Such as ``bridge`` or ``transfer/shot``.
        cell: The run folder to run it in.
        settings: All settings.
        needs: Keys of the tasks before it.
    """

    key: str
    stage: str
    cell: Path
    settings: Mapping[str, Any]
    needs: tuple[str, ...]

    @property
    def level(self) -> str:
        """The stage without the method."""
        return self.stage.partition("/")[0]


@dataclass
class Progress:
    """What has happened.

    Attributes:
        failed: Message by key.
        ran: Keys of the tasks that were run now.
    """

    failed: dict[str, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


def benchmark(
    plan: BenchmarkPlan,
    output: Path,
    *,
    processes: int = 1,
    overrides: Mapping[str, Any] | None = None,
    command: str = "sfkt benchmark",
) -> None:
    """Run all cells that are not done, then write tables and curves.

    Args:
        plan: What to compare.
        output: Folder for all of it.
        processes: Stages at a time, each in a fresh process, which keeps its memory and time
            apart; 0: in this process.
        overrides: Nested settings that win over those of the plan.
        command: As typed, for the report.

    Raises:
        ConfigError: The plan is wrong.
        RunError: Another process works on the output, or a stage failed; the tables are written.
    """
    cells = cells_of(plan, overrides or {})
    output.mkdir(parents=True, exist_ok=True)
    busy = f"another benchmark works on {output}: wait for it to end"
    with locking(output / ".benchmark.lock", busy):
        from sfkt_cli.stages.benchmark_report import write_report

        progress = Progress()
        try:
            run_cells(cells, output, processes, progress)
        finally:  # what there is, also when it is stopped
            write_report(plan, cells, output, progress.failed, command)
    say(f"benchmark: {len(progress.ran)} stages run, tables are in {output / 'benchmark.md'}")
    if progress.failed:
        first = next(iter(progress.failed.values()))
        raise RunError(
            f"{len(progress.failed)} stages failed or were left out, the first: {first}\n"
            f"The tables in {output} show the rest; the same command tries these again"
        )


def run_cells(cells: Iterable[Cell], output: Path, processes: int, progress: Progress) -> None:
    """Run what is missing, level by level; a failed stage takes only its own cells with it."""
    tasks: dict[str, Task] = {}
    for cell in cells:
        for task in tasks_of(cell, output):
            tasks.setdefault(task.key, task)
    for level in LEVELS:
        waiting = []
        for task in tasks.values():
            if task.level != level:
                continue
            broken = [key for key in task.needs if key in progress.failed]
            if broken:
                progress.failed[task.key] = f"{task.cell}: {task.stage} needs {broken[0]}"
            elif not done(task):
                waiting.append(task)
            elif level in _READ_OUTSIDE and (changed := run_task(task, console.quiet)) is not None:
                progress.failed[task.key] = (
                    f"{task.cell}: {task.stage}: {changed}\nfor a benchmark: another --output"
                )
                warn(progress.failed[task.key])
        for number, (task, problem) in enumerate(_run(waiting, processes), 1):
            progress.ran.append(task.key)
            say(f"benchmark: {level} {number}/{len(waiting)}  {task.cell}  {task.stage}")
            event(
                "cell", level=level, number=number, total=len(waiting), name=str(task.cell),
                part=task.stage, problem=problem,
            )  # fmt: skip
            if problem is not None:
                progress.failed[task.key] = f"{task.cell}: {task.stage}: {problem}"
                warn(progress.failed[task.key])


def tasks_of(cell: Cell, output: Path) -> list[Task]:
    """The stages of a cell in order; its run folder gets links to where they belong."""
    from sfkt_cli.stages.transfer import find_method

    run, found = output / cell.folder, list[Task]()
    settings = as_dict(_limited(cell.config))
    keys: dict[str, str] = {}

    def add(stage: str, *needs: str, **more: Any) -> None:
        own = merge(settings, nest("transfer.method", more["method"])) if more else settings
        before = tuple(keys[name] for name in needs)
        identity = {"settings": stage_settings(stage, build(own)), "needs": before}
        keys[stage] = f"{stage.replace('/', '-')}-{digest_settings(identity)}"
        _link(run / stage, output / "stages" / keys[stage])
        found.append(Task(keys[stage], stage, run, own, before))

    for path in [*run.glob("*"), *run.glob("transfer/*")]:
        if path.is_symlink():
            path.unlink()
    add("prepare")
    add("source", "prepare")
    bridged = [name for name in cell.methods if find_method(name).needs_bridge]
    if bridged or "bridge-only" in cell.rows:
        add("bridge", "prepare", "source")
    for name in cell.methods:
        needs = ("prepare", "source", "bridge") if name in bridged else ("prepare", "source")
        add(f"transfer/{name}", *needs, method=name)
    # A method that failed is missing in the tables; the others are measured all the same.
    before = (keys["prepare"], keys["source"])
    found.append(Task(str(cell.folder), "evaluate", run, settings, before))
    return found


def done(task: Task) -> bool:
    """Whether a task's folder is finished; ``evaluate`` with all models as they are now."""
    run = Run(task.cell)
    if not run.finished(task.stage):
        return False
    if task.stage != "evaluate":
        return True
    from sfkt_cli.stages.contenders import model_digests

    record = run.record("evaluate")
    now = stage_settings("evaluate", build(dict(task.settings)))
    try:
        models = model_digests(run).items() <= record["inputs"].items()
        return bool(models and record["settings"] == now)
    except (KeyError, SfktError):
        return False


def _run(tasks: list[Task], processes: int) -> Iterator[tuple[Task, str | None]]:
    """Each task and what went wrong, as they end."""
    if processes == 0:
        for task in tasks:
            yield task, run_task(task, quiet=console.quiet)
        return
    waiting = deque(tasks)
    while waiting:
        yield from _run_pool(waiting, processes)


def _run_pool(waiting: deque[Task], processes: int) -> Iterator[tuple[Task, str | None]]:
    """Take tasks until none is left, or a process was killed and its pool with it."""
    context = multiprocessing.get_context("spawn")
    free: Free = context.SimpleQueue()
    for gpu in gpus_of(processes):
        free.put(gpu)
    with ProcessPoolExecutor(
        processes, context, _begin_worker, (free,), max_tasks_per_child=1
    ) as pool:
        running: dict[Future[str | None], Task] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    running[pool.submit(_work, waiting[0], processes, console.quiet)] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            for future, task in running.items():
                killed = isinstance(future.exception(), BrokenProcessPool)
                yield task, _KILLED if killed else future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # a training saves its state; a task that waits never begins
            pool.shutdown(cancel_futures=True)
            raise


_free: Free
"""The GPUs that no task of the benchmark uses now."""


def _begin_worker(free: Free) -> None:
    """A worker whose parent was killed saves its state and ends, as if it had been told to."""
    global _free
    _free = free
    follow_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _work(task: Task, processes: int, quiet: bool) -> str | None:
    """Run a task on a GPU that is free, or on its share of the cores; torch is not loaded yet."""
    if processes == 1:
        return run_task(task, quiet)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    gpu = _free.get()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        return run_task(task, quiet=True)
    finally:
        _free.put(gpu)


def run_task(task: Task, quiet: bool = False) -> str | None:
    """Run one stage here; returns what went wrong, if anything did.

    Args:
        task: What to run.
        quiet: Print only warnings.
    """
    config = build(dict(task.settings))
    quieten(quiet)
    name = task.level
    stage = getattr(import_module(f"sfkt_cli.stages.{name}"), name)
    try:
        stage(config, Run(task.cell))
    except Interrupted:
        raise
    except (SfktError, OSError) as error:
        return str(error)
    except Exception as error:  # a bug or a full GPU in one cell is no reason to lose a night
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def gpus_of(processes: int) -> list[str]:
    """A GPU for each of several processes, as CUDA_VISIBLE_DEVICES names it; "" for none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sum(1 for path in Path("/proc/driver/nvidia/gpus").glob("*"))
    gpus = (visible.split(",") if visible else [str(each) for each in range(there)]) or [""]
    return [gpus[number % len(gpus)] for number in range(processes)]


def _limited(config: Config) -> Config:
    """The same on one GPU at most: the benchmark runs stages beside each other instead."""
    gpus = config.runtime.gpus
    limited = {"gpus": gpus if gpus is None else min(gpus, 1), "processes": 1}
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=limited)})


def _link(link: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        raise RunError(f"{link} is a folder, but benchmark puts a link there: use another --output")
    link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
