"""What each prepared file holds, and how images get there: in parallel, straight into their rows.

A :class:`Plan` says which columns and attributes each file has. The samples of transfer.h5 have
numbers for names. What they are called, where they came from and which scene they show often tells
the class, so it lies in test.h5 (``names``).

A block is a range of rows of one part: the process that gets it loads record after record and
writes each row at its offset. So memory holds one sample a process, whatever the size of the
archive.
"""

import functools
import hashlib
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.records import Archive, Loader, Record
from sfkt_cli.data.splits import Parts
from sfkt_cli.data.store_writer import StoreWriter, file_bytes, text_column
from sfkt_cli.errors import DataError, follow_parent
from sfkt_cli.files import sha256_json
from sfkt_cli.machine import cores
from sfkt_cli.settings.config import Config

FILES: dict[str, tuple[str, ...]] = {
    "transfer.h5": ("ti", "target"),
    "test.h5": ("test",),
    "source.h5": ("source",),
}
"""The parts in each file; ``test.h5`` also has labels of the target part, and names."""
UNNAMED = FILES["transfer.h5"]
FEW_IMAGES = 256  # up to this number, images are read in this process: starting others takes longer
View = Literal["rgb", "target"]
VIEWS: dict[str, tuple[View, ...]] = {
    "source": ("rgb",),
    "target": ("target",),
    "test": ("rgb", "target"),
    "ti": ("rgb", "target"),
}
"""What is stored of the samples of each part."""


