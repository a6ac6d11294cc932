"""What a command says: text for people on standard error, events for scripts, the log of a stage.

People get messages, tables and progress: on a terminal a bar, elsewhere one line an epoch. With
``--json`` scripts get one JSON object a line on standard output. While a stage runs, all that is
said also goes into its ``log.txt``.
"""

import contextlib
import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from sfkt_cli.errors import Interrupted, SfktError


class _StandardError:
    """Standard error, for as long as it takes messages.

    Its reader may have gone away (``2>&1 | head -1``), the terminal may be closed, the disk of the
    file full. A message that cannot be shown is dropped, because the work matters more.
    """

    @property
    def encoding(self) -> str:
        """What the stream can show: rich draws with ASCII where that is not UTF-8."""
        return getattr(self._now, "encoding", None) or "utf-8"

    @property
    def _now(self) -> TextIO | None:
        # While a bar is shown, rich has put a stream in its place that leads back to here.
        stream: TextIO | None = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        return stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._now.write(text)  # type: ignore[union-attr]
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._now.flush()  # type: ignore[union-attr]

    def isatty(self) -> bool:
        return self._now is not None and not self._now.closed and self._now.isatty()


_errors = _StandardError()
console = Console(
    file=cast(TextIO, _errors), highlight=False, soft_wrap=True, markup=False, emoji=False
)
"""Where people's messages go; while it is ``quiet``, warnings and errors only."""


@dataclass
class _Outlets:
    """Where messages also go: to scripts as events, and into the log of the running stage."""

    muted: bool = False  # another process speaks
    json: bool = False  # events go to standard output
    stage: str | None = None
    log: TextIO | None = None
    lost: OSError | None = None  # what has cost events
    left: bool = False  # the reader of standard output went away


outlets = _Outlets()
LINE_S = 30.0
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1, separators and directions of Unicode, and bytes of names that are no UTF-8."""


def printable(text: str) -> str:
    """Text that can be shown: control characters are written as their numbers.

    Names of classes and files come from elsewhere. Their control characters could move the cursor,
    recolour the terminal or turn the direction of writing. Line feeds and tabs stay.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def mute() -> None:
    """Say nothing at all: another process speaks."""
    console.quiet = outlets.muted = True
    outlets.json = False


def say(message: str) -> None:
    """Print one message, without markup; on a terminal broken between words."""
    _show(message, "", quiet=console.quiet)


def warn(message: str) -> None:
    """Print one warning."""
    _show(f"warning: {message}", "yellow", quiet=outlets.muted)
    event("warning", message=printable(message))


def _show(message: str, style: str, *, quiet: bool) -> None:
    message = printable(message)
    shown = _broken(message, console.width) if console.is_terminal else message
    before, console.quiet = console.quiet, quiet
    console.print(shown, style=style)
    console.quiet = before
    log(message)


def tell(message: str) -> None:
    """Print why the program ends, whatever else is quiet."""
    _errors.write(f"{printable(message)}\n")
    _errors.flush()


def confirmed(question: str) -> bool:
    """Whether somebody at a terminal says yes; False without a terminal."""
    if not (sys.stdin.isatty() and console.is_terminal) or outlets.json:
        return False
    from rich.prompt import Confirm

    return Confirm.ask(question, console=console, default=False)


def output(text: str) -> None:
    """Print a result on standard output; not under ``--json``, where that is for events only."""
    text = printable(text)
    if outlets.json:
        console.print(text)
    else:
        write_output(f"{text}\n")


