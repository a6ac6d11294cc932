"""The labels of test.h5 and of to_label.csv, matched to images. Only ``evaluate`` may come here."""

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.store import Store
from sfkt_cli.errors import DataError
from sfkt_cli.files import csv_rows

Numbers = NDArray[Any]
SAME = ("archive_sha256", "parts_sha256")  # attributes that the files of one run have in common
TO_LABEL = "to_label.csv"
"""The list of images to label, in the run folder: ``name,label``, a line for each image."""


@dataclass(frozen=True)
class Split:
    """Images to predict, and the labels of those that have one."""

    name: str  # ``target`` or ``test``
    ids: list[str]  # sample ids (N,)
    names: list[str]  # what the archive calls them (N,)
    target: Numbers  # (N, H, W[, C]) stored target images
    rgb: Numbers | None  # (N, H, W, 3) RGB partners; None where there are none
    rows: NDArray[np.int64]  # (L,) rows that have a label
    labels: NDArray[np.int64]  # (L,) their class indices
    scenes: list[str]  # names of the scenes (N,)

    @functools.cached_property
    def truth(self) -> dict[int, int]:
        """Class index of each labelled row."""
        return dict(zip(self.rows.tolist(), self.labels.tolist(), strict=True))

    @property
    def groups(self) -> NDArray[np.int64]:
        """Integers (L,), the same for samples of one scene."""
        _, numbers = np.unique(np.array(self.scenes), return_inverse=True)
        return numbers[self.rows].astype(np.int64)


def read_splits(transfer: Store, test: Store) -> list[Split]:
    """The target images of transfer.h5 and, where there are some, the held-out ones of test.h5.

    Raises:
        DataError: The two files do not belong together, or a label is none of the classes.
    """
    if transfer.classes != test.classes:
        raise DataError(
            f"{test.path} has the classes {', '.join(test.classes)}, but {transfer.path} has "
            f"{', '.join(transfer.classes)}: run `sfkt prepare` again with --force"
        )
    if any(transfer.attrs.get(key) != test.attrs.get(key) for key in SAME):
        raise DataError(
            f"{test.path} does not belong to {transfer.path}: they were prepared from other data "
            "or with other settings; put the right file there, or run `sfkt prepare` again with "
            "--force"
        )
    ids, archive = transfer.strings("target/id"), test.names()
    groups = zip(ids, transfer.strings("target/group"), strict=True)
    named = [archive.get(pair[0], pair) for pair in groups]
    names, scenes = [name for name, _ in named], [scene for _, scene in named]
    rows, labels = _match(transfer, test, ids)
    images = transfer["target/target"]
    splits = [Split("target", ids, names, images, None, rows, labels, scenes)]
    if test.count("test"):
        labels = test.labels("test") if "test/label" in test else np.zeros(0, np.int64)
        rows, rgb, images = np.arange(len(labels)), None, test["test/target"]
        if "test/rgb" in test:
            rgb = test["test/rgb"]
        ids, scenes = test.strings("test/id"), test.strings("test/group")
        splits.append(Split("test", ids, ids, images, rgb, rows, labels, scenes))
    for split in splits:
        outside = (split.labels < 0) | (split.labels >= len(test.classes))
        if outside.any():
            raise DataError(
                f"{test.path}: label {split.labels[outside][0]} of split {split.name} is none of "
                f"the {len(test.classes)} classes: run `sfkt prepare` again with --force"
            )
    return splits


def read_own_labels(path: Path) -> dict[str, str]:
    """The class names that the user wrote into to_label.csv, by the name of the image.

    Lines without a label are left out; nothing where there is no such file.

    Raises:
        DataError: The file cannot be read, or is no such list.
    """
    if not path.is_file():
        return {}
    labels: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; save it as UTF-8") from None
    for number, row in csv_rows(str(path), text):
        if row.keys() != {"name", "label"}:
            found = ", ".join(row)
            raise DataError(f"{path}: columns {found}, expected name, label")
        name, label = (unicodedata.normalize("NFC", row[column]) for column in ("name", "label"))
        if label and labels.setdefault(name, label) != label:
            raise DataError(f"{path}, line {number}: {name} has the labels {labels[name]}, {label}")
    return labels


def match_own_labels(
    path: Path, own: Mapping[str, str], split: Split, classes: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a split that the user labelled, and their class indices.

    Raises:
        DataError: A name is none of the split's images, or a label none of the classes.
    """
    places = {unicodedata.normalize("NFC", name): row for row, name in enumerate(split.names)}
    numbers = {unicodedata.normalize("NFC", name): number for number, name in enumerate(classes)}
    for name, label in own.items():
        if name not in places:
            raise DataError(
                f"{path}: {name} is none of the {len(places):,} {split.name} images of this run"
            )
        if label not in numbers:
            raise DataError(
                f"{path}: {name} has the label {label!r}, expected one of "
                f"{', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}, or nothing where "
                "it shows none of them"
            )
    rows = np.array([places[name] for name in own], np.int64)
    return rows, np.array([numbers[label] for label in own.values()], np.int64)


def _match(
    transfer: Store, test: Store, ids: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of transfer.h5 with a label in test.h5, in their order, and the labels."""
    label_of: dict[str, int] = {}
    if test.count("labels"):
        label_of = dict(zip(test.strings("labels/id"), test.labels("labels").tolist(), strict=True))
    strangers = sorted(set(label_of) - set(ids))
    if strangers:
        raise DataError(
            f"{test.path} does not belong to {transfer.path}: {len(strangers)} labelled samples, "
            f"such as {strangers[0]}, are not in it; run `sfkt prepare` again with --force"
        )
    rows = np.array([row for row, name in enumerate(ids) if name in label_of], np.int64)
    return rows, np.array([label_of[ids[row]] for row in rows], np.int64)
