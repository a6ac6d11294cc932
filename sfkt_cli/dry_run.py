"""`--dry-run`: what a stage would read, do and write, how long it takes and how large it gets.

Training stages do all that they do up to the training. Models look at a few images that stand for
all, and :mod:`sfkt_cli.training.trial` times one step. Nothing is written into the run.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sfkt_cli.console import duration, event, say
from sfkt_cli.machine import cores
from sfkt_cli.pipeline import possible_settings, source_comes_first, training_stages
from sfkt_cli.settings.config import Config, values_of
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import Settings, resolve
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import deciding_settings
from sfkt_cli.stages import run_stage

SAMPLES = 4  # samples of each part that ``prepare`` is tried on
REPORT_BYTES = 3 * 2**20  # about what ``evaluate`` writes


def dry_run(stage: str, options: Options, *, download: bool = False) -> dict[str, Any]:
    """Say what one stage, or all (``run``), would do; for ``bridge`` also ``source`` before it.

    Raises:
        SfktError: The stage itself would raise this error.
    """
    if stage == "run":
        return dry_run_all(options)
    if stage == "prepare":
        settings = resolve(options, stage, new_run=True)
        planned = _try_download(settings.config) if download else None
        return {"plans": [planned, _later(stage, "the download")]} if planned else _try(settings)
    settings = possible_settings(stage, options)
    if stage == "bridge" and source_comes_first(settings):
        say("bridge: there is no source model yet; `sfkt source` would run first")
        first = dry_run("source", replace(options, force=False))
        return {"plans": [first, _later("bridge", "source")]}
    return _try(settings)


def dry_run_all(options: Options) -> dict[str, Any]:
    """Say what each stage would do, as far as its input is there."""
    settings = resolve(options, "prepare", new_run=True)
    plans = [_try(settings)]
    options = replace(options, run=settings.run.folder)
    for stage in (*training_stages(settings.run), "evaluate"):
        before, settings = settings, possible_settings(stage, options)
        ready = before.run.keeps(before.stage)
        plans.append(_try(settings) if ready else _later(stage, before.kind))
    return {"plans": plans, "seconds": sum(plan.get("seconds", 0.0) for plan in plans)}


def _try(settings: Settings) -> dict[str, Any]:
    kind, config, run = settings.kind, settings.config, replace(settings.run, dry=True)
    say(f"{kind}: dry run on a few images; nothing is written")
    if kind == "prepare":
        return _try_prepare(config, run)
    if kind == "evaluate":
        return _try_evaluate(config, run)
    return _try_training(settings.stage, config, run)


def _later(stage: str, before: str) -> dict[str, Any]:
    """Say that a stage cannot be tried yet."""
    say(f"{stage}: needs {before}, which is not done yet, so it cannot be tried")
    event("plan", stage=stage, after=before)
    return {"stage": stage, "after": before}


def _try_training(name: str, config: Config, run: Run) -> dict[str, Any]:
    from sfkt_cli.data.store import open_store
    from sfkt_cli.distributed import use_gpus
    from sfkt_cli.training.trial import Tried

    gpus = use_gpus(config.runtime)
    count = gpus or config.runtime.processes
    began = time.monotonic()
    try:
        run_stage(name, config, run)
    except Tried as tried:
        figures = tried.figures
        reads = _sizes_of(run, tried.inputs) | _sizes_of_brought(name, config)
    else:
        if run.keeps(name):
            return {"stage": name, "done": True}
        # A source model that is brought along was read, and is not trained.
        brought = config.source.checkpoint or config.training.warm_start
        mixture = config.source.mixture
        does = f"imports the model of {brought} and tries it on RGB images"
        if mixture:
            does = f"puts the models of {', '.join(map(str, mixture))} side by side"
        models = _sizes_of_brought(name, config)
        writes = {"model.safetensors": sum(models.values())}
        reads = models | _sizes_of(run, ["transfer.h5"])
        return _tell_plan(name, config, run, does, time.monotonic() - began, reads, writes)
    writes = {"model.safetensors": figures.model_bytes,
              "checkpoint, while it runs": figures.state_bytes}  # fmt: skip
    if name == "bridge":
        store = open_store(run.transfer_store)
        pictures, side = store.count("target"), store["target/target"].shape[1]
        writes[f"{pictures:,} images"] = 2 * pictures * side**2
    shared = f"tried in one process; {count} processes share each batch"
    if gpus:
        shared = f"tried on one GPU, with its share of a batch that {count} GPUs share"
    scaled = "a step with all images would take long here: time and memory are scaled up"
    begun = "there is an unfinished training: it continues, and takes less time"
    unfinished = run.has_begun(name) and not run.force
    notes = [shared] * (count > 1) + [scaled] * figures.scaled + [begun] * unfinished
    does = (
        f"trains {figures.trained:,} of {figures.parameters:,} parameters in {figures.epochs} "
        f"epoch{'s'[: figures.epochs != 1]} of {figures.steps} steps of {figures.images} images"
    )
    takes = (
        f"{figures.step_s:.3g} s a step (tried), {duration(figures.epoch_s)} an epoch for scores "
        f"and saving; {figures.peak_memory_mb:,.0f} MB of memory"
    )
    return _tell_plan(
        name, config, run, does, figures.seconds, reads, writes, notes=notes, takes=takes,
        trial=asdict(figures),
    )  # fmt: skip


def _try_download(config: Config) -> dict[str, Any] | None:
    """Say what ``prepare --download`` would fetch; None where everything is there."""
    from sfkt_cli.data.download import missing_files
    from sfkt_cli.data.readers import archive_root

    folder = archive_root(config)
    missing = missing_files(config.dataset, folder)
    if not missing:
        return None
    fetches, free = {file.url: file.size for file in missing}, free_bytes(folder)
    say("download: dry run; nothing is fetched")
    for url, size in fetches.items():
        say(f"  fetches   {url} ({size_text(size) if size else '?'})")
    say(f"  writes    to {folder}, where {size_text(free)} are free")
    plan = {"stage": "download", "fetches": fetches, "folder": folder, "free_bytes": free}
    event("plan", **plan)
    return plan


def _try_prepare(config: Config, run: Run) -> dict[str, Any]:
    """Read the archive's list of files, deal them out, and load some samples of each part."""
    from sfkt_cli.data.readers import archive_root
    from sfkt_cli.stages.prepare import make_plan, read_unless_gone

    archive, digest = read_unless_gone(config, run)
    with run.open("prepare", config, {"archive": digest}) as stage:
        if stage is None or archive is None:
            say(f"prepare: {run.path('prepare')} is finished already")
            return {"stage": "prepare", "done": True}
    plan = make_plan(config, archive)
    writes, began, tried = plan.file_bytes(), time.monotonic(), 0
    for parts in plan.files().values():
        for part in parts:
            records = plan.parts[part]
            for record in records[:: max(len(records) // SAMPLES, 1)]:
                for view in plan.views(part):
                    load = archive.loader.rgb if view == "rgb" else archive.loader.target
                    load(record)
                tried += 1
    counts = {part: len(records) for part, records in plan.parts.items()}
    count, workers = sum(counts.values()), config.prepare.workers or cores()
    seconds = (time.monotonic() - began) / max(tried, 1) * count / workers
    does = f"reads {count:,} samples: " + ", ".join(f"{n:,} {part}" for part, n in counts.items())
    root = archive_root(config)
    reads = {str(root): 0} if root.exists() else {}
    return _tell_plan("prepare", config, run, does, seconds, reads, writes)


def _try_evaluate(config: Config, run: Run) -> dict[str, Any]:
    """Ask every model of the run about a few images."""
    from sfkt_cli.data.store import open_store
    from sfkt_cli.distributed import use_gpus
    from sfkt_cli.evaluation import models as of_run
    from sfkt_cli.stages.evaluate import measuring_runtime
    from sfkt_cli.training.runtime import DryRunFigures

    run.require("prepare")
    run.require("source")
    alone = config.runtime.model_copy(update={"gpus": min(use_gpus(config.runtime), 1)})
    store, runtime = open_store(run.transfer_store), measuring_runtime(alone, dry=True)
    models = of_run.load_models(run, store, runtime)
    began, names = time.monotonic(), []
    encoding = models.encoding(config, store)
    digests = of_run.model_digests(run)
    for predictor in of_run.predictors_of(run, store, models, digests, encoding):
        names.append(predictor.method)
        predictor.ask(store["target/target"])
    figures = runtime.dry_run or DryRunFigures()
    target = store.count("target")
    count = target + run.record("prepare").get("samples", {}).get("test", 0) + store.count("ti")
    seconds = (time.monotonic() - began + figures.skipped_s) * count / target
    notes = ["pictures and intervals take some seconds more"]
    if config.evaluate.oracle and not run.path("evaluate", "oracle", "done.json").is_file():
        names.append("oracle")
        notes.append("the oracle is trained first, which takes about as long as one `transfer`")
    if run.finished("evaluate"):
        notes.append("evaluated before: only what changed since is done again")
    does = f"asks {', '.join(names)} about {count:,} images"
    writes = {"tables, predictions and pictures": REPORT_BYTES}
    reads = _sizes_of(run, ["transfer.h5", "test.h5", *digests])
    return _tell_plan("evaluate", config, run, does, seconds, reads, writes, notes=notes)


def _sizes_of(run: Run, inputs: Iterable[str]) -> dict[str, int]:
    """Bytes of a run's files by path; stores and models are named as among a stage's inputs."""
    paths = [
        run.path(*(["prepare", name] if name.endswith(".h5") else [name, "model.safetensors"]))
        for name in inputs
    ]
    return {str(path): path.stat().st_size for path in paths if path.is_file()}


def _sizes_of_brought(stage: str, config: Config) -> dict[str, int]:
    """Bytes of the models of other places that a training stage reads, by path."""
    earlier = config.training.warm_start
    if stage == "source":
        places = [config.source.checkpoint or earlier, *config.source.mixture]
    else:
        places = [earlier and earlier / stage]
    sizes = dict[str, int]()
    for place in filter(None, places):
        paths = (place, place / "model.safetensors", place / "source" / "model.safetensors")
        sizes |= {str(path): path.stat().st_size for path in paths if path.is_file()}
    return sizes


def _tell_plan(
    stage: str,
    config: Config,
    run: Run,
    does: str,
    seconds: float,
    reads: Mapping[str, int],
    writes: Mapping[str, int],
    *,
    notes: Sequence[str] = (),
    takes: str = "",
    trial: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Say to people and scripts what a stage would do; returns the plan."""
    defaults, used = values_of(Config()), deciding_settings(stage, config)
    changed = {name: value for name, value in used.items() if defaults[name] != value}
    folder = run.path(stage)
    plan: dict[str, Any] = {
        "stage": stage, "does": does, "seconds": seconds, "settings": changed, "trial": trial,
        "reads": dict(reads), "writes": dict(writes), "notes": list(notes), "folder": folder,
        "free_bytes": free_bytes(folder),
    }  # fmt: skip
    settings = ", ".join(f"{name}={value}" for name, value in changed.items())
    say(f"  reads     {_sizes(reads) or 'nothing'}")
    say(f"  does      {does}")
    say(f"  settings  {settings or 'defaults'}")
    say(f"  takes     about {duration(seconds)}" + (f": {takes}" if takes else ""))
    say(f"  writes    {_sizes(writes)} in {folder}")
    say(f"  disk      {size_text(plan['free_bytes'])} are free")
    for note in notes:
        say(f"  note      {note}")
    event("plan", **plan)
    return plan


def _sizes(files: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name} ({size_text(size)})" if size else name for name, size in files.items()
    )


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or would be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def size_text(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    if count < 2**16:
        return f"{count / 2**10:,.1f} kB"
    return f"{count / 2**20:,.1f} MB" if count < 2**30 else f"{count / 2**30:,.1f} GB"