@dataclass(frozen=True)
class Block:
    """A block of rows of one part, from row ``first`` on: its records, and where they go."""

    part: str
    first: int
    records: tuple[Record, ...]
    views: tuple[View, ...]
    writer: StoreWriter


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is written; labels are indices into ``classes``."""

    config: Config
    archive: Archive
    parts: Parts
    classes: tuple[str, ...]

    def files(self) -> dict[str, tuple[str, ...]]:
        """The files to write; without labelled RGB images there is no source.h5."""
        return {n: p for n, p in FILES.items() if n != "source.h5" or self.parts["source"]}

    def views(self, part: str) -> tuple[View, ...]:
        """What is stored of a part's samples; test has RGB where all of them have partners."""
        alone = part == "test" and any(record.rgb is None for record in self.parts[part])
        return ("target",) if alone else VIEWS[part]

    def attributes(self) -> dict[str, Any]:
        """Root attributes of every file."""
        return {
            "dataset": self.config.dataset,
            "modality": self.archive.loader.sensor.modality,
            "unit": self.archive.loader.sensor.stored_unit,
            "classes": list(self.classes),
            "registered": self.archive.registered,
            "archive_sha256": self.archive.digest_without_times or self.archive.digest,
            "image_size": self.config.image_size,
            "fit": self.config.prepare.fit,
            "protocol": self.config.split.protocol,
            "seed": self.config.seed,
            "parts_sha256": sha256_json(
                {part: [record.id for record in records] for part, records in self.parts.items()}
            ),
        }

    def small_columns(self, parts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Ids, groups, paths and labels of some parts, by column name."""
        columns: dict[str, NDArray[Any]] = {}
        in_order = dict.fromkeys(r.group for part in UNNAMED for r in self.parts[part])
        groups = {group: f"group-{number:06d}" for number, group in enumerate(in_order)}
        for part in parts:
            records, unnamed = self.parts[part], part in UNNAMED
            ids = list(self.numbered(part)) if unnamed else [record.id for record in records]
            columns[f"{part}/id"] = text_column(ids)
            scenes = (groups[r.group] if unnamed else r.group for r in records)
            columns[f"{part}/group"] = text_column(scenes)
            for view in self.views(part):
                paths = ids if unnamed else [getattr(record, view) for record in records]
                columns[f"{part}/path_{view}"] = text_column(paths)
            if part in ("source", "test"):
                columns[f"{part}/label"] = self._labels(records)
        if "test" in parts:
            columns |= self._known_of_unnamed()
        return columns

    def numbered(self, *parts: str) -> dict[str, Record]:
        """The samples of ``ti`` or ``target`` by their ids in transfer.h5, row by row."""
        return {f"{p}-{row:06d}": r for p in parts for row, r in enumerate(self.parts[p])}

    def _known_of_unnamed(self) -> dict[str, NDArray[Any]]:
        """What test.h5 says about the samples of transfer.h5: labels and names, by id."""
        everything, target = self.numbered(*UNNAMED), self.numbered("target")
        records = everything.values()
        labelled = {number: r for number, r in target.items() if r.label is not None}
        return {
            "labels/id": text_column(labelled),
            "labels/label": self._labels(labelled.values()),
            "names/id": text_column(everything),
            "names/images": text_column(["0" * 64]),  # of transfer.h5, once they are known
            "names/name": text_column(record.id for record in records),
            "names/group": text_column(record.group for record in records),
            "names/path_rgb": text_column(record.rgb for record in records),
            "names/path_target": text_column(record.target for record in records),
        }

    def image_columns(self, parts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of the image columns of some parts."""
        sensor = self.archive.loader.sensor
        shapes = {
            "rgb": ((sensor.image_size, sensor.image_size, 3), "uint8"),
            "target": (sensor.stored_shape, sensor.dtype),
        }
        return {
            f"{part}/{view}": ((len(self.parts[part]), *shapes[view][0]), shapes[view][1])
            for part in parts
            for view in self.views(part)
        }

    def file_bytes(self) -> dict[str, int]:
        """How much room each file needs, at most."""
        return {
            name: file_bytes(self.small_columns(parts), self.image_columns(parts))
            for name, parts in self.files().items()
        }

    def blocks(self, part: str, writer: StoreWriter) -> list[Block]:
        """The blocks of rows of a part."""
        records, views = self.parts[part], self.views(part)
        step = writer.columns[f"{part}/{views[0]}"].block_rows
        return [
            Block(part, first, tuple(records[first : first + step]), views, writer)
            for first in range(0, len(records), step)
        ]

    def _labels(self, records: Iterable[Record]) -> NDArray[np.int64]:
        index = {name: label for label, name in enumerate(self.classes)}
        return np.array([index[record.label or ""] for record in records], dtype=np.int64)


@dataclass(frozen=True)
class Sample:
    """What is known of a stored sample without keeping its pixels."""

    part: str
    row: int
    id: str
    group: str
    label: str  # class name; "" where it is not known
    hashes: dict[str, bytes]  # SHA-256 of each view's pixels
    low: int = 0  # smallest reading of the target image; 0 where there is none
    high: int = 0  # largest reading
    missing: float = 0.0  # share of zeros


def ingest(plan: Plan, writers: Mapping[str, StoreWriter]) -> Iterator[list[Sample]]:
    """Write all images, in parallel processes; yield the samples of each block as it is done.

    ``writers`` are the files by part. No two blocks have the same row.

    Raises:
        DataError: An image is damaged; the message names it.
        OSError: From the file system.
    """
    blocks = [block for part, writer in writers.items() for block in plan.blocks(part, writer)]
    run = functools.partial(load_block, plan.archive.loader)
    processes = plan.config.prepare.workers or cores()
    if processes == 1 or sum(len(block.records) for block in blocks) <= FEW_IMAGES:
        yield from map(run, blocks)
        return
    # The fork server listens on a socket below TMPDIR, and its path may have 103 bytes at most.
    start = "forkserver" if len(os.fsencode(tempfile.gettempdir())) <= 70 else "spawn"
    pool = ProcessPoolExecutor(processes, get_context(start), _begin_worker)
    waiting = (pool.submit(run, block) for block in blocks)
    try:
        # A few at a time: each block carries its records.
        running = set(islice(waiting, 2 * processes + 2))
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            running |= set(islice(waiting, len(finished)))
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        raise DataError(
            "a process that decoded images ended early: set prepare.workers lower if the memory is "
            'too small; in a script of your own, call prepare below `if __name__ == "__main__":`, '
            "or each process runs the script again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load_block(loader: Loader, block: Block) -> list[Sample]:
    """Load, write and hash one block of rows."""
    samples = []
    with block.writer.open() as file:
        for row, record in enumerate(block.records, block.first):
            images: dict[str, NDArray[Any]] = {}
            for view in block.views:
                load = loader.rgb if view == "rgb" else loader.target
                images[view] = load(record)
                block.writer.write(file, f"{block.part}/{view}", row, images[view][None])
            about = block.part, row, record.id, record.group, record.label or ""
            samples.append(sample_of(*about, images, loader.sensor.missing))
    return samples


def sample_of(
    part: str, row: int, id: str, group: str, label: str, images: Mapping[str, NDArray[Any]],
    missing: bool,
) -> Sample:  # fmt: skip
    """The sample that these images are, by view; ``missing``: whether 0 means "no reading"."""
    hashes = {view: hashlib.sha256(pixels.tobytes()).digest() for view, pixels in images.items()}
    summary = summarise_target(images["target"], missing) if "target" in images else ()
    return Sample(part, row, id, group, label, hashes, *summary)


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


def _begin_worker() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent gets them, too, and ends the pool
        signal.signal(number, signal.SIG_IGN)
    follow_parent(lambda: os._exit(1))
