"""`sfkt prepare`: from an archive to the three files, by who may see them.

``source.h5`` (RGB and labels), ``transfer.h5`` (unlabelled pairs and target images) and ``test.h5``
(labels). Nothing that follows opens the archive again.
"""

import contextlib
import hashlib
from pathlib import Path

from sfkt_cli.console import say, track, warn
from sfkt_cli.data.archive import is_system
from sfkt_cli.data.ingest import UNNAMED, Plan, Sample, ingest
from sfkt_cli.data.readers import DATA_FOLDER, archive_root, read_archive
from sfkt_cli.data.records import PARTS, Archive, FileLoader
from sfkt_cli.data.splits import choose_classes, left_out, split_records
from sfkt_cli.data.store import digest_images, open_store, spread
from sfkt_cli.data.store_writer import StoreWriter, text_column, writing
from sfkt_cli.errors import DataError, RunError, first_line
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.inspect import show

FEW_PAIRS = 50  # with fewer, the bridge, and what held-out pairs judge, are left to chance
NOTABLE_CROP = 0.1
SIZES_LOOKED_AT = 64  # pairs
_FEW_GROUPS = "a class needs a group (scene, place, object; or image) for each part"


def prepare(config: Config, run: Run) -> None:
    """Read the archive, split it by group, and write source.h5, transfer.h5 and test.h5.

    Raises:
        DataError: The archive is missing or damaged, or leaves a part empty.
        ConfigError: The chosen classes are not in the archive.
        RunError: The run was prepared with other settings, or the disk is full.
    """
    archive, digest = read_unless_gone(config, run)
    with run.open("prepare", config, {"archive": digest}) as stage:
        if stage is None or archive is None:
            say(f"prepare: {run.path('prepare')} is finished already")
            return
        plan = make_plan(config, archive)
        samples = _write_stores(plan, stage)
        picture = run.path("prepare", "pairs.png")
        names = {number: r.target or r.id for number, r in plan.numbered(*UNNAMED).items()}
        table, _ = show(samples, open_store(run.transfer_store), picture, names)
        stage.finish(
            classes=list(plan.classes),
            samples={part: len(records) for part, records in plan.parts.items()},
            groups={part: len({r.group for r in records}) for part, records in plan.parts.items()},
            table=table,
        )


def make_plan(config: Config, archive: Archive) -> Plan:
    """Choose classes, divide the samples, and say what the user should know about them.

    Raises:
        ConfigError: The chosen classes are not in the archive.
        DataError: There are no target images left.
    """
    for fact in archive.facts:
        say(fact)
    for note in archive.notes:
        warn(note)
    tr, ti = choose_classes(config.classes, archive, config.source.classes)
    parts = split_records(archive.records, tr, ti, config.split, config.seed)
    rendered = config.dataset == "synthetic"
    root = "the rendered data set" if rendered else archive_root(config)
    chosen = f"TR is {', '.join(tr) or 'nothing'}; TI is {', '.join(ti) or 'nothing'}"
    if not parts["target"]:
        if not (tr or ti):
            raise DataError(
                f"{root} holds {len(parts['ti'])} TI pairs, but no target images to adapt to: add "
                "target images of the classes, with or without labels"
            )
        raise DataError(
            f"{root} leaves no TR target images: {chosen}; choose others with "
            "classes.tr, classes.ti"
        )
    if not parts["ti"]:
        warn(
            f"{root} leaves no TI pairs of RGB and target ({chosen}): there will be no bridge, and "
            "`sfkt transfer` falls back to shot, which needs none"
        )
    elif len(parts["ti"]) < FEW_PAIRS:
        warn(
            f"{root} has only {len(parts['ti'])} TI pairs: the bridge learns little from so few, "
            "and the student may be no better than your RGB model; "
            f"{'raise synthetic.pairs to have' if rendered else 'record'} {FEW_PAIRS} or more"
            f"{'' if rendered else ', of anything'}"
        )
    lost = left_out(archive.records, tr, ti, config.split, parts)
    if lost:
        counts = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        warn(f"{root}: left out of all parts: {counts}")
    plan = Plan(config, archive, parts, tuple(tr))
    if crop := cropped(plan):
        say(f"prepare: {crop}")
    if unlike := unlike_sizes(plan):
        warn(unlike)
    for gap in gaps(plan):
        warn(gap)
    alone = [record.target for record in parts["test"] if record.rgb is None]
    if 0 < len(alone) < len(parts["test"]):
        say(
            f"prepare: test images without an RGB partner: {len(alone)} of {len(parts['test'])}, "
            f"such as {alone[0]}; there will be no upper bound source-rgb"
        )
    return plan


def cropped(plan: Plan) -> str:
    """How much of the images the middle square loses; empty: next to nothing, or not known."""
    loader, config = plan.archive.loader, plan.config.prepare
    name = next((record.target for record in plan.archive.records if record.target), None)
    if not isinstance(loader, FileLoader) or config.fit != "crop" or name is None:
        return ""
    height, width = loader.target_values(name).shape[:2]
    lost = 1 - min(height, width) / max(height, width)
    if lost < NOTABLE_CROP:
        return ""
    return (
        f"only the middle square of {width} x {height} pixels is kept: {lost:.0%} of the "
        f"{'width' if width > height else 'height'} is cut off; prepare.fit=squash keeps it all, "
        f"with changed proportions. `sfkt export --input-size {height}x{width}` does the same "
        "inside the exported file"
    )


