"""`--dry-run` of one stage, or of all in order: settings, then :mod:`sfkt_cli.stages.dry`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sfkt_cli.console import say
from sfkt_cli.options import Options
from sfkt_cli.settings import Settings, resolve

BEFORE = {"source": "prepare", "bridge": "source", "transfer": "bridge", "evaluate": "transfer"}
"""What each stage comes after in ``sfkt run``."""


def dry_run(stage: str, options: Options, *, download: bool = False) -> dict[str, Any]:
    """Say what one stage would do; ``bridge`` also of ``source``, which it would run first.

    Args:
        stage: Its name.
        options: What the user typed.
        download: ``prepare`` would fetch the archive first.

    Raises:
        SfktError: What the stage itself would refuse.
    """
    settings = resolve(options, stage, new_run=stage == "prepare")
    run = settings.run
    if download:
        from sfkt_cli.stages.dry import try_download

        planned = try_download(settings.config)
        if planned is not None:
            return {"plans": [planned, _later("prepare", "the download")]}
    first = stage == "bridge" and run.finished("prepare") and not run.finished("source")
    if first and (run.source_store.is_file() or settings.config.source.brought):
        say("bridge: there is no source model yet; `sfkt source` would run first")
        return {"plans": [dry_run("source", replace(options, force=False)), _later("bridge")]}
    return _try(stage, settings)


def dry_run_all(options: Options) -> dict[str, Any]:
    """Say what every stage would do, of those whose input is there."""
    settings = resolve(options, "prepare", new_run=True)
    plans = [_try("prepare", settings)]
    options = replace(options, run=settings.run.folder)
    for stage, before in BEFORE.items():
        settings = resolve(options, stage)
        ready = settings.run.finished(_folder(before, settings)) and not options.force
        plans.append(_try(stage, settings) if ready else _later(stage))
    total = sum(plan.get("seconds", 0.0) for plan in plans)
    return {"plans": plans, "seconds": total}


def _try(stage: str, settings: Settings) -> dict[str, Any]:
    from sfkt_cli.stages import bridge, dry, source, transfer

    config, run = settings.config, settings.run
    if stage in ("prepare", "evaluate"):
        attempt = dry.try_prepare if stage == "prepare" else dry.try_evaluate
        return attempt(config, run)
    functions: dict[str, Callable[..., None]] = {
        "source": source.source,
        "bridge": bridge.bridge,
        "transfer": transfer.transfer,
    }
    return dry.try_training(_folder(stage, settings), functions[stage], config, run)


def _folder(stage: str, settings: Settings) -> str:
    return f"transfer/{settings.config.transfer.method}" if stage == "transfer" else stage


def _later(stage: str, before: str = "") -> dict[str, Any]:
    from sfkt_cli.stages.outlook import comes_after

    return comes_after(stage, before or BEFORE[stage])
