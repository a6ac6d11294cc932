"""`--dry-run`: what a stage would read, do and write, how long and how large; nothing is written.

Training stages are tried with a few batches, ``prepare`` and ``evaluate`` with some images.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfkt_cli.config import Config, fixed_batch_size
from sfkt_cli.console import event, say, warn
from sfkt_cli.data.download import missing_files
from sfkt_cli.data.layout import Plan as Layout
from sfkt_cli.data.readers import archive_root, read_archive
from sfkt_cli.data.store import open_store
from sfkt_cli.methods.oracle import OracleObjective
from sfkt_cli.models.saving import load_model
from sfkt_cli.runs import Run
from sfkt_cli.stages.bridge import classifier_of
from sfkt_cli.stages.contenders import (
    contenders,
    load_models,
    model_digests,
    raw_encoding,
    student_encoding,
)
from sfkt_cli.stages.outlook import free_bytes, outlook_of, size_text, tell
from sfkt_cli.stages.prepare import gaps, make_plan
from sfkt_cli.stages.transfer import find_method
from sfkt_cli.training.loop import Batch, Plan, cosine
from sfkt_cli.training.optimizers import classifier_optimizer
from sfkt_cli.training.predicting import predict_rows
from sfkt_cli.training.runtime import count_gpus, make_runtime, use_gpus
from sfkt_cli.training.trial import Trial, Tried, train

IMAGES = 32
"""So many images of the archive are read, and so many predicted at a time."""


def try_training(
    name: str, stage: Callable[[Config, Run], None], config: Config, run: Run
) -> dict[str, Any]:
    """Let a training stage do all it does up to its first batches, and time those.

    Args:
        name: Of its folder, such as ``transfer/tgkt``.
        stage: Its function.
        config: Settings.
        run: The run.

    Raises:
        SfktError: What the stage itself would refuse.
    """
    began = time.monotonic()
    alone, notes = in_one_process(config)
    try:
        stage(alone, replace(run, dry=True))
    except Tried as tried:
        trial = tried.trial
    else:
        if run.finished(name) and not run.force:
            return {"stage": name, "done": True}
        does = f"takes the model of {config.source.checkpoint} and looks at what it says"
        if config.source.mixture:
            does = f"puts the models of {', '.join(map(str, config.source.mixture))} side by side"
        seconds, brought = time.monotonic() - began, config.source.checkpoint
        sizes = {str(brought): brought.stat().st_size} if brought and brought.is_file() else {}
        writes = {"model.safetensors": sum(sizes.values())}
        found = outlook_of(name, config, run, does, seconds, writes)
        return tell(replace(found, reads={**sizes, **found.reads}))
    writes = {"model.safetensors": trial.model_bytes, "checkpoint, while it runs": 0}
    writes["checkpoint, while it runs"] = trial.state_bytes
    if name == "bridge":
        store = open_store(run.transfer_store)
        count, side = store.count("target"), store["target/target"].shape[1]
        writes[f"{count:,} images"] = 2 * count * side**2
    does = (
        f"trains {trial.trained:,} of {trial.parameters:,} parameters in {trial.epochs} epochs of "
        f"{trial.steps} steps of {trial.images} images"
    )
    if run.path(name, "begun.json").is_file() and not run.force:
        notes.append("an unfinished training is there: it goes on, and takes less")
    found = outlook_of(name, config, run, does, trial.seconds, writes)
    reads = dict(found.reads)
    if name.startswith("transfer/") and not find_method(config.transfer.method).needs_bridge:
        reads = {path: size for path, size in reads.items() if Path(path).parent.name != "bridge"}
    return tell(replace(found, trial=trial, reads=reads, notes=tuple(notes)))


def in_one_process(config: Config) -> tuple[Config, list[str]]:
    """The settings for a try in this process, and what to know of it."""
    gpus = use_gpus(config.runtime)
    count = gpus or config.runtime.processes
    alone = config.runtime.model_copy(update={"gpus": min(gpus, 1), "processes": 1})
    where = "GPUs" if count_gpus() and gpus else "processes"
    notes = [f"tried in one process; {count} {where} share each batch"] if count > 1 else []
    return config.model_copy(update={"runtime": alone}), notes


def try_download(config: Config) -> dict[str, Any] | None:
    """Say what ``prepare --download`` would fetch; None where everything is there.

    Raises:
        ConfigError: The data set has no public address.
    """
    folder = archive_root(config)
    missing = missing_files(config.dataset, folder)
    if not missing:
        return None
    lines = ["download: dry run, nothing is fetched"]
    for file in missing:
        size = size_text(file.size) if file.size else "size unknown"
        lines.append(f"  fetches   {file.url} ({size})")
    lines.append(f"  writes    to {folder}, where {size_text(free_bytes(folder))} are free")
    say("\n".join(lines))
    found: dict[str, Any] = {
        "stage": "download",
        "fetches": {file.url: file.size for file in missing},
        "folder": folder,
        "free_bytes": free_bytes(folder),
    }
    event("plan", **found)
    return found


def try_prepare(config: Config, run: Run) -> dict[str, Any]:
    """Read the archive's list of files, deal them out, and read some images.

    Raises:
        DataError: The archive is missing or damaged.
        ConfigError: The chosen classes are not in it.
        RunError: The run was prepared with other settings.
    """
    archive = read_archive(config)
    with replace(run, dry=True).open("prepare", config, {"archive": archive.digest}) as stage:
        if stage is None:
            say(f"prepare: {run.path('prepare')} is finished already")
            return {"stage": "prepare", "done": True}
    layout = make_plan(config, archive)
    for gap in gaps(layout):
        warn(gap)
    sizes = {
        name: sum(
            math.prod(shape) * np.dtype(kind).itemsize
            for shape, kind in layout.image_columns(parts).values()
        )
        for name, parts in layout.files().items()
    }
    counts = {part: len(records) for part, records in layout.parts.items()}
    count = sum(counts.values())
    workers = config.prepare.workers or len(os.sched_getaffinity(0))
    seconds = _seconds_a_sample(layout) * count / workers
    does = f"reads {count:,} samples: " + ", ".join(f"{n:,} {part}" for part, n in counts.items())
    found = outlook_of("prepare", config, run, does, seconds, sizes)
    root = archive_root(config)
    return tell(replace(found, reads={str(root): 0} if root.exists() else {}))


def _seconds_a_sample(layout: Layout) -> float:
    """Mean time to load one sample, over some of each part."""
    size, loader = layout.config.image_size, layout.archive.loader
    began, tried = time.monotonic(), 0
    for part in (part for parts in layout.files().values() for part in parts):
        records = layout.parts[part]
        for row in np.unique(np.linspace(0, len(records) - 1, IMAGES // 4).astype(int)):
            for view in layout.views(part) if len(records) else ():
                (loader.rgb if view == "rgb" else loader.target)(records[row], size)
            tried += 1
    return (time.monotonic() - began) / max(tried, 1)


def try_evaluate(config: Config, run: Run) -> dict[str, Any]:
    """Ask every model of the run about some images, and try the training of the oracle.

    Raises:
        RunError: prepare or source has not been run.
        DataError: A store or a model is missing or damaged.
    """
    run.require("prepare", "sfkt prepare NAME")
    run.require("source", "sfkt source")
    store, runtime = open_store(run.transfer_store), make_runtime(config.runtime)
    models = load_models(run, store, runtime)
    encoding = student_encoding(config.encoding, store, models)
    competing = contenders(run, store, models, runtime, model_digests(run), encoding)
    counts = run.record("prepare").get("samples", {})
    count = store.count("target") + counts.get("test", 0) + store.count("ti")
    seconds = 0.0
    for contender in competing:
        began = time.monotonic()
        images = store["target/target"][: 2 * IMAGES]
        predict_rows(images, contender.load, contender.model, runtime, batch_size=IMAGES)
        seconds += (time.monotonic() - began) / len(images) * count
    names = [contender.method for contender in competing]
    trial = None
    if config.evaluate.oracle and not run.path("evaluate", "oracle", "done.json").is_file():
        trial = _try_oracle(config, run)
        seconds += trial.seconds
        names.append(f"oracle (trained for {trial.epochs} epochs of {trial.steps} steps)")
    does = f"asks {', '.join(names)} about {count:,} images"
    writes = {"tables, predictions and pictures": 3 * 2**20}
    if trial is not None:
        writes["oracle"] = trial.model_bytes
    found = outlook_of("evaluate", config, run, does, seconds, writes)
    notes = ["pictures and intervals take some seconds more"]
    if run.finished("evaluate"):
        notes.append("evaluated before: nothing is done unless a model, the data or a setting did")
    return tell(replace(found, notes=tuple(notes)))


def _try_oracle(config: Config, run: Run) -> Trial:
    """A few steps of the oracle on made-up labels: only their time counts."""
    store, runtime = open_store(run.transfer_store), make_runtime(config.runtime)
    model = classifier_of(load_model(run.path("source"), runtime.device).module)
    model.requires_grad_(True)
    smoothing, count = config.source.label_smoothing, store.count("target")
    batch_size = min(fixed_batch_size(config.runtime), count)

    def batches(epoch: int, step: int) -> Batch:
        return {
            "target": runtime.tensor(np.asarray(store["target/target"][:batch_size])),
            "labels": torch.zeros(batch_size, dtype=torch.int64, device=runtime.device),
        }

    with replace(run, dry=True, force=True).open("evaluate/oracle", config, {}) as stage:
        assert stage is not None
        steps = max(count // batch_size, config.training.min_steps)
        plan = Plan(
            title="oracle", seed=config.seed, epochs=config.transfer.epochs, steps=steps,
            weights={}, folder=stage.folder, images=batch_size,
        )  # fmt: skip
        objective = OracleObjective(model, raw_encoding(store), label_smoothing=smoothing)
        optimizer = classifier_optimizer(model, 1e-9, 1.0, 0.0)
        try:
            train(
                plan, objective, batches, optimizer, runtime, schedule=cosine, keep=model, dry=True
            )
        except Tried as tried:
            return tried.trial
    raise AssertionError("a dry run ends with Tried")
