"""Several processes for one stage: started here, or found (torchrun, SLURM) and joined.

``launch`` runs a stage in this process where one is enough. For more on this machine it starts
them through torch's elastic agent, which notices a dead one and ends the others. Under torchrun or
``srun`` the processes are there already: process 0 reads the command, the others ``follow`` it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from sfkt_cli.config import Config, RuntimeConfig, as_dict, build
from sfkt_cli.console import console, mute, say, speak_json, speaks_json
from sfkt_cli.errors import STOPPED, Interrupted, RunError
from sfkt_cli.runs import Run
from sfkt_cli.training.failures import explain_failure
from sfkt_cli.training.runtime import choose_device, use_gpus
from sfkt_cli.world import World, found_world

SHUTDOWN_SECONDS = 45
"""So long processes have to save their state before they are killed."""
_END = "end"


@dataclass(frozen=True)
class Job:
    """A stage and what it works with, as plain values that travel between processes."""

    stage: str
    config: dict[str, Any]
    folder: str
    force: bool
    quiet: bool
    json: bool

    def run(self, rank: int) -> None:
        """Call the stage as one of several processes."""
        if rank:
            mute()
        console.quiet = self.quiet or rank > 0
        speak_json(self.json and rank == 0)
        module, _, name = self.stage.partition(":")
        run = Run(Path(self.folder), self.force, main=rank == 0, agree=_agree)
        getattr(import_module(module), name)(build(self.config), run)


def launch(name: str, stage: str, config: Config, run: Run) -> None:
    """Run a training stage in as many processes as the settings ask for.

    Args:
        name: Of its folder, such as ``transfer/tgkt``.
        stage: Where its function is, such as ``sfkt_cli.stages.bridge:bridge``.
        config: Settings.
        run: The run.

    Raises:
        RunError: A process failed or was killed; one message for all of them.
        Interrupted: SIGTERM or SIGINT came, to any of them; the state is saved.
    """
    job = Job(stage, as_dict(config), str(run.folder), run.force, console.quiet, speaks_json())
    if found_world() is not None:
        _lead(job)
        return
    count = count_processes(config.runtime)
    if count == 1 or (run.finished(name) and not run.force):
        module, _, function = stage.partition(":")
        getattr(import_module(module), function)(config, run)
        return
    where = "GPUs" if use_gpus(config.runtime) else "CPU processes"
    asked = config.runtime.batch_size
    batch = "the size that fits" if asked == "auto" else str(asked // count * count)
    say(f"{name}: {count} {where} share batches of {batch}")
    _start(job, count)


def count_processes(config: RuntimeConfig) -> int:
    """Processes that a training stage starts: one a GPU, or ``runtime.processes`` on the CPU."""
    return use_gpus(config) or config.processes


def follow() -> None:
    """Do what process 0 of a found world says, until it says that this was all.

    Raises:
        RunError: Process 0 ended without a word.
        Interrupted: The processes were stopped by a signal; the state is saved.
    """
    band = _meet()
    for number in itertools.count():
        text = band.hear(f"job{number}")
        if text == _END:
            band.store.add("followed", 1)
            return
        _together(Job(**json.loads(text)), band, number)


def dismiss() -> None:
    """Tell the followers of a found world that nothing more comes; nothing where there is none."""
    band = _meet()
    band.store.set(f"job{next(band.jobs)}", _END)
    deadline = time.monotonic() + 30
    while band.store.add("followed", 0) < band.world.size - 1 and time.monotonic() < deadline:
        time.sleep(0.1)


@dataclass(frozen=True)
class _Band:
    """A world that was joined: its key-value store, and the numbers of its jobs."""

    store: Store
    world: World
    jobs: Iterator[int]

    def hear(self, key: str) -> str:
        """Wait, for as long as it takes, until a key is set."""
        try:
            while not self.store.check([key]):
                time.sleep(0.1)
            return bytes(self.store.get(key)).decode()
        except (RuntimeError, OSError):
            raise RunError("process 0 ended without a word: see its message") from None


@functools.cache
def _meet() -> _Band:
    """Meet the other processes; the first one holds the store."""
    world = found_world()
    assert world is not None
    known = {
        "RANK": world.rank,
        "LOCAL_RANK": world.local_rank,
        "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.address,
        "MASTER_PORT": world.port,
    }
    for name, value in known.items():
        os.environ.setdefault(name, str(value))
    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    return _Band(PrefixStore("sfkt", store), world, itertools.count())


def _lead(job: Job) -> None:
    band = _meet()
    number = next(band.jobs)
    band.store.set(f"job{number}", json.dumps(vars(job)))
    _together(job, band, number)


def _together(job: Job, band: _Band, number: int) -> None:
    """Take part in a job of a found world.

    Raises:
        RunError: Another process went away.
        Interrupted: A signal came, to any of the processes.
    """
    try:
        _take_part(job, band, number)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_lost(error):
            raise
        raise RunError(
            f"process {band.world.rank} lost the others ({_first_line(error)}): see their "
            "messages; the same command goes on from the last saved state"
        ) from error


def _take_part(job: Job, band: _Band, number: int) -> None:
    config = build(job.config).runtime
    world, store = band.world, band.store
    gpu = use_gpus(config) > 0
    if gpu:
        torch.cuda.set_device(choose_device(config))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore(f"group{number}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=config.timeout_seconds),
    )
    stop: Interrupted | None = None
    try:
        job.run(world.rank)
    except Interrupted as stopped:
        stop = stopped
    # Process 0 writes models and pictures alone, for longer than a collective may last.
    if world.rank == 0:
        store.set(f"done{number}", "yes")
    else:
        band.hear(f"done{number}")
    distributed.destroy_process_group()
    store.add(f"left{number}", 1)
    deadline = time.monotonic() + config.timeout_seconds
    while world.rank == 0 and store.add(f"left{number}", 0) < world.size:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if stop is not None:
        raise stop


def _agree(verdict: str) -> str:
    """The verdict of process 0, in all of them."""
    found = [verdict]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def is_lost(error: RuntimeError) -> bool:
    """Whether an error came from a collective whose other side went away."""
    text = str(error)
    marks = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
    return isinstance(error, distributed.DistError) or any(mark in text for mark in marks)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


@record
def _work(job: Job) -> None:
    """One process that was started here; it exits with STOPPED after a signal."""
    if os.environ.get("RANK") != "0":
        mute()
    try:
        _take_part(job, _meet(), 0)
    except Interrupted:
        # Returning would wait for the agent to take the result: after a signal it does not.
        sys.exit(STOPPED)


def _start(job: Job, count: int) -> None:
    """Start processes on this machine and wait for them.

    Raises:
        RunError: As in :func:`launch`.
        Interrupted: Likewise.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="sfkt-") as logs, _quiet_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            role="sfkt",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.2,
            shutdown_timeout=SHUTDOWN_SECONDS,
            signals_to_handle="SIGTERM,SIGINT",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        stopped = f"{job.stage.partition(':')[2]} stopped; the same command goes on from here"
        try:
            elastic_launch(config, _work)(job)
        except ChildFailedError as error:
            if any(failure.exitcode == STOPPED for failure in error.failures.values()):
                raise Interrupted(stopped) from None
            raise explain_failure(error, count) from None
        except SignalException:
            raise Interrupted(stopped) from None


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent's log to itself, and take its signal handlers away afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        with contextlib.suppress(ValueError):  # not the main thread: nothing was changed
            for number, handler in before.items():
                signal.signal(number, handler)
