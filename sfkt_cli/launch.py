"""Training stages in several processes: how these start, and the one message when one dies.

A stage runs in this process where one is enough. For more on this machine torch's elastic agent
starts them, notices a dead one and ends the others. Under torchrun or ``srun`` the processes exist
already: process 0 runs the command, and the others join it for the training stages.
"""

import contextlib
import errno
import functools
import itertools
import json
import logging
import multiprocessing.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from sfkt_cli.console import console, mute, outlets, say
from sfkt_cli.distributed import choose_device, use_gpus
from sfkt_cli.errors import (
    STOPPED,
    Interrupted,
    RunError,
    SfktError,
    advice_of_torch,
    first_line,
    on_stop,
    stop_signals,
)
from sfkt_cli.machine import full_memory
from sfkt_cli.settings.config import Config, as_dict, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import folder_that_counts
from sfkt_cli.stages import run_stage

SHUTDOWN_SECONDS = 45  # seconds that processes have to save their state before they are killed
MENDABLE = {kind.__name__: kind for kind in SfktError.__subclasses__()}
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
"""Parts of the messages of exchanges whose other side went away."""
_END = "end"
Result = TypeVar("Result")
Job = Mapping[str, Any]
"""A stage and what it works with, as plain values that travel between processes."""


def launch(name: str, config: Config, run: Run) -> None:
    """Run a training stage, such as ``transfer/tgkt``, in as many processes as are asked for.

    Raises:
        RunError: A process failed or was killed; one message for all of them.
        Interrupted: A signal asked any of them to stop; the state is saved.
    """
    job = {
        "name": name, "config": as_dict(config), "folder": str(run.folder), "force": run.force,
        "quiet": console.quiet, "json": outlets.json,
    }  # fmt: skip
    before = _inode(run.path(name))
    try:
        if find_world():
            number = next(_numbers)
            _meet().set(f"job{number}", json.dumps(job))
            _take_part(job, number)
            return
        gpus = use_gpus(config.runtime)
        count = gpus or config.runtime.processes
        if count == 1 or run.keeps(name):
            run_stage(name, config, run)
            return
        where = "GPUs" if gpus else "CPU processes"
        batch_size = config.runtime.batch_size
        batch = "the size that fits"
        if batch_size != "auto":
            batch = str(max(batch_size // count, 2) * count)
        say(f"{name}: {count} {where} share batches of {batch}")
        _start(job, count)
    except (SfktError, Interrupted) as error:
        # Brought back, or set aside: notes do not travel between processes.
        if run.force and before and _inode(run.path(name)) == before:
            error.add_note(f"{name} is what it was before --force")
        raise


def _inode(folder: Path) -> int:
    """Number of the folder of what counts of a stage: it stays where that is set aside; 0: none."""
    place = folder_that_counts(folder)
    return place.stat().st_ino if place.is_dir() else 0


def _agree(verdict: bool) -> bool:
    """The verdict of process 0, in all of them."""
    verdicts = [verdict]
    distributed.broadcast_object_list(verdicts, src=0)
    return verdicts[0]


def _take_part(job: Job, number: int) -> None:
    """Do a job together with the other processes; raises RunError if one goes away."""
    rank, config = int(os.environ["RANK"]), build(job["config"])
    console.quiet, outlets.json = job["quiet"], job["json"]
    if rank:
        mute()
    gpu = use_gpus(config.runtime) > 0
    stop: Interrupted | None = None
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore(f"group{number}", _meet()),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=config.runtime.timeout_seconds),
        )
        if gpu:
            torch.cuda.set_device(choose_device(config.runtime))
        try:
            run = Run(Path(job["folder"]), job["force"], main=rank == 0, agree=_agree)
            run_stage(job["name"], config, run)
        except Interrupted as stopped:
            stop = stopped
        # Process 0 writes models and pictures alone, for longer than a collective may last.
        if rank == 0:
            _meet().set(f"done{number}", "")
        _hear(f"done{number}")
        distributed.destroy_process_group()
    except RuntimeError as error:
        seen = type(error).__name__, str(error)
        if full_memory(*seen) or not _is_lost(*seen):
            raise
        raise RunError(lost_message(rank, error, config.runtime.timeout_seconds)) from error
    if stop is not None:
        _leave()
        raise stop


def _is_lost(kind: str, text: str) -> bool:
    """Whether an error, by its class and message, means that another process went away."""
    return kind.startswith("Dist") or any(mark in text for mark in LOST)


def lost_message(rank: int, error: BaseException, timeout_seconds: float) -> str:
    """What a process says whose exchange with the others failed."""
    why = first_line(error)
    slow = f"if they are only slow, set runtime.timeout_seconds above {timeout_seconds:g}; "
    timed_out = re.search("timed out|timeout", why, re.IGNORECASE)
    return (
        f"process {rank} lost the others ({why}): see their messages; {slow if timed_out else ''}"
        "the same command continues from the last saved state"
    )


# ------------------------------------------------------------------ torchrun and SLURM

_numbers = itertools.count()


