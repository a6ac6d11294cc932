"""One's own data, as folders. Labels are only needed to train a source model and to evaluate.

    tr/<class>/rgb/<name>.jpg          task-relevant, labelled: for the source model
    tr/<class>/target/<name>.png       the same name makes a pair
    tr/<class>/<name>.png              target images only
    tr/target/<name>.png               target images without labels
    ti/rgb/<name>.jpg                  task-irrelevant pairs: the same path below both folders
    ti/target/<name>.png

Folders above or below ``rgb`` and ``target`` are groups (places, recordings): they stay together in
a split. Otherwise each image is its own group. A :class:`Manifest` says all this line by line
instead.

Target images are 8- or 16-bit PNG or TIFF, float TIFF or NPY, with 1 to 4 channels:

| modality            | integers                      | floats                               |
| ------------------- | ----------------------------- | ------------------------------------ |
| depth               | 16 bit: millimetres, 0 = none | metres; 0, negative, NaN = none      |
| nir, thermal, other | as they are                   | [0, 1], stored as 0..65535           |

``folders.unit`` overrides this: ``mm``, ``m``, or ``raw`` (rounded to integers).
"""

import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from sfkt_cli.data.archive import Container, find_tops, is_system, open_container, tree_drawn_in
from sfkt_cli.data.decode import SUFFIXES, tell_unread
from sfkt_cli.data.records import Archive, FileLoader, Record, collect, image_names, nfc
from sfkt_cli.data.sanity import check_targets
from sfkt_cli.data.sensor import sensor_of_config
from sfkt_cli.data.text_files import csv_rows, lines_of
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

_ADVICE = tree_drawn_in(__doc__)
_ROLES = ("tr", "ti")  # names of the folders at the top
_VIEWS = {
    "rgb": "rgb", "color": "rgb", "colour": "rgb", "target": "target", "depth": "target",
    "nir": "target", "ir": "target", "infrared": "target", "thermal": "target",
}  # fmt: skip
"""What people call the two folders; taken for groups or classes, nothing would be what it is."""
COLUMNS = ("rgb", "target", "label", "role", "group")
NEEDED: dict[str, tuple[str, ...]] = {
    "tr": (),
    "ti": ("rgb", "target"),
    "source": ("rgb", "label"),
    "target": ("target",),
    "test": ("target", "label"),
}
"""The columns of a manifest that each role needs."""
MANIFESTS = ("manifest.csv", "manifest.jsonl")
Capture = tuple[str, str | None, str]  # role, label and path without suffix
UNREGISTERED = "folders.registered is false: pixel losses are switched off"


def read(config: Config, root: Path) -> Archive:
    """List the images of a folder or manifest.

    Raises:
        DataError: The folders are not as drawn, a TI image has no partner, or target images are
            of a kind that the settings do not allow.
    """
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = () if config.folders.registered else (UNREGISTERED,)
    manifest = find_manifest(root, config.folders.manifest)
    if manifest is not None:
        facts += (f"folders: {manifest} says what is read",)
        container, records = manifest.images, read_manifest(manifest)
        notes = _elsewhere(container, image_names(records), "in no line of the manifest")
    else:
        container = open_container(root, _ROLES, (), f"give your own images with --root; {_ADVICE}")
        records, notes, about_classes = _read_tree(container)
        facts += about_classes
    targets = [record.target for record in records if record.target is not None]
    if not targets:
        advice = _ADVICE if manifest is None else f"its columns are {', '.join(COLUMNS)}"
        raise DataError(f"{manifest or root} holds no target images: {advice}")
    own = config.folders
    notes += _alike(record.label for record in records)
    sensor = sensor_of_config(config, modality=own.modality, dtype="", channels=0)
    loader = FileLoader(container, sensor)
    first = loader.target_values(min(targets))
    channels = first.shape[2] if first.ndim == 3 else 1
    expecting = replace(sensor, dtype=first.dtype.name, channels=channels)
    notes += check_targets(loader, sorted(targets), config)
    digests = [container.digest(image_names(records), times=times) for times in (True, False)]
    if manifest is not None:
        listed = hashlib.sha256(manifest.place.read(manifest.name)).hexdigest()
        digests = [hashlib.sha256(f"{each} {listed}".encode()).hexdigest() for each in digests]
    return Archive(
        records=tuple(records),
        loader=FileLoader(container, expecting),
        digest=digests[0],
        digest_without_times=digests[1],
        registered=own.registered,
        notes=notes,
        facts=facts,
    )


