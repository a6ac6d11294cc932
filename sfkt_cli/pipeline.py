"""Runs stages with their settings: one of them, or all in order."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfkt_cli.console import confirmed, say, warn
from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import (
    Config,
    build,
    merge,
    read_yaml,
    settings_of_file,
    values_of,
)
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import (
    Settings,
    find_run,
    has_run,
    remember_run,
    resolve,
    show,
    typed_settings,
    warn_of_settings_without_effect,
)
from sfkt_cli.settings.runs import Run


def resolve_and_remember(stage: str, options: Options, *, new_run: bool = False) -> Settings:
    """The settings of a command that uses a prepared run; the run is remembered.

    ``new_run``: the command also works without a prepared run.
    """
    settings = resolve(options, stage, new_run=new_run and not has_run(options))
    _tell_settings(settings, options)
    return settings


def possible_settings(stage: str, options: Options) -> Settings:
    """The settings of a stage of a prepared run: without TI pairs shot takes the place of tgkt.

    A method that was asked for on the command line stays, and is refused later.
    """
    settings = resolve(options, stage)
    asked = any(settings.layers[place].get("transfer.method") for place in ("--set", "flag"))
    if asked or settings.stage != "transfer/tgkt" or has_pairs(settings.run):
        return settings
    warn("there are no TI pairs, and tgkt needs them: shot is used instead")
    return resolve(options.with_flags({"transfer.method": "shot"}), stage)


def _tell_settings(settings: Settings, options: Options) -> None:
    """Tell the settings with ``--verbose``, and which of them come too late; remember the run."""
    if options.verbose:
        say(f"{settings.kind}: run {settings.run.folder}\n{show(settings, defaults=False)}")
    if settings.kind != "prepare" and settings.run.finished("prepare"):
        remember_run(settings.run)
        warn_of_settings_without_effect(settings)


def run_prepare(options: Options, *, download: bool = False, accept_licence: bool = False) -> Run:
    """Run ``prepare``, after a ``download`` if wanted, and remember the run.

    A terminal asks whether the notice about the data set's licence is accepted, unless it is.
    """
    from sfkt_cli.data.download import download as fetch
    from sfkt_cli.data.readers import archive_root
    from sfkt_cli.stages.prepare import prepare

    settings = resolve(options, "prepare", new_run=True)
    config, run = settings.config, settings.run
    _tell_settings(settings, options)
    if download:
        folder = archive_root(config)
        fetch(config.dataset, folder, lambda: accept_licence or confirmed("Accept this?"))
    prepare(config, run)
    remember_run(run)
    return run


def train(stage: str, options: Options) -> dict[str, Any]:
    """Run ``source``, ``bridge`` or ``transfer`` and return its outcome.

    ``source`` runs before ``bridge`` if it is missing and possible.
    """
    from sfkt_cli.launch import launch

    settings = possible_settings(stage, options)
    _tell_settings(settings, options)
    if stage == "bridge" and source_comes_first(settings):
        say("bridge: there is no source model yet; `sfkt source` runs first")
        train("source", replace(options, force=False))
        settings = resolve(options, "bridge")
    launch(settings.stage, settings.config, settings.run)
    return settings.run.outcome(settings.stage)


def source_comes_first(settings: Settings) -> bool:
    """Whether ``bridge`` lacks a source model that ``source`` can make."""
    run = settings.run
    possible = run.source_store.is_file() or settings.config.source.brought
    return possible and run.finished("prepare") and not run.finished("source")


def run_evaluate(options: Options, report: Path | None = None) -> dict[str, Any]:
    """Run ``evaluate`` and return its outcome, with its rows."""
    from sfkt_cli.evaluation.report import read_results
    from sfkt_cli.stages.evaluate import evaluate

    settings = resolve_and_remember("evaluate", options)
    if method := options.flags.get("transfer.method"):
        settings.run.require(f"transfer/{method}")
    evaluate(settings.config, settings.run, report)
    return settings.run.outcome("evaluate") | read_results(settings.run).model_dump(mode="json")


def run_benchmark(
    options: Options, file: Path | None, output: Path | None, processes: int
) -> dict[str, Any]:
    """Run ``benchmark``: every cell of the file that is not done, then the tables."""
    from sfkt_cli.benchmark.plan import read_plan
    from sfkt_cli.benchmark.run import benchmark, dry_run

    try:
        plan = read_plan(file)
    except ConfigError:
        names = read_yaml(file) if file and file.is_file() else {}
        sections = {name.partition(".")[0] for name in names}
        if sections and sections <= {*Config.model_fields}:
            raise ConfigError(
                f"{file} holds the settings of one run, not what to compare: start it with "
                f"`sfkt run {file}`"
            ) from None
        raise
    overrides = merge(*typed_settings(options).values())
    folder = output or plan.output
    if options.dry_run:
        return dry_run(plan, folder, overrides)
    command = shlex.join(["sfkt", *sys.argv[1:]])
    benchmark(plan, folder, processes=processes, overrides=overrides, command=command)
    tables: dict[str, Any] = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    return {"folder": folder, **tables}


def run_all(options: Options) -> dict[str, Any]:
    """Run every stage in order; finished ones say so and are left out. Tells what came of it."""
    if "dataset" not in merge(*typed_settings(options).values()) and has_run(options):
        demo = resolve(options, "prepare", new_run=True)
        last = find_run(options, None, new_run=False).folder
        if last != demo.run.folder and Run(last).finished("prepare"):
            say(f"run: the built-in demo, in {demo.run.folder}; for {last} add --run {last}")
    run = run_prepare(options)
    options = replace(options, run=run.folder)
    if not has_pairs(run):
        warn("bridge: left out, there are no TI pairs to learn it from")
    for stage in training_stages(run):
        train(stage, options)
    return run_evaluate(options)


def training_stages(run: Run) -> list[str]:
    """The stages between ``prepare`` and ``evaluate``; ``bridge`` only if there are TI pairs."""
    return ["source", *(["bridge"] if has_pairs(run) else []), "transfer"]


def has_pairs(run: Run) -> bool:
    """Whether a prepared run has TI pairs; true if that is not known yet."""
    from sfkt_cli.data.store import open_store

    return not run.transfer_store.is_file() or open_store(run.transfer_store).count("ti") > 0


def check_file(path: Path) -> dict[str, Any]:
    """What a configuration file changes, by dotted name; raises one ConfigError for all."""
    values = values_of(build(settings_of_file(path), places=[str(path)]))
    defaults = values_of(Config())
    return {name: value for name, value in values.items() if value != defaults[name]}
