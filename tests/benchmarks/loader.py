"""Loader: samples a second from the store over what bare reading of the same bytes reaches.

Raw reading is ``readv`` of as many bytes in one piece. Cold: the pages of the file are dropped from
the page cache before each measurement, and both read neighbouring rows in order.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfkt_cli.data.batches import Stream
from sfkt_cli.data.store import open_store
from tests.benchmarks.made import make_store
from tests.benchmarks.measuring import Row, alternate, ratio_row

BATCH, TARGET = 32, ">= 0.8"


def run(quick: bool) -> list[Row]:
    """64, 128 and 224 pixels; the store in RAM, on disk warm, on disk cold."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the thread of the training loop that makes batches
    for size in (64, 128, 224):
        batches = max(((8 if quick else 32) * 64 * 64) // size**2, 4)
        with tempfile.TemporaryDirectory(prefix="sfkt-bench-", dir=Path.cwd()) as name:
            path = Path(name) / "transfer.h5"
            make_store(path, size, batches * BATCH, 10)
            rows += _measure(path, size, batches, 5 if quick else 9)
    torch.set_num_threads(threads)
    return rows


def _measure(path: Path, size: int, batches: int, rounds: int) -> list[Row]:
    store = open_store(path)
    on_disk = {name: store[f"ti/{name}"] for name in ("rgb", "target")}
    in_ram = {name: np.array(images) for name, images in on_disk.items()}
    copies = {name: np.empty_like(images[:BATCH]) for name, images in in_ram.items()}
    descriptor = os.open(path, os.O_RDONLY)
    piece = bytearray(sum(copy.nbytes for copy in copies.values()))

    def copy_rows() -> None:
        for first in range(0, batches * BATCH, BATCH):
            for name, images in in_ram.items():
                np.copyto(copies[name], images[first : first + BATCH])

    def read() -> None:
        for number in range(batches):
            os.preadv(descriptor, [piece], number * len(piece))

    def forget() -> None:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    rows = []
    count = batches * BATCH
    for kind, arrays, raw, cold in (
        ("RAM", in_ram, copy_rows, False),
        ("disk, warm", on_disk, read, False),
        ("disk, cold", on_disk, read, True),
    ):
        for what, shift, flip in (("augmented", 0.08, True), ("as stored", 0.0, False)):
            stream = _stream(arrays, shift, flip)

            def load(stream: Stream = stream) -> None:
                for step in range(batches):
                    stream.batch(0, step)

            ours, bare = alternate(
                _after(forget, load) if cold else load, _after(forget, raw) if cold else raw, rounds
            )
            title = f"{size} px, {kind}, {what}"
            rows += [
                Row(f"loader, {title}", count / sorted(ours)[len(ours) // 2], "samples/s"),
                ratio_row(f"loader / raw reading, {title}", bare, ours, TARGET),
            ]
    os.close(descriptor)
    return rows


def _stream(arrays: dict[str, Any], shift: float, flip: bool) -> Stream:
    return Stream(arrays, name="loader", seed=0, batch_size=BATCH, shift=shift, flip=flip)


def _after(before: Any, function: Any) -> Any:
    def both() -> None:
        before()
        function()

    return both