def _alike(labels: Iterable[str | None]) -> tuple[str, ...]:
    """A note on classes whose names differ in nothing but case."""
    names: dict[str, set[str]] = defaultdict(set)
    for label in filter(None, labels):
        names[label.casefold()].add(label)
    alike = [" and ".join(sorted(spellings)) for spellings in names.values() if len(spellings) > 1]
    advice = "are different classes: if they are not, give them one name"
    return (f"{', '.join(alike)} {advice}",) if alike else ()


def _read_tree(container: Container) -> tuple[list[Record], tuple[str, ...], tuple[str, ...]]:
    """Records, what is left out, and what the user should know."""
    inside = [name for name in container.names() if name[:3].lower() in ("tr/", "ti/")]
    captures = collect(container, functools.partial(_place, container), ())
    facts = _check_partners(container, captures, inside)
    records: list[Record] = []
    for (role, label, stem), views in captures.items():
        folder = stem.rpartition("/")[0]
        group = f"{role}/{folder}" if folder else ""
        parts = ("ti",) if role == "ti" else ()
        rgb, target = views.get("rgb"), views.get("target")
        records.append(Record(f"{label or role}/{stem}", group, label, rgb, target, parts))
    nested = [f"tr/{label}/{stem}" for _, label, stem in captures if label and "/" in stem]
    if nested:
        facts += (f"folders within a class are groups, not classes: {min(nested)}",)
    unread = tell_unread(inside)
    notes = (f"{container.describe('')}: {unread}",) if unread else ()
    return records, notes + _elsewhere(container, inside, "neither in tr nor in ti"), facts


def _place(container: Container, name: str) -> tuple[Capture, str] | None:
    """Capture and view of an image; None for other files, a DataError for misplaced ones."""
    plain = PurePosixPath(nfc(name))
    role, *folders = plain.parts[:-1] or ("",)
    role, exact = role.lower(), ("rgb", "target")
    if role not in ("tr", "ti") or plain.suffix.lower() not in SUFFIXES:
        return None
    label = None
    if role == "tr" and folders and folders[0] != "rgb":
        above = folders[1:2] in (["rgb"], ["target"])  # so a class may be called target
        if above or folders[0].casefold() not in _VIEWS:
            label = folders.pop(0)
    views = [folder for folder in folders if folder.casefold() in _VIEWS]
    view = _VIEWS[views[0].casefold()] if views else "target"
    problem = ""
    if role == "ti" and not views:
        problem = "lies neither in ti/rgb nor in ti/target"
    elif role == "tr" and label is None and view == "rgb":
        problem = "is an RGB image without a class: it belongs into tr/<class>/rgb"
    elif len(views) > 1:
        problem = f"lies in two folders, {views[0]} and {views[1]}, which say what it is: keep one"
    elif views and views[0] not in exact:
        problem = f"lies in a folder {views[0]}: call it {view}"
    if problem:
        raise DataError(f"{container.describe(name)} {problem}; {_ADVICE}")
    stem = "/".join([*(folder for folder in folders if folder not in exact), plain.stem])
    return (role, label, stem), view


