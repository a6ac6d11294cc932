"""`sfkt inspect`: a prepared file as a table and a picture; warnings of what looks wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfkt_cli.console import say, warn
from sfkt_cli.data.ingest import Sample
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
    picture = out or path.with_suffix(".png")
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
    """Tell what was prepared: a table of samples, what looks wrong, and a picture of the store.

    ``names`` stand for ids. Returns the lines of the table, and whether a picture was drawn.
    """
    table = tabulate(samples)
    say(table_text(table, store.unit))
    for duplicate in duplicates(samples):
        warn(duplicate)
    alignment = check_alignment(store, names) if store.registered else None
    if alignment is not None:
        say(alignment.summary())
        for warning in alignment.warnings():
            warn(warning)
    drawn = draw_contact_sheet(store, picture, names)
    if drawn:
        say(f"contact sheet: {picture}")
    return [vars(line) for line in table], drawn
