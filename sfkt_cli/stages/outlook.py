"""What a stage would do, in words and values, for `--dry-run`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfkt_cli.config import Config
from sfkt_cli.console import duration, event, say
from sfkt_cli.runs import Run, stage_settings
from sfkt_cli.training.trial import Trial


@dataclass(frozen=True)
class Outlook:
    """What a stage would do.

    Attributes:
        stage: Its name.
        does: In words.
        seconds: How long it would take; None: not known.
        reads: Files and their bytes.
        writes: What it would write and its bytes, about.
        folder: Where.
        settings: Those that decide what it writes and are no defaults.
        trial: What a few batches told, of training stages.
        notes: What else to know.
    """

    stage: str
    does: str
    seconds: float | None
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    folder: Path
    settings: Mapping[str, Any]
    trial: Trial | None = None
    notes: tuple[str, ...] = ()

    def as_values(self) -> dict[str, Any]:
        """For scripts."""
        return {**asdict(self), "free_bytes": free_bytes(self.folder)}

    def text(self) -> str:
        """For people."""
        sizes = {
            name: ", ".join(
                f"{what} ({size_text(size)})" if size else what for what, size in files.items()
            )
            for name, files in (("reads", self.reads), ("writes", self.writes))
        }
        lines = [
            f"{self.stage}: dry run, nothing is written",
            f"  reads     {sizes['reads'] or 'nothing'}",
            f"  does      {self.does}",
            f"  settings  {', '.join(f'{k}={v}' for k, v in self.settings.items()) or 'defaults'}",
        ]
        if self.seconds is not None:
            lines.append(f"  takes     about {duration(self.seconds)}")
        if self.trial is not None:
            lines[-1] += (
                f": {self.trial.step_s:.3g} s a step (tried), and "
                f"{duration(self.trial.epoch_s)} an epoch for scores and saving; "
                f"{self.trial.peak_memory_mb:,.0f} MB of memory"
            )
        lines.append(f"  writes    {sizes['writes']} in {self.folder}")
        lines.append(f"  disk      {size_text(free_bytes(self.folder))} are free")
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


def tell(outlook: Outlook) -> dict[str, Any]:
    """Say it to people and scripts."""
    say(outlook.text())
    values = outlook.as_values()
    event("plan", **values)
    return values


def comes_after(stage: str, before: str) -> dict[str, Any]:
    """Say of a stage that it cannot be tried yet."""
    say(f"{stage}: comes after {before}, which is not done: there is nothing to try it on")
    event("plan", stage=stage, after=before)
    return {"stage": stage, "after": before}


def outlook_of(
    name: str, config: Config, run: Run, does: str, seconds: float, writes: Mapping[str, int]
) -> Outlook:
    """What is known of a stage beside what trying it told."""
    usual = stage_settings(name, Config())
    now = stage_settings(name, config)
    changed = {key: value for key, value in now.items() if usual.get(key, value) != value}
    reads = {str(path): path.stat().st_size for path in run.reads(name)}
    return Outlook(name, does, seconds, reads, writes, run.path(name), changed)


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or would be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def size_text(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    if count < 2**16:
        return f"{count / 2**10:,.1f} kB"
    return f"{count / 2**20:,.1f} MB" if count < 2**30 else f"{count / 2**30:,.1f} GB"
