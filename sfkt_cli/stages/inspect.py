"""`sfkt inspect`: a prepared file as a table and a picture; warnings of what looks wrong."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from sfkt_cli.console import say, warn
from sfkt_cli.data.ingest import Sample, sample_of
from sfkt_cli.data.pictures import check_alignment, draw_contact_sheet
from sfkt_cli.data.records import PARTS
from sfkt_cli.data.sensor import describe_images
from sfkt_cli.data.store import Store, open_store, spread
from sfkt_cli.errors import ConfigError

SHOWN = 20  # classes of a part in the table, where there are more
LOOKED_AT = 64  # target images of a part whose values are compared with those of another
FAR_APART = 4  # ratio of the values of TI and TR images that scenes alone seldom explain
HEADER = ("part", "class", "images", "groups", "target range", "missing")


@dataclass(frozen=True)
class Line:
    """One class in one part."""

    part: str  # source, target, test or ti
    label: str  # class name; "" where it is not known or not told
    images: int  # number of samples
    groups: int  # scenes, places, captures or subjects among them
    low: int | None  # smallest reading of the target images, None without target images
    high: int | None  # largest reading
    missing: float  # mean share of pixels without a reading; 0 outside of depth


def inspect(path: Path, out: Path | None = None, verify: bool = False) -> dict[str, Any]:
    """Print what a prepared file holds and draw its contact sheet; returns the same as values.

    Args:
        path: source.h5, transfer.h5 or test.h5.
        out: Where the picture goes; default: beside the file, as PNG.
        verify: Read every row again and compare the checksums first.

    Raises:
        ConfigError: The picture's name does not end in .png, or is the file's own.
        DataError: The file is missing or damaged.
    """
    store = open_store(path)
    picture = out or path.with_suffix(".png")
    if picture.suffix.lower() != ".png" or picture == path:
        raise ConfigError(f"--output {picture}: name another file, one that ends in .png")
    if verify:
        store.verify()
        say(f"{path}: all checksums match")
    attrs = store.attrs
    say(
        f"{path}: {store.dataset}, {store.modality} in {store.unit}, "
        f"{attrs.get('image_size')} pixels, seed {attrs.get('seed')}, {attrs.get('protocol')}"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    table, drawn = show(samples_of_store(store), store, picture)
    return {
        "file": path,
        "dataset": store.dataset,
        "modality": store.modality,
        "unit": store.unit,
        "classes": store.classes,
        "verified": verify,
        "table": table,
        "picture": picture if drawn else None,
    }


def show(
    samples: Sequence[Sample], store: Store, picture: Path, names: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """Show what was prepared: a table of samples, what looks wrong, and a picture of the store.

    ``names`` stand for ids. Returns the lines of the table, and whether a picture was drawn.
    """
    table = tabulate(samples)
    say(table_text(table, store.unit))
    problems = [*duplicates(samples), *repeated(samples), *blank_images(samples)]
    for problem in [*problems, *other_scale(store)]:
        warn(problem)
    alignment = check_alignment(store, names) if store.registered else None
    if alignment is not None:
        say(alignment.summary())
        for warning in alignment.warnings():
            warn(warning)
    drawn = draw_contact_sheet(store, picture, names)
    if drawn:
        say(f"contact sheet: {picture}")
    return [vars(line) for line in table], drawn


def samples_of_store(store: Store) -> list[Sample]:
    """Samples of a file, read again, with labels if the file has them."""
    samples = []
    for part in PARTS:
        count = store.count(part)
        if not count:
            continue
        ids, groups = store.strings(f"{part}/id"), store.strings(f"{part}/group")
        names = [""] * count
        if f"{part}/label" in store:
            names = [store.classes[label] for label in store.labels(part)]
        views = {v: store[f"{part}/{v}"] for v in ("rgb", "target") if f"{part}/{v}" in store}
        for row in range(count):
            images = {view: rows[row] for view, rows in views.items()}
            about = part, row, ids[row], groups[row], names[row]
            samples.append(sample_of(*about, images, store.modality == "depth"))
    return samples


def tabulate(samples: Iterable[Sample]) -> list[Line]:
    """One line for each part and class, and one for each part with several classes."""
    cells: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        cells[sample.part, sample.label].append(sample)
    lines = []
    for part in PARTS:
        labels = sorted(label for owner, label in cells if owner == part)
        lines += [_line(part, label, cells[part, label]) for label in labels]
        if len(labels) > 1:
            everything = [sample for label in labels for sample in cells[part, label]]
            lines.append(_line(part, "all", everything))
    return lines


def table_text(lines: Sequence[Line], unit: str) -> str:
    """The lines as aligned text; for a part with many classes, those with the fewest images."""
    rows: list[Sequence[str]] = [HEADER]
    for part, group in groupby(lines, lambda line: line.part):
        own = list(group)
        rare = sorted(own, key=lambda line: line.images)[:SHOWN]
        for line in own:
            if line in rare or line is own[-1] or len(own) <= SHOWN + 2:
                reach = "-" if line.low is None else f"{line.low}..{line.high}"
                reach += " mm" if unit == "mm" and line.low is not None else ""
                share = "-" if line.low is None else f"{100 * line.missing:.1f} %"
                counts = str(line.images), str(line.groups)
                rows.append((part, line.label or "-", *counts, reach, share))
        if len(own) > SHOWN + 2:
            rows.insert(-1, (part, f"({len(own) - 1 - SHOWN} with more)", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def duplicates(samples: Iterable[Sample]) -> list[str]:
    """A warning for each pair of parts that hold the same image, pixel by pixel."""
    pairs: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for view, group in _alike(samples):
        ids_by_part = {sample.part: sample.id for sample in reversed(group)}
        for first, second in combinations(sorted(ids_by_part, key=PARTS.index), 2):
            pairs[view, first, second].append((ids_by_part[first], ids_by_part[second]))
    return [
        f"{len(ids)} {view} image{'s'[: len(ids) > 1]} both in {first} and in {second}, "
        f"such as {ids[0][0]} and {ids[0][1]}"
        for (view, first, second), ids in sorted(pairs.items())
    ]


def repeated(samples: Iterable[Sample]) -> list[str]:
    """A warning of images that a part holds with several labels, or beside several RGB images."""
    found: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    advice = "look for frames at which the sensor stood still, and for wrong partners"
    for view, everywhere in _alike(samples):
        if view == "target" and everywhere[0].low == everywhere[0].high:
            continue  # told as blank
        for part in PARTS:
            group = [sample for sample in everywhere if sample.part == part]
            labels = {s.label: s for s in group if s.label and part != "ti"}
            rgb = {s.hashes["rgb"]: s for s in group if view == "target" and "rgb" in s.hashes}
            for differing, why in (
                (labels, "with different labels: keep the right one"),
                (rgb, f"beside different RGB images: {advice}"),
            ):
                if len(differing) > 1:
                    found[part, view, why] += [*differing.values(), *group][: len(group)]
    return [
        f"{len(group)} {view} images in {part}, such as {group[0].id} and {group[1].id}, are the "
        f"same as others {why}"
        for (part, view, why), group in sorted(found.items())
    ]


def _alike(samples: Iterable[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """Samples with the same image, pixel by pixel, and the view in which it is the same."""
    groups: dict[tuple[str, bytes], list[Sample]] = defaultdict(list)
    for sample in samples:
        for view, digest in sample.hashes.items():
            groups[view, digest].append(sample)
    return ((view, group) for (view, _), group in groups.items())


def blank_images(samples: Iterable[Sample]) -> list[str]:
    """A warning about target images that have one value everywhere."""
    blank = [s for s in samples if "target" in s.hashes and s.low == s.high]
    if not blank:
        return []
    return [
        f"{len(blank)} target image{'s'[: len(blank) > 1]} with one value everywhere, such as "
        f"{blank[0].id} in {blank[0].part}: leave out what shows nothing"
    ]


def other_scale(store: Store) -> list[str]:
    """A warning if the target images of TI and TR can hardly have the same unit."""
    middles: list[list[float]] = []
    for part in ("ti", "target"):
        if not store.count(part):
            return []
        images = [store[f"{part}/target"][row] for row in spread(store.count(part), LOOKED_AT)]
        usual = describe_images(np.array(images), store.modality == "depth")
        middles.append(usual.get("middle", [0.0, np.inf]))
    (low, high), (other_low, other_high) = sorted(middles)
    if high >= other_low or low + high > (other_low + other_high) / FAR_APART:
        return []
    ti, tr = (f"{first:,.0f} to {last:,.0f}" for first, last in middles)
    return [
        f"TI target images have values around {ti}, those of TR around {tr}: unless the scenes "
        "differ so much, bring both to one unit and gain"
    ]


def _line(part: str, label: str, samples: Sequence[Sample]) -> Line:
    targets = [sample for sample in samples if "target" in sample.hashes]
    read = [sample for sample in targets if sample.high > 0] or targets
    return Line(
        part=part,
        label=label,
        images=len(samples),
        groups=len({sample.group for sample in samples}),
        low=min((sample.low for sample in read), default=None),
        high=max((sample.high for sample in read), default=None),
        missing=round(float(np.mean([s.missing for s in targets] or [0.0])), 6),
    )
