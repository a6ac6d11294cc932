"""Loader: samples a second from the store over what bare reading of the same bytes reaches.

The loader's work is rows as they are stored: a GPU shifts and mirrors them itself. On a CPU that is
done while rows are copied, which is measured beside it, without a target.

Raw reading is ``preadv`` of as many bytes in one piece, in order; in RAM, copying neighbouring
rows, and, to tell the price of the order from that of the loader, copying the very rows of each
batch. The store is larger than the processor's caches. Cold: the pages of the file are dropped from
the page cache before each measurement, and the loader asks for large pages, as stages do.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from sfkt_cli.data.store import open_store
from sfkt_cli.machine import prefer_large_pages
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.runtime import Runtime
from tests.benchmarks.made import make_store
from tests.benchmarks.measuring import Row, alternate, ratio_row

BATCH, TARGET = 64, ">= 0.8"
BATCHES = 300
"""Of 64 images of 64 x 64: 390 MB; as many bytes of larger ones."""


def run(quick: bool) -> list[Row]:
    """64, 128 and 224 pixels; the store in RAM, on disk warm, on disk cold."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the thread of the training loop that makes batches
    for size in (64, 128, 224):
        batches = (BATCHES // 5 if quick else BATCHES) * 64 * 64 // size**2
        with tempfile.TemporaryDirectory(prefix="sfkt-bench-", dir=Path.cwd()) as name:
            path = Path(name) / "transfer.h5"  # on the disk of this folder
            make_store(path, size, batches * BATCH, 10)
            rows += _measure(path, size, batches, 5 if quick else 9)
    torch.set_num_threads(threads)
    return rows


def _measure(path: Path, size: int, batches: int, rounds: int) -> list[Row]:
    store = open_store(path)
    on_disk: dict[str, Any] = {name: store[f"ti/{name}"] for name in ("rgb", "target")}
    in_ram = {name: np.array(images) for name, images in on_disk.items()}
    copies = {name: np.empty_like(images[:BATCH]) for name, images in in_ram.items()}
    descriptor = os.open(path, os.O_RDONLY)
    piece = bytearray(sum(copy.nbytes for copy in copies.values()))

    def copy_rows() -> None:
        for first in range(0, batches * BATCH, BATCH):
            for name, images in in_ram.items():
                np.copyto(copies[name], images[first : first + BATCH])

    drawn = _stream(in_ram, 0.0, False)
    orders = [drawn.draw(0, step)[0] for step in range(batches)]

    def copy_same_rows() -> None:
        for rows in orders:
            for name, images in in_ram.items():
                np.take(images, rows, axis=0, out=copies[name], mode="clip")

    def read() -> None:
        for number in range(batches):
            os.preadv(descriptor, [piece], number * len(piece))

    def forget() -> None:
        for images in on_disk.values():
            images._mmap.madvise(mmap.MADV_DONTNEED)  # what is mapped is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    rows = []
    raw, same = "raw reading", "copying the same rows"
    for kind, arrays, bare, before in (
        ("RAM", in_ram, {raw: copy_rows, same: copy_same_rows}, None),
        ("disk, warm", on_disk, {raw: read}, None),
        ("disk, cold", on_disk, {raw: read}, forget),
    ):
        for what, shift, flip, target in (
            ("as stored", 0.0, False, TARGET),
            ("shifted and mirrored", 0.08, True, ""),
        ):
            stream = _stream(arrays, shift, flip)

            def load(stream: Stream = stream, cold: bool = before is not None) -> None:
                if cold:
                    prefer_large_pages(stream.arrays.values())
                for step in range(batches):
                    stream.batch(0, step)

            title = f"{size} px, {kind}, {what}"
            for name, yardstick in bare.items():
                ours, theirs = alternate(load, yardstick, rounds, before)
                rows.append(ratio_row(f"loader / {name}, {title}", theirs, ours, target))
            rows.append(Row(f"loader, {title}", batches * BATCH / median(ours), "samples/s"))
    os.close(descriptor)
    return rows


def _stream(arrays: dict[str, Any], shift: float, flip: bool) -> Stream:
    cpu = Runtime(torch.device("cpu"), torch.float32)
    return Stream(
        arrays, name="loader", seed=0, batch_size=BATCH, shift=shift, flip=flip, runtime=cpu
    )