def _check_partners(
    container: Container, captures: Mapping[Capture, dict[str, str]], names: Sequence[str]
) -> tuple[str, ...]:
    """TI are pairs; TR images may be of one kind, or all pairs, or two separate collections.

    Returns a sentence about each class that is two collections.
    """
    paired = {capture[:2] for capture, views in captures.items() if len(views) == 2}
    alone: dict[tuple[str, str | None, str], list[str]] = defaultdict(list)
    for (role, label, stem), views in captures.items():
        if len(views) == 1:
            alone[role, label, next(iter(views))].append(stem)
    facts = []
    for (role, label, view), stems in alone.items():
        if role == "tr" and (role, label) not in paired:
            others = alone.get((role, label, "target"), [])
            if view == "rgb" and others:
                facts.append(
                    f"tr/{label}: {len(stems)} RGB and {len(others)} target images, none of one "
                    "name: read as separate collections"
                )
            continue
        stem = min(stems)
        name = captures[role, label, stem][view]
        other = "target" if view == "rgb" else "rgb"
        partner = f"/{PurePosixPath(name).with_suffix('')}.".replace(f"/{view}/", f"/{other}/")[1:]
        unread = [n for n in names if n.startswith(partner) and not n.lower().endswith(SUFFIXES)]
        advice = "restore it" if not unread else f"convert {unread[0]}, which is not read"
        if (role, label) not in paired and not unread:
            advice = "give both images of a pair the same name, list them in manifest.csv"
        raise DataError(
            f"{container.describe(name)} has no partner {stem}.* in the folder {other}: "
            f"{advice}, or remove this one ({len(stems)} such files)"
        )
    return tuple(facts)


@dataclass(frozen=True)
class Manifest:
    """A list of one's own images, line by line, and where it is.

    ``manifest.csv`` (or .jsonl) in the archive's folder or zip file, or ``folders.manifest``:

        rgb,target,label,role,group
        img/0001.jpg,depth/0001.png,mug,tr,kitchen-a
        ,depth/0002.png,,target,kitchen-b
        img/0003.jpg,depth/0003.png,,ti,hall

    Paths are relative to its folder, those of ``folders.manifest`` to ``--root``, or to the folder
    in it that all files lie in; all images lie in that folder or below. role: ``tr`` (default:
    dealt out by group), ``ti``, or a fixed part ``source``, ``target``, ``test``. label and group
    may be empty.
    """

    place: Container  # folder or zip file that it lies in
    name: str  # its name there
    images: Container  # what its paths are relative to

    def __str__(self) -> str:
        return self.place.describe(self.name)


def find_manifest(root: Path, chosen: Path | None) -> Manifest | None:
    """The manifest: the one chosen, ``root`` itself, or one of the usual names in it.

    Of the usual names the one in the highest folder counts, unless folders ``tr`` or ``ti`` lie
    outside of it. One that is chosen, unless by an absolute path, is looked for in ``root``, or in
    the folder in it that all files lie in, and then in the working folder.

    Raises:
        DataError: The one chosen does not exist, nothing is there, or several are equally high.
    """
    if chosen is None and root.is_file() and root.suffix.lower() in (".csv", ".jsonl"):
        place = Container(root.parent)
        return Manifest(place, root.name, place)
    images = open_container(root, (), (), "give your own images with --root")
    names = images.names()
    found: list[tuple[str, str]] = []  # folder and name of each manifest
    for name in names:
        for end in MANIFESTS if chosen is None else (chosen.as_posix(),):
            top = name[: -len(end)]
            if name[len(top) :].casefold() == end.casefold() and top[-1:] in ("", "/"):
                found.append((top, name[len(top) :]))
    within = names if chosen is not None else find_tops(names if found else (), _ROLES)
    outer = [own for own in found if all(name.startswith(own[0]) for name in within)]
    outer = [own for own in outer if chosen and own[1] == chosen.as_posix()] or outer
    highest = sorted(outer, key=lambda own: own[0].count("/"))[:2]
    if len({top.count("/") for top, _ in highest}) < len(highest):
        raise DataError(
            f"{root} holds {' and '.join(map(''.join, highest))}: choose one with "
            "folders.manifest, or its folder with --root"
        )
    if highest:
        top, name = highest[0]
        inside = replace(images, prefix=images.prefix + top)
        return Manifest(inside, name, inside)
    if chosen is None:
        return None
    if not chosen.is_file():
        raise DataError(f"folders.manifest = {chosen} does not exist, nor does {root / chosen}")
    return Manifest(Container(chosen.parent), chosen.name, images)