def write_output(text: str) -> None:
    """Write to standard output, at once.

    If the reader goes away, as ``head`` does, the rest is dropped, and :func:`still_read` says so.

    Raises:
        OSError: Standard output is closed, or its disk is full.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # what is held back would fail once more at the very end
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outlets.left = isinstance(error, BrokenPipeError)
        if not outlets.left:
            error.filename = "standard output"
            raise


def still_read() -> bool:
    """Whether standard output has its reader; raises the OSError that has cost events, if any."""
    if outlets.lost is not None:
        raise outlets.lost
    return not outlets.left


def event(kind: str, **fields: Any) -> None:
    """Print an event for scripts, one JSON object per line; NaN becomes null, a path its text."""
    if outlets.json:
        from pydantic_core import to_jsonable_python

        stage = {} if outlets.stage is None else {"stage": outlets.stage}
        values = to_jsonable_python({"event": kind, **stage, **fields}, inf_nan_mode="null")
        line = json.dumps(values)  # ASCII, for any terminal
        try:
            write_output(f"{line}\n")
        except OSError as error:  # the work goes on, and is judged at its end
            outlets.lost = error
        if kind == "result" and outlets.lost is not None:
            raise outlets.lost


@contextlib.contextmanager
def stage_log(stage: str, path: Path) -> Iterator[None]:
    """Append all that is said in the block to a file, and name the stage in events."""
    before = (outlets.stage, outlets.log)
    file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    outlets.stage, outlets.log = stage, file
    try:
        yield
    except (SfktError, Interrupted) as error:
        log(f"ended: {error}")
        raise
    except BaseException:
        log(f"ended: {traceback.format_exc().rstrip()}")
        raise
    finally:
        outlets.stage, outlets.log = before
        with contextlib.suppress(OSError):  # the disk is full
            file.close()


def log(message: str) -> None:
    """Write one message into the log of the stage that runs, and nowhere else."""
    if outlets.log is not None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = printable(message).replace("\n", f"\n{' ' * (len(stamp) + 2)}")
        with contextlib.suppress(OSError):  # a full disk: the stage's own files will tell
            outlets.log.write(f"{stamp}  {text}\n")


def _broken(message: str, width: int) -> str:
    """Lines that are too long broken between fields (two spaces) or words, the rest set in."""
    lines: list[str] = []
    for line in message.split("\n"):
        gap = "  " if "  " in line.strip() else " "
        first, *others = line.split(gap) if len(line) > width else [line]
        lines.append(first)
        for word in others:
            if len(lines[-1]) + len(gap) + len(word) <= width or not lines[-1].strip():
                lines[-1] += gap + word
            else:
                lines.append("    " + word)
    return "\n".join(lines)


WIDE = 100  # columns from which a bar tells images a second; each epoch's line tells them anyway


@dataclass
class Tracker:
    """Progress of one long task; make it with :func:`track`.

    ``note`` is shown behind the note of each step, such as the score of the epoch before; where the
    terminal is narrow it is cut off first.
    """

    bar: Progress  # with one task; disabled where there is no terminal
    unit: str
    line_s: float
    done: int
    note: str = ""
    counted: int = 0
    last_line: float = field(default_factory=time.monotonic)

    def advance(self, steps: int = 1, count: int = 0, note: str = "") -> None:
        """Go on by some steps; ``count`` images passed in them; ``note`` is shown beside."""
        (task,) = self.bar.tasks
        self.counted += count
        elapsed_s = max(task.elapsed or 0.0, 1e-9)
        both = printable("  ".join(filter(None, (note, self.note))))
        speed = f"{self.counted / elapsed_s:,.0f} {self.unit}/s"
        self.bar.update(task.id, advance=steps, rate=speed, note=both)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= self.line_s:
            self.last_line = now
            text = f"{task.completed:,} {self.unit}"
            if task.total is not None:
                left_s = elapsed_s / (task.completed - self.done) * (task.total - task.completed)
                text = f"{task.completed:,} of {task.total:,} {self.unit}  {duration(left_s)} left"
            self.report(text)

    def report(self, message: str) -> None:
        """Print a line that stays."""
        say(f"{self.bar.tasks[0].description}  {message}")


@contextlib.contextmanager
def track(
    title: str, total: int | None, unit: str = "images", done: int = 0, line_s: float = LINE_S
) -> Iterator[Tracker]:
    """Show the progress of a task of ``total`` steps; None: nobody knows how many there will be.

    ``unit`` is what the rate counts, ``done`` the steps that are done already. Where there is no
    terminal, a line is printed every ``line_s`` seconds.
    """
    # Where the terminal is narrow the rate gives way, and the note from its end.
    rate = [] if console.width < WIDE else [TextColumn("{task.fields[rate]}", markup=False)]
    fixed, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False, table_column=fixed),
        BarColumn(bar_width=min(max((console.width - 72) // 2, 6), 40)),
        MofNCompleteColumn(table_column=fixed),
        *rate,
        TimeRemainingColumn(compact=True, table_column=fixed),
        TextColumn("{task.fields[note]}", markup=False, style="dim", table_column=rest),
    )
    # Neither a dumb terminal nor a file, whatever FORCE_COLOR says, can redraw a bar.
    hidden = not (console.is_interactive and _errors.isatty()) or console.quiet
    with Progress(*columns, console=console, transient=True, expand=True, disable=hidden) as bar:
        bar.add_task(title, total=total, completed=done, rate="", note="")
        yield Tracker(bar, unit, line_s, done)


def terms_text(terms: Mapping[str, float]) -> str:
    """Loss terms and scores on one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in terms.items())


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
