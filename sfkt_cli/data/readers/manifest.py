"""A list of one's own images, line by line.

``manifest.csv`` (or .jsonl) in the archive's folder, or wherever ``folders.manifest`` says:

    rgb,target,label,role,group
    img/0001.jpg,depth/0001.png,mug,tr,kitchen-a
    ,depth/0002.png,,target,kitchen-b
    img/0003.jpg,depth/0003.png,,ti,hall

Paths are relative to ``--root``. role: ``tr`` (default: dealt out by group), ``ti``, or a fixed
part ``source``, ``target``, ``test``. label and group may be empty.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from sfkt_cli.data.archive import Container
from sfkt_cli.data.loading import with_safe_ids
from sfkt_cli.data.records import Record
from sfkt_cli.errors import DataError

COLUMNS = ("rgb", "target", "label", "role", "group")
ROLES = ("tr", "ti", "source", "target", "test")
NEEDED = {
    "ti": ("rgb", "target"),
    "source": ("rgb", "label"),
    "target": ("target",),
    "test": ("target", "label"),
}
MAX_BYTES = 1 << 29


def find_manifest(root: Path, chosen: Path | None) -> Path | None:
    """The manifest: the one chosen, ``root`` itself, or manifest.csv / manifest.jsonl in it.

    Raises:
        DataError: The one chosen does not exist.
    """
    if chosen is not None:
        path = chosen if chosen.is_file() else root / chosen
        if not path.is_file():
            raise DataError(f"folders.manifest = {chosen} does not exist, nor does {path}")
        return path
    if root.is_file() and root.suffix.lower() in (".csv", ".jsonl"):
        return root
    for name in ("manifest.csv", "manifest.jsonl"):
        if (root / name).is_file():
            return root / name
    return None


def read_manifest(path: Path, container: Container) -> list[Record]:
    """The records of a manifest.

    Raises:
        DataError: A line is malformed or names a file that does not exist.
    """
    files = set(container.names())
    records: list[Record] = []
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        role = row["role"].casefold() or "tr"
        if role not in ROLES:
            raise DataError(f"{where}: role {row['role']!r}, expected one of {', '.join(ROLES)}")
        for column in NEEDED.get(role, ()):
            if not row[column]:
                raise DataError(f"{where}: role {role} needs a {column}")
        names = {}
        for view in ("rgb", "target"):
            name = row[view].replace("\\", "/").removeprefix("./")
            if name and name not in files:
                raise DataError(f"{where}: {view} {row[view]!r} is not in {container.path}")
            names[view] = name or None
        image = names["target"] or names["rgb"]
        if image is None:
            raise DataError(f"{where} names neither an RGB nor a target image")
        stem = str(PurePosixPath(image).with_suffix(""))
        parts = () if role == "tr" else (role,)
        label = None if role == "ti" else row["label"] or None
        records.append(Record(stem, row["group"], label, names["rgb"], names["target"], parts))
    return with_safe_ids(records)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rows = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    for number, row in rows(path, text):
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise DataError(
                f"{path}, line {number}: column {unknown[0]!r}, expected {', '.join(COLUMNS)}"
            )
        yield number, {column: row.get(column, "") for column in COLUMNS}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: wrong number of columns")
            yield reader.line_num, {str(key).strip(): value.strip() for key, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is no JSON object")
        yield number, {key: "" if value is None else str(value) for key, value in row.items()}
