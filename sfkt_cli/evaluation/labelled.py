"""The labels of test.h5 and of lists that users fill in. Only ``evaluate`` may use this module."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.records import nfc
from sfkt_cli.data.store import Store, digest_images
from sfkt_cli.data.text_files import csv_rows
from sfkt_cli.errors import DataError
from sfkt_cli.evaluation.models import model_digest
from sfkt_cli.files import sha256_json
from sfkt_cli.settings.runs import Run

Numbers = NDArray[Any]
SAME = ("archive_sha256", "parts_sha256")  # attributes that the files of one run have in common
LISTS = "to_label-*.csv"
"""Lists of images to label, in the run folder: ``name,label``, a line for each image.

Each is of one student and one source model. It has images on which these differ, so that it would
judge any other student by images on which that one, or the source model, is often wrong.
"""


@dataclass(frozen=True)
class Split:
    """Images to predict, and the labels of those that have one."""

    name: str  # ``target`` or ``test``
    ids: list[str]  # sample ids (N,)
    names: list[str]  # what the archive calls them (N,)
    paths: list[str]  # their files in the archive (N,); names where there are none
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

    @property
    def scene_count(self) -> int:
        """Number of scenes of which some samples have a label."""
        return len(np.unique(self.groups))


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
    other_images = "names/images" in test and (  # files of earlier versions lack it
        test.strings("names/images") != [digest_images(transfer.columns)]
    )
    if other_images or any(transfer.attrs.get(key) != test.attrs.get(key) for key in SAME):
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
    files = test.files()
    paths = _distinct([files.get(sample, "") for sample in ids], names)
    splits = [Split("target", ids, names, paths, images, None, rows, labels, scenes)]
    if test.count("test"):
        labels = test.labels("test") if "test/label" in test else np.zeros(0, np.int64)
        rows, rgb, images = np.arange(len(labels)), None, test["test/target"]
        if "test/rgb" in test:
            rgb = test["test/rgb"]
        ids, scenes = test.strings("test/id"), test.strings("test/group")
        paths = _distinct(test.strings("test/path_target"), ids)
        splits.append(Split("test", ids, ids, paths, images, rgb, rows, labels, scenes))
    for split in splits:
        outside = (split.labels < 0) | (split.labels >= len(test.classes))
        if outside.any():
            raise DataError(
                f"{test.path}: label {split.labels[outside][0]} of split {split.name} is none of "
                f"the {len(test.classes)} classes: run `sfkt prepare` again with --force"
            )
    return splits


def list_to_label(run: Run, student: str) -> Path:
    """The list of a run for the student of this method and the source model, as they are now."""
    digests = [model_digest(run, stage) for stage in (f"transfer/{student}", "source")]
    return run.path(LISTS.replace("*", sha256_json(digests)[:8]))


def read_own_labels(path: Path) -> dict[str, str]:
    """The class names that the user wrote into a list, by the name of the image.

    Lines without a label are left out. If there is no such file, there are none.

    Raises:
        DataError: The file cannot be read, or is not such a list.
    """
    if not path.is_file():
        return {}
    labels: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not in UTF-8: save it as UTF-8") from None
    for number, row in csv_rows(str(path), text):
        if row.keys() != {"name", "label"}:
            found = ", ".join(row)
            raise DataError(f"{path}: columns {found}, expected name, label")
        name, label = _key(row["name"]), _key(row["label"])
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
    known = (split.ids, split.names, split.paths)  # a list may hold names, see _distinct
    places = {_key(name): row for names in known for row, name in enumerate(names)}
    numbers = {_key(name): number for number, name in enumerate(classes)}
    alike = Counter(map(str.casefold, numbers))  # `Mug` will do unless `mug` and `MUG` are classes
    loose = {k.casefold(): n for k, n in numbers.items() if alike[k.casefold()] == 1}
    label_of: dict[int, int] = {}
    for name, label in own.items():
        if name not in places:
            raise DataError(
                f"{path}: {name} is none of the {len(split.paths):,} {split.name} images of this "
                "run: correct it, or delete the line; if the images were prepared again, delete "
                "the file, and `sfkt evaluate` lists others"
            )
        number = numbers.get(label, loose.get(label.casefold()))
        if number is None:
            raise DataError(
                f"{path}: {name} has the label {label!r}, expected one of "
                f"{', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}, or nothing where "
                "it shows none of them"
            )
        label_of[places[name]] = number
    return np.array([*label_of], np.int64), np.array([*label_of.values()], np.int64)


def _key(name: str) -> str:
    """A name in the form in which names are compared, whatever an editor made of it."""
    return nfc(name).strip()


def _distinct(paths: list[str], names: list[str]) -> list[str]:
    """The paths if each image has its own, else the names."""
    return paths if all(paths) and len(set(map(_key, paths))) == len(paths) else names


def _match(
    transfer: Store, test: Store, ids: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of transfer.h5 that have a label in test.h5, in their order, and these labels."""
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
