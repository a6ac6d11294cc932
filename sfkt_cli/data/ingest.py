"""Decoding and resampling in parallel, rows written straight into the unfinished store.

A task is one block of rows of one part: the process that gets it loads record after record, writes
each row at its offset and hashes as it goes. So memory holds one image a process, whatever the
size of the archive.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.records import Loader, Record
from sfkt_cli.data.store_writer import Slot, close_descriptor
from sfkt_cli.errors import DataError
from sfkt_cli.signals import follow_parent

FEW_IMAGES = 256
"""Up to this number, images are read in this process: starting others takes longer."""
View = Literal["rgb", "target"]


@dataclass(frozen=True)
class Task:
    """A block of rows of one part.

    Attributes:
        part: source, target, test or ti.
        first: Row of the first record.
        records: What goes into the rows.
        slots: Where each view goes.
    """

    part: str
    first: int
    records: tuple[Record, ...]
    slots: tuple[tuple[View, Slot], ...]


@dataclass(frozen=True)
class Seen:
    """What is known of a stored sample without keeping its pixels.

    Attributes:
        hashes: First 16 hex digits of the SHA-256 of each view's pixels.
        low: Smallest reading of the target image; 0 where there is none.
        high: Largest reading.
        missing: Share of zeros.
    """

    hashes: dict[str, str]
    low: int = 0
    high: int = 0
    missing: float = 0.0


@dataclass(frozen=True)
class Done:
    """A finished task: its checksums by view, and what was seen of its records."""

    task: Task
    sha256: dict[View, bytes]
    seen: tuple[Seen, ...]


def ingest(
    tasks: Sequence[Task], loader: Loader, size: int, missing: bool, workers: int
) -> Iterator[Done]:
    """Run tasks in parallel processes and yield them as they are done.

    Args:
        tasks: Blocks of rows; no two write the same row.
        loader: Loads the images.
        size: Side of the stored images in pixels.
        missing: Whether 0 in target images means "no reading".
        workers: Processes; 0: one a core.

    Raises:
        DataError: An image is damaged; the message names it.
        OSError: From the file system.
    """
    processes = workers or len(os.sched_getaffinity(0))
    if processes == 1 or sum(len(task.records) for task in tasks) <= FEW_IMAGES:
        for task in tasks:
            yield run_task(task, loader, size, missing)
        return
    # The fork server listens on a socket below TMPDIR, and its path may have 103 bytes at most.
    start = "forkserver" if len(os.fsencode(tempfile.gettempdir())) <= 70 else "spawn"
    pool = ProcessPoolExecutor(
        processes, get_context(start), _begin_worker, (loader, size, missing)
    )
    try:
        yield from _in_window(pool, tasks, 2 * processes + 2)
    except BrokenProcessPool:
        raise DataError(
            "a process that decoded images was killed (out of memory?): set prepare.workers lower"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_task(task: Task, loader: Loader, size: int, missing: bool) -> Done:
    """Load, write and hash one block of rows."""
    digests = {view: hashlib.sha256() for view, _ in task.slots}
    seen = []
    for row, record in enumerate(task.records, task.first):
        hashes: dict[str, str] = {}
        summary: tuple[int, int, float] = (0, 0, 0.0)
        for view, slot in task.slots:
            pixels = loader.rgb(record, size) if view == "rgb" else loader.target(record, size)
            raw = slot.write(row, pixels)
            row_digest = hashlib.sha256(raw).digest()
            digests[view].update(row_digest)
            hashes[view] = row_digest.hex()[:16]
            if view == "target":
                summary = summarise_target(pixels, missing)
        seen.append(Seen(hashes, *summary))
    return Done(task, {view: digest.digest() for view, digest in digests.items()}, tuple(seen))


def summarise_target(target: NDArray[Any], missing: bool) -> tuple[int, int, float]:
    """Smallest and largest reading of a target image, and its share without a reading."""
    high = int(target.max())
    if not missing:
        return int(target.min()), high, 0.0
    if not high:
        return 0, 0, 1.0
    one = target.dtype.type(1)
    low = int((target - one).min()) + 1  # unsigned: 0 wraps round to the largest value
    return low, high, 1.0 - int(np.count_nonzero(target)) / target.size


def _in_window(pool: ProcessPoolExecutor, tasks: Sequence[Task], window: int) -> Iterator[Done]:
    """Keep some tasks submitted, not all: each carries its records."""
    pending: set[Future[Done]] = set()
    for task in tasks:
        pending.add(pool.submit(_work, task))
        if len(pending) >= window:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in finished)


_settings: tuple[Loader, int, bool]


def _begin_worker(loader: Loader, size: int, missing: bool) -> None:
    global _settings
    _settings = (loader, size, missing)
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent gets them, too, and ends the pool
        signal.signal(number, signal.SIG_IGN)
    follow_parent(lambda: os._exit(1))


def _work(task: Task) -> Done:
    try:
        return run_task(task, *_settings)
    finally:
        for _, slot in task.slots:
            close_descriptor(slot.path)