def unlike_sizes(plan: Plan) -> str:
    """What is wrong with the sizes of pairs, which show how far their images can be registered."""
    loader, pairs = plan.archive.loader, plan.parts["ti"]
    if not isinstance(loader, FileLoader) or not plan.archive.registered or not pairs:
        return ""
    unlike = []
    rows = spread(len(pairs), SIZES_LOOKED_AT)
    for rgb, target in ((pairs[row].rgb or "", pairs[row].target or "") for row in rows):
        width, height = loader.picture(rgb).size
        down, across = loader.target_values(target).shape[:2]
        if abs(width * down / (height * across) - 1) >= NOTABLE_CROP:
            unlike.append(f"{rgb} has {width} x {height} pixels, {target} {across} x {down}")
    if not unlike:
        return ""
    return (
        f"{unlike[0]} ({len(unlike)} of {len(rows)} pairs that were looked at): images of unlike "
        "proportions can hardly show the same; crop the larger view, turn what is turned, or, of "
        "data set folders, set folders.registered=false"
    )


def gaps(plan: Plan) -> list[str]:
    """Warnings about the parts: what they lack, and what has no use in them."""
    problems = []
    brought, split = plan.config.source.brought, plan.config.split
    if not plan.parts["source"] and not brought:
        problems.append(
            f"{_why_no_source(plan)} bring a source model with "
            "`sfkt source --set source.checkpoint=FILE --set source.backbone=NAME`"
        )
    idle = [
        record
        for record in plan.parts["source"]
        if record.target is not None and (not record.parts or "target" in record.parts)
    ]
    if idle and brought and split.protocol != "paper":
        problems.append(
            f"{len(idle)} labelled pairs in part source will not be used: the source model is "
            "your own; --set split.source=0 gives their target images to the target part"
        )
    held_out = split.protocol != "paper" and split.test
    if held_out and not plan.parts["test"] and any(r.label for r in plan.parts["target"]):
        problems.append(f"no target image is held out for the test: {_FEW_GROUPS}")
    effects = {
        "source": "a source model trained on it cannot tell them",
        "target": "students do not see them",
        "test": "accuracy on it says nothing about them",
    }
    if brought:
        del effects["source"]
    for part, effect in effects.items():
        labels = {record.label for record in plan.parts[part]}
        kind = "RGB" if part == "source" else "target"
        seen = {record.label for record in plan.archive.records if getattr(record, kind.lower())}
        lacking = [name for name in plan.classes if name not in labels]
        for why, some in (
            (_FEW_GROUPS, [name for name in lacking if name in seen]),
            (f"there are no {kind} images of them", [name for name in lacking if name not in seen]),
        ):
            if some and labels and None not in labels:
                names = ", ".join(some[:20]) + (", ..." if len(some) > 20 else "")
                problems.append(f"part {part} has no image of {names}: {effect}; {why}")
    return problems


def _why_no_source(plan: Plan) -> str:
    """Why the source part is empty, and what could fill it."""
    groups = {
        record.group
        for record in plan.archive.records
        if record.label in plan.classes
        and record.rgb is not None
        and (not record.parts or "source" in record.parts)
    }
    if not groups:
        return "there are no labelled RGB images to train a source model on:"
    if not plan.config.split.source:
        return "split.source = 0 leaves no labelled RGB images to train a source model on:"
    names = ", ".join(sorted(groups)[:3]) + (", ..." if len(groups) > 3 else "")
    count = "are all one group" if len(groups) == 1 else f"are only {len(groups)} groups"
    return (
        f"the labelled RGB images {count} ({names}), and groups stay whole, so none is left to "
        f"train a source model on; {_FEW_GROUPS}: divide them (a group is a folder below rgb, or "
        "the column group of a manifest), or"
    )


def read_unless_gone(config: Config, run: Run) -> tuple[Archive | None, str]:
    """The archive and its digest; no archive if the run is prepared and it was removed since."""
    root = archive_root(config)
    if config.dataset != "synthetic" and run.keeps("prepare"):
        gone = not root.exists() or (
            root.is_dir() and all(is_system(entry.name) for entry in root.iterdir())
        )
        record = run.record("prepare")
        before = Path(record["settings"].get("prepare.root") or DATA_FOLDER / config.dataset)
        if gone and root.absolute() == before.absolute():
            return None, record["inputs"]["archive"]
    archive = read_archive(config)
    return archive, archive.digest


def _write_stores(plan: Plan, stage: Stage) -> list[Sample]:
    """Write all files and return their samples, part by part; no file appears half written."""
    writers: dict[str, StoreWriter] = {}
    samples: list[Sample] = []
    try:
        with contextlib.ExitStack() as stack:
            for name, parts in plan.files().items():
                columns, images = plan.small_columns(parts), plan.image_columns(parts)
                layout = writing(stage.folder / name, plan.attributes(), columns, images)
                writers |= dict.fromkeys(parts, stack.enter_context(layout))
            count = sum(len(plan.parts[part]) for part in writers)
            tracker = stack.enter_context(track("prepare", count))
            for block in ingest(plan, writers):
                part, first = block[0].part, block[0].row
                for view in block[0].hashes:
                    rows = b"".join(sample.hashes[view] for sample in block)
                    sha256 = hashlib.sha256(rows).digest()
                    writers[part].note(f"{part}/{view}", first, sha256)
                samples += block
                tracker.advance(len(block), len(block))
            digest = digest_images(writers["target"].columns)
            writers["test"].put("names/images", text_column([digest]))
    except OSError as error:
        raise RunError(
            f"{stage.folder} cannot be written: {first_line(error)}: make room, or choose another "
            "with --run"
        ) from None
    return sorted(samples, key=lambda sample: (PARTS.index(sample.part), sample.row))
