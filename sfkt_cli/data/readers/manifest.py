"""A list of your own images, line by line.

``manifest.csv`` (or .jsonl) in the archive's folder or zip file, or ``folders.manifest``:

    rgb,target,label,role,group
    img/0001.jpg,depth/0001.png,mug,tr,kitchen-a
    ,depth/0002.png,,target,kitchen-b
    img/0003.jpg,depth/0003.png,,ti,hall

Paths are relative to ``--root``, or to the folder in it that all files lie in. role: ``tr``
(default: dealt out by group), ``ti``, or a fixed part ``source``, ``target``, ``test``. label and
group may be empty.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from sfkt_cli.data.archive import Container, open_container
from sfkt_cli.data.records import Record
from sfkt_cli.errors import DataError
from sfkt_cli.files import csv_rows

COLUMNS = ("rgb", "target", "label", "role", "group")
NEEDED: dict[str, tuple[str, ...]] = {
    "tr": (),
    "ti": ("rgb", "target"),
    "source": ("rgb", "label"),
    "target": ("target",),
    "test": ("target", "label"),
}
"""The columns that each role needs."""
NAMES = ("manifest.csv", "manifest.jsonl")


@dataclass(frozen=True)
class Manifest:
    """Where a manifest is, and the images that it lists."""

    place: Container  # folder or zip file that it lies in
    name: str  # its name there
    images: Container  # what its paths are relative to

    def __str__(self) -> str:
        return self.place.describe(self.name)


def find_manifest(root: Path, chosen: Path | None) -> Manifest | None:
    """The manifest: the one chosen, ``root`` itself, or one of the usual names in it.

    Raises a DataError if the one chosen does not exist, or nothing is there.
    """
    if chosen is None and root.is_file() and root.suffix.lower() in (".csv", ".jsonl"):
        place = Container(root.parent)
        return Manifest(place, root.name, place)
    images = open_container(root, (), (), "give your own images with --root")
    if chosen is not None and chosen.is_file():
        return Manifest(Container(chosen.parent), chosen.name, images)
    names = images.names()
    for name in sorted(names, key=lambda name: name.count("/")):
        for end in NAMES if chosen is None else (chosen.as_posix(),):
            top = name[: -len(end)]
            if name[len(top) :].casefold() != end.casefold():
                continue
            if not top or (top[-1] == "/" and all(n.startswith(top) for n in names)):
                inside = replace(images, prefix=images.prefix + top)
                return Manifest(inside, name[len(top) :], inside)
    if chosen is not None:
        raise DataError(f"folders.manifest = {chosen} does not exist, nor does {root / chosen}")
    return None


def read_manifest(manifest: Manifest) -> list[Record]:
    """The records of a manifest; raises DataError if a line is malformed or names no file."""
    container = manifest.images
    files = {unicodedata.normalize("NFC", name): name for name in container.names()}
    records: list[Record] = []
    for number, row in _rows(manifest):
        where = f"{manifest}, line {number}"
        role = row["role"].casefold() or "tr"
        if role not in NEEDED:
            raise DataError(f"{where}: role {row['role']!r}, expected one of {', '.join(NEEDED)}")
        for column in NEEDED[role]:
            if not row[column]:
                raise DataError(f"{where}: role {role} needs a {column}")
        names = {}
        for view in ("rgb", "target"):
            name = _inside(row[view], container)
            if name and name not in files:
                raise DataError(
                    f"{where}: {view} {row[view]!r} is not in {container.describe('')}: paths are "
                    "relative to it"
                )
            names[view] = files[name] if name else None
        image = names["target"] or names["rgb"]
        if image is None:
            raise DataError(f"{where} names neither an RGB nor a target image")
        stem = str(PurePosixPath(image).with_suffix(""))
        parts = () if role == "tr" else (role,)
        label = None if role == "ti" else unicodedata.normalize("NFC", row["label"]) or None
        records.append(Record(stem, row["group"], label, names["rgb"], names["target"], parts))
    return records


def _inside(path: str, container: Container) -> str:
    """A path as the container's names are written: relative, ``/`` once, NFC."""
    top = f"{Path(container.describe('')).absolute()}/"
    plain = PurePosixPath(path.replace("\\", "/").removeprefix(top)).as_posix()
    return unicodedata.normalize("NFC", plain) if path else ""


def _rows(manifest: Manifest) -> Iterator[tuple[int, Mapping[str, str]]]:
    path = str(manifest)
    try:
        text = manifest.place.read(manifest.name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}; save it as UTF-8") from None
    rows = _json_rows if path.lower().endswith(".jsonl") else csv_rows
    for number, row in rows(path, text):
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise DataError(
                f"{path}, line {number}: column {unknown[0]!r}, expected {', '.join(COLUMNS)}"
            )
        yield number, {column: row.get(column, "") for column in COLUMNS}


def _json_rows(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unlike)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no JSON object: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is no JSON object")
        yield number, {k: "" if value is None else str(value).strip() for k, value in row.items()}


def _unlike(entries: list[tuple[str, object]]) -> dict[str, object]:
    """The entries of a JSON object; raises a ValueError if one is there twice."""
    names = [name for name, _ in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is there twice")
    return dict(entries)
