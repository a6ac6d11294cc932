"""What each prepared file holds: its columns, attributes and the tasks that fill it.

The samples of transfer.h5 have numbers for names. What they are called, where they came from and
which scene they show often tells the class, so it lies in test.h5 (``names``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.ingest import Task, View
from sfkt_cli.data.records import Archive, Record
from sfkt_cli.data.splits import Parts
from sfkt_cli.data.store_writer import StoreWriter, text_column
from sfkt_cli.files import sha256_json
from sfkt_cli.settings.config import Config

FILES: dict[str, tuple[str, ...]] = {
    "transfer.h5": ("ti", "target"),
    "test.h5": ("test",),
    "source.h5": ("source",),
}
"""The parts in each file; ``test.h5`` also has labels of the target part, and names."""
UNNAMED = FILES["transfer.h5"]


def numbered_ids(part: str, count: int) -> list[str]:
    """Ids of the samples of ``ti`` or ``target``, in the order of the rows."""
    return [f"{part}-{row:06d}" for row in range(count)]


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is written.

    Attributes:
        config: The resolved settings.
        archive: Samples and how to load them.
        parts: Who gets which sample.
        classes: TR class names; labels are indices into it.
    """

    config: Config
    archive: Archive
    parts: Parts
    classes: tuple[str, ...]

    def files(self) -> dict[str, tuple[str, ...]]:
        """The files to write; without labelled RGB images there is no source.h5."""
        return {n: p for n, p in FILES.items() if n != "source.h5" or self.parts["source"]}

    def views(self, part: str) -> tuple[View, ...]:
        """What is stored of a part's samples; test has RGB where all of them have partners."""
        partners = all(record.rgb is not None for record in self.parts[part])
        if part == "test":
            return ("rgb", "target") if partners else ("target",)
        return {"ti": ("rgb", "target"), "target": ("target",), "source": ("rgb",)}[part]  # type: ignore[return-value]

    def attributes(self) -> dict[str, Any]:
        """Root attributes of every file."""
        return {
            "dataset": self.config.dataset,
            "modality": self.archive.modality,
            "unit": self.archive.unit,
            "classes": list(self.classes),
            "registered": self.archive.registered,
            "archive_sha256": self.archive.digest,
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
        groups = self._group_numbers()
        for part in parts:
            records = self.parts[part]
            ids = [record.id for record in records]
            scenes = [record.group for record in records]
            if part in UNNAMED:
                ids = numbered_ids(part, len(records))
                scenes = [groups[scene] for scene in scenes]
            columns[f"{part}/id"] = text_column(ids)
            columns[f"{part}/group"] = text_column(scenes)
            for view in self.views(part):
                paths = [(r.rgb if view == "rgb" else r.target) or "" for r in records]
                columns[f"{part}/path_{view}"] = text_column(ids if part in UNNAMED else paths)
            if part in ("source", "test"):
                columns[f"{part}/label"] = self._labels(records)
        if "test" in parts:
            columns |= self._known_of_unnamed()
        return columns

    def names(self) -> dict[str, str]:
        """What the archive calls the samples of transfer.h5, by id."""
        return {
            number: record.id
            for part in UNNAMED
            for number, record in zip(
                numbered_ids(part, len(self.parts[part])), self.parts[part], strict=True
            )
        }

    def _known_of_unnamed(self) -> dict[str, NDArray[Any]]:
        """What test.h5 says about the samples of transfer.h5: labels and names, by id."""
        ids = {part: numbered_ids(part, len(self.parts[part])) for part in UNNAMED}
        target = zip(ids["target"], self.parts["target"], strict=True)
        labelled = [(number, record) for number, record in target if record.label is not None]
        records = [record for part in UNNAMED for record in self.parts[part]]
        return {
            "labels/id": text_column([number for number, _ in labelled]),
            "labels/label": self._labels([record for _, record in labelled]),
            "names/id": text_column([number for part in UNNAMED for number in ids[part]]),
            "names/name": text_column([record.id for record in records]),
            "names/group": text_column([record.group for record in records]),
            "names/path_rgb": text_column([record.rgb or "" for record in records]),
            "names/path_target": text_column([record.target or "" for record in records]),
        }

    def _group_numbers(self) -> dict[str, str]:
        """What the groups of transfer.h5 are called there: numbers in the order of the rows."""
        groups = dict.fromkeys(r.group for part in UNNAMED for r in self.parts[part])
        return {group: f"group-{number:06d}" for number, group in enumerate(groups)}

    def image_columns(self, parts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of the image columns of some parts."""
        size = self.config.image_size
        shapes = {
            "rgb": ((size, size, 3), "uint8"),
            "target": (self.archive.target_shape(size), self.archive.dtype),
        }
        return {
            f"{part}/{view}": ((len(self.parts[part]), *shapes[view][0]), shapes[view][1])
            for part in parts
            for view in self.views(part)
        }

    def tasks(self, part: str, writer: StoreWriter) -> list[Task]:
        """The blocks of rows of a part."""
        records, views = self.parts[part], self.views(part)
        slots = tuple((view, writer.slot(f"{part}/{view}")) for view in views)
        step = writer.block_rows(f"{part}/{views[0]}")
        return [
            Task(part, first, tuple(records[first : first + step]), slots)
            for first in range(0, len(records), step)
        ]

    def _labels(self, records: Sequence[Record]) -> NDArray[np.int64]:
        index = {name: label for label, name in enumerate(self.classes)}
        return np.array([index[record.label or ""] for record in records], dtype=np.int64)