def read_manifest(manifest: Manifest) -> list[Record]:
    """The records of a manifest; raises DataError if a line is malformed or names no file."""
    container = manifest.images
    files: dict[str, list[str]] = {}
    for name in container.names():
        files.setdefault(nfc(name), []).append(name)
    tops_of_files = {name.partition("/")[0] for name in files}
    only = f"{tops_of_files.pop()}/" if len(tops_of_files) == 1 else ""
    root = container.path / container.prefix
    tops = [nfc(f"{place}/") for place in (root.absolute(), root.resolve())]
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
            name = _inside(row[view], tops)
            alike = files.get(name, []) or files.get(only + name, [])
            if name and not alike:
                near = [other for other in files if other.casefold() == name.casefold()]
                hint = f"; did you mean {near[0]}?" if near else ""
                hidden = is_system(name) and ".." not in name.split("/")
                hint = "; hidden files and folders are not read" if hidden else hint
                raise DataError(
                    f"{where}: {view} {row[view]!r} is not in {root}: paths are relative to it, "
                    f"and images lie in it or below{hint}"
                )
            if len(alike) > 1:
                raise DataError(
                    f"{where}: {view} {row[view]!r} is the name of {len(alike)} files in "
                    f"different Unicode forms ({', '.join(map(ascii, alike))}): rename all but one"
                )
            names[view] = alike[0] if alike else None
        image = names["target"] or names["rgb"]
        if image is None:
            raise DataError(f"{where} names neither an RGB nor a target image")
        if names["rgb"] == names["target"]:
            raise DataError(
                f"{where}: rgb and target are both {image}: name the two images of the pair, or "
                "leave rgb empty"
            )
        stem = str(PurePosixPath(image).with_suffix(""))
        parts = () if role == "tr" else (role,)
        label = None if role == "ti" else row["label"] or None
        records.append(Record(stem, row["group"], label, names["rgb"], names["target"], parts))
    return records


def _elsewhere(container: Container, names: Iterable[str], why: str) -> tuple[str, ...]:
    """A note on images of the archive that are not among ``names``."""
    read = {container.prefix + name for name in names}
    every = replace(container, prefix="").names()
    others = [name for name in every if name.lower().endswith(SUFFIXES) and name not in read]
    return (f"{container.path}: not read, {why}: {len(others)}, as {others[0]}",) if others else ()


def _inside(path: str, tops: Collection[str]) -> str:
    """A path as names are written: relative to one of the folders ``tops``, ``/`` once."""
    path = path.replace("\\", "/")
    top = next((top for top in tops if path.startswith(top)), "")
    if path.startswith("/") and not top:  # by way of another link
        above = (f"{place}/" for place in Path(path).parents if nfc(f"{place.resolve()}/") in tops)
        top = next(above, "")
    return PurePosixPath(path.removeprefix(top)).as_posix() if path else ""


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
            where = path if rows is csv_rows else f"{path}, line {number}"
            raise DataError(f"{where}: column {unknown[0]!r}, expected {', '.join(COLUMNS)}")
        cells = {column: nfc(row.get(column, "")) for column in COLUMNS}
        for column, cell in cells.items():
            if re.search("[\0-\x1f\ud800-\udfff]", cell):
                raise DataError(
                    f"{path}, line {number}: {column} {cell!r} is not a single line of text"
                )
        yield number, cells


def _json_rows(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line, object_pairs_hook=tuple)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not a JSON object: {error}") from None
        if not isinstance(entries, tuple):
            raise DataError(f"{path}, line {number} is not a JSON object")
        row: dict[str, str] = {}
        for name, value in entries:
            if name in row:
                raise DataError(f"{path}, line {number}: {name!r} is given twice")
            if not isinstance(value, str | int | None) or isinstance(value, bool):
                raise DataError(f"{path}, line {number}: {name} is {value!r}: write it as a text")
            row[name] = "" if value is None else str(value).strip()
        yield number, row
