"""What a reader hands over: the list of an archive's samples, and a way to load each of them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.errors import DataError

PARTS = ("source", "target", "test", "ti")
"""Where a sample may go: RGB for the source model, unlabelled target images, held out, pairs."""
_NO_TEXT = re.compile("[\udc80-\udcff]")
"""What Python puts in the place of bytes that are not UTF-8."""
TR_PARTS = ("source", "target", "test")


@dataclass(frozen=True)
class Record:
    """One sample: an RGB image, a target image, or a pair of both; nothing is decoded yet.

    Attributes:
        id: Unique in the archive, short, usable as a file name.
        group: Scene, place, capture or subject; a group never lies in two parts.
        label: Class name; None where nobody knows it.
        rgb: Name of the RGB image in the archive; None where there is none.
        target: Name of the target image in the archive.
        parts: Where the archive allows it to go; empty: anywhere its class and images allow.
    """

    id: str
    group: str
    label: str | None
    rgb: str | None
    target: str | None
    parts: tuple[str, ...] = ()


class Loader(Protocol):
    """Loads the images of a record; it is sent to other processes, so it must be picklable."""

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """RGB (size, size, 3), resampled.

        Raises:
            DataError: The image is missing, damaged, or not what it should be.
        """

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """Target image (size, size) or (size, size, C) in the archive's unit, resampled.

        Raises:
            DataError: The image is missing, damaged, or not what it should be.
        """


@dataclass(frozen=True)
class Archive:
    """An archive as a reader sees it.

    Attributes:
        records: Sorted by id.
        loader: Loads their images.
        digest: Names the archive's content, from names, sizes, and times or checksums of files.
        modality: depth, nir, thermal or other.
        unit: Unit of target values: ``mm`` (0 = no reading) or ``raw``.
        dtype: Type of target values: uint8 or uint16.
        channels: Number of channels of a target image; 1 is stored without a channel axis.
        usual_tr: Classes recognised by default; empty: all that are not ``usual_ti``.
        usual_ti: Task-irrelevant classes by default; empty: all that are not TR.
        registered: Whether the images of a pair are aligned.
        notes: Differences from the published counts and the like, to be shown as warnings.
        facts: What the reader found out and the user should know.
    """

    records: tuple[Record, ...]
    loader: Loader
    digest: str
    modality: str
    unit: str
    dtype: str
    channels: int = 1
    usual_tr: tuple[str, ...] = ()
    usual_ti: tuple[str, ...] = ()
    registered: bool = True
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether 0 in target images means "no reading"."""
        return self.modality == "depth"

    def target_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one stored target image."""
        return (size, size) if self.channels == 1 else (size, size, self.channels)


def image_names(records: Iterable[Record]) -> list[str]:
    """Names of the images that records are made of."""
    return [name for record in records for name in (record.rgb, record.target) if name is not None]


def check_unique(records: Iterable[Record], where: object) -> tuple[Record, ...]:
    """Sort records by id and refuse ids that occur twice, and names that are no text.

    Raises:
        DataError: Two records have the same id, or a file's name is not UTF-8; the message names
            the files.
    """
    ordered = sorted(records, key=lambda record: record.id)
    for record in ordered:
        for name in (record.rgb, record.target):
            if name is not None and _NO_TEXT.search(name):
                raise DataError(
                    f"{where}: the file name {name!r} is not UTF-8: rename it; "
                    "`convmv -r -f latin1 -t utf-8 --notest DIR` renames all"
                )
    for before, record in itertools.pairwise(ordered):
        if before.id == record.id:
            raise DataError(
                f"{where}: {before.target or before.rgb} and {record.target or record.rgb} have "
                f"the same name {record.id!r}: rename one of them"
            )
    return tuple(ordered)


def compare_counts(
    records: Iterable[Record], published: dict[str, int], what: str
) -> tuple[str, ...]:
    """One warning for each class whose number of samples is not the published one."""
    counts = Counter(record.label or "" for record in records)
    names = sorted(set(counts) | set(published))
    return tuple(
        f"{what}: class {name} has {counts[name]} samples, published are {published.get(name, 0)}"
        for name in names
        if counts[name] != published.get(name, 0)
    )
