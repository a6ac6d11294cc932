"""What the user sees while a stage runs: messages, tables and progress, on standard error.

On a terminal a rich progress bar; elsewhere one line an epoch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
_warnings = Console(stderr=True, highlight=False, soft_wrap=True)


def quieten(quiet: bool) -> None:
    """Leave only warnings and errors."""
    console.quiet = quiet


def mute() -> None:
    """Say nothing at all: another process speaks."""
    console.quiet = _warnings.quiet = True


def say(message: str) -> None:
    """Print one message, as it is, without markup."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one warning."""
    _warnings.print(f"warning: {message}", style="yellow", markup=False)


class Tracker:
    """Progress of one long task; make it with :func:`track`."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._unit = unit
        self._title = title
        self._started = time.monotonic()
        self._counted = 0
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, rate="", note="")

    def advance(self, steps: int = 1, count: int = 0, note: str = "") -> None:
        """Go on by some steps; ``count`` images passed in them; ``note`` is shown beside."""
        self._counted += count
        if self._bar is not None:
            rate = self._counted / max(time.monotonic() - self._started, 1e-9)
            self._bar.update(
                self._task, advance=steps, rate=f"{rate:,.0f} {self._unit}/s", note=note
            )

    def report(self, message: str) -> None:
        """Print a line that stays."""
        say(f"{self._title}  {message}")

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def track(title: str, total: int, unit: str = "images") -> Iterator[Tracker]:
    """Show the progress of a task of ``total`` steps."""
    tracker = Tracker(title, total, unit)
    try:
        yield tracker
    finally:
        tracker.stop()


def terms_text(terms: Mapping[str, float]) -> str:
    """Loss terms and scores on one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
