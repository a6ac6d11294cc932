"""Inspect: a prepared file as a table and a picture, with warnings about what looks wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfkt_cli.console import say, warn
from sfkt_cli.data.pictures import check_alignment, draw_contact_sheet
from sfkt_cli.data.quality import duplicates, samples_of_store, table_text, tabulate
from sfkt_cli.data.store import Store, open_store


def inspect(path: Path, out: Path | None = None, verify: bool = False) -> dict[str, Any]:
    """Print what a prepared file holds and draw its contact sheet; returns the same as values.

    Args:
        path: source.h5, transfer.h5 or test.h5.
        out: Where the picture goes; default: beside the file, as PNG.
        verify: Read every row again and compare the checksums first.

    Raises:
        DataError: The file is missing or damaged.
    """
    store = open_store(path)
    if verify:
        store.verify()
        say(f"{path}: all checksums match")
    attrs = store.attrs
    say(
        f"{path}: {store.dataset}, {store.modality} in {store.unit}, "
        f"{attrs.get('image_size')} pixels, seed {attrs.get('seed')}, {attrs.get('protocol')}"
    )
    samples = samples_of_store(store)
    table = tabulate(samples)
    say(table_text(table, store.unit))
    for duplicate in duplicates(samples):
        warn(duplicate)
    report_alignment(store)
    picture = out or path.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_contact_sheet(store, picture)
    if drawn:
        say(f"contact sheet: {picture}")
    return {
        "file": path,
        "dataset": store.dataset,
        "modality": store.modality,
        "unit": store.unit,
        "classes": store.classes,
        "verified": verify,
        "table": [vars(line) for line in table],
        "picture": picture if drawn else None,
    }


def report_alignment(store: Store, names: Mapping[str, str] | None = None) -> None:
    """Say whether the pairs of a store look registered, and warn where they do not."""
    if not store.registered:
        return
    alignment = check_alignment(store, names)
    if alignment is None:
        return
    say(alignment.summary())
    for warning in alignment.warnings():
        warn(warning)