def find_world(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which torch's processes meet, from torchrun or ``srun``; empty: alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: environment[name] for name in names if name in environment}
    # A batch script itself, too, has SLURM_PROCID; only a step of srun has these.
    if {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        # The first host of a list such as gpu[03-05,9],cpu1: gpu03.
        host = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", environment["SLURM_STEP_NODELIST"])
        variables = {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": "".join(filter(None, host.groups())) if host else "localhost",
            "MASTER_PORT": str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000),
        } | variables
    variables = {"LOCAL_RANK": "0"} | variables
    alone = variables.get("WORLD_SIZE", "1") == "1"
    return {} if alone or len(variables) < len(names) else variables


def run_under_launcher(command: Callable[[], Result]) -> Result | None:
    """Run a command in process 0 of torchrun or SLURM while the others share its training stages.

    Returns:
        What the command returned; None in the others, once process 0 has ended well.

    Raises:
        RunError: Process 0 ended early.
        Interrupted: The processes were stopped by a signal; the state is saved.
    """
    world = find_world()
    if not world:
        return command()
    if world["RANK"] == "0":
        _meet()  # the others wait for it, and the command may prepare data for long
        result = command()
        _meet().set(f"job{next(_numbers)}", _END)
        _leave()
        return result
    mute()
    try:
        for number in _numbers:
            text = _hear(f"job{number}")
            if text == _END:
                break
            _take_part(json.loads(text), number)
        _leave()
    except Interrupted:
        raise Interrupted("") from None  # process 0 tells
    return None


@functools.cache
def _meet() -> Store:
    """The key-value store of all processes, which the first holds; raises RunError if alone."""
    world = find_world()
    os.environ.update(world)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    except (distributed.DistError, ValueError) as error:
        variables = " ".join(f"{name}={value}" for name, value in world.items())
        raise RunError(
            f"the other processes did not start ({variables}): start all with torchrun or srun; "
            "if you want only one process, unset these variables"
        ) from error
    return PrefixStore("sfkt", store)


def _hear(key: str) -> str:
    """Wait, for as long as it takes, until a key is set."""
    store = _meet()
    try:
        while not store.check([key]):
            time.sleep(0.1)
        return bytes(store.get(key)).decode()
    except (RuntimeError, OSError):
        raise RunError("process 0 ended early: see its message") from None


def _leave() -> None:
    """Process 0 holds the store: it ends once the others have left, or after half a minute."""
    store, rank = _meet(), int(os.environ["RANK"])
    left, deadline = store.add("left", min(rank, 1)), time.monotonic() + 30
    while rank == 0 and left < int(os.environ["WORLD_SIZE"]) - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
        left = store.add("left", 0)


# ------------------------------------------------------------------ processes of this machine


@record
def _work(job: Job) -> None:
    """One process that was started here; it exits with STOPPED after a signal."""
    try:
        _take_part(job, 0)
        _leave()
    except Interrupted:
        # Returning would wait for the agent to take the result: after a signal it does not.
        sys.exit(STOPPED)


def _start(job: Job, count: int) -> None:
    """Start processes on this machine and wait for them; raises what :func:`launch` does."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="sfkt-"))
        stack.enter_context(_temporary_files_in(logs))
        stack.enter_context(on_stop(lambda number: None))  # the agent replaces it by its own
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # the agent's log
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            shutdown_timeout=SHUTDOWN_SECONDS, logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(number.name for number in stop_signals()),
        )  # fmt: skip
        try:
            elastic_launch(config, _work)(job)
        except (ChildFailedError, SignalException) as error:
            codes = [f.exitcode for f in getattr(error, "failures", {}).values()]
            if isinstance(error, ChildFailedError) and STOPPED not in codes:
                raise explain_failure(error, count) from None
            stage = job["name"].partition("/")[0]
            raise Interrupted(f"{stage} stopped; the same command continues from here") from None


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Make temporary files in a folder within the block: torch leaves one for each failed process.

    multiprocessing keeps to the folder that it makes first, so it has to make it before.
    """
    multiprocessing.util.get_temp_dir()
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def explain_failure(error: ChildFailedError, count: int) -> SfktError:
    """The one error to raise for processes that failed.

    A process that was killed takes the others with it, and they fail at their next exchange:
    killed ones are named first, then what the user can mend, then what came first.
    """
    causes = [
        (*_explain(failure, f"process {rank} of {count}"), failure.timestamp, rank)
        for rank, failure in error.failures.items()
    ]
    return min(causes, key=lambda cause: (cause[0], *cause[2:]))[1]


def _explain(failure: ProcessFailure, process: str) -> tuple[int, SfktError]:
    """How far a failure is from the cause, and the error to raise for it."""
    if failure.exitcode < 0:
        name = failure.signal_name()
        why = f"was killed ({name}; out of memory?)" if name == "SIGKILL" else f"crashed ({name})"
        report = f"{process} {why}: the same command continues from the last saved state"
        # These two come from the agent, which ends the rest.
        return 4 if name in ("SIGTERM", "SIGINT") else 0, RunError(report)
    message = failure.message
    raised = message["message"] if isinstance(message, dict) else str(message)
    name, colon, text = raised.partition(": ")
    kind, text = (name.rpartition(".")[2], text) if colon else ("Error", raised)
    lost = _is_lost(kind, text)
    if kind in MENDABLE:
        return 3 if lost else 1, MENDABLE[kind](text)
    if advice := advice_of_torch(kind, text):
        return 1, RunError(advice)
    explained = RunError(f"{process} failed: {kind}: {text}")
    if any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
        explained = RunError(
            f"the disk is full: make room, then the same command continues ({text})"
        )
    elif isinstance(message, dict):
        explained.add_note(str(message["extraInfo"]["py_callstack"]))
    return 3 if lost else 2, explained
