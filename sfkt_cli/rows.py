"""The rows that `sfkt predict` writes: CSV or JSONL, in one piece or as images come."""

import contextlib
import csv
import functools
import io
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from sfkt_cli.console import event, outlets, say, warn, write_output
from sfkt_cli.errors import ConfigError, first_line
from sfkt_cli.evaluation.report import to_csv as harmless_csv
from sfkt_cli.files import write_text
from sfkt_cli.student import Prediction
from sfkt_cli.training.predicting import COLLAPSED, FEWEST, collapse_warning

STDIO = "-"
Row = tuple[str | Path, Prediction]


class RowWriter:
    """The rows of the output: written as they come, or all at the end.

    Those of ``endless`` images have a time, and go behind the rows that an earlier start wrote.

    Raises:
        ConfigError: The output cannot be written, or holds rows that these must not stand behind,
            or that must not be lost.
    """

    def __init__(
        self, output: Path, classes: Sequence[str], top_k: int, *, at_once: bool, endless: bool
    ) -> None:
        self._output, self._classes, self._at_once = output, classes, at_once
        self._top_k, self._endless = min(top_k, len(classes)), endless
        self._jsonl = output.suffix.lower() == ".jsonl"
        self._header = "" if self._jsonl else to_csv([], self._top_k, "" if endless else None)
        self._unwritten: list[str] = []
        self._votes, self._entropy = Counter[str](), 0.0  # of images that are not doubted
        self._doubted, self._doubt = 0, ""
        self.count = 0
        self.earlier = 0  # rows that an earlier start wrote
        self.answered: dict[str, float] = {}  # their images' places and times (seconds since 1970)
        self._begun = endless and str(output) != STDIO and not self._is_device
        if str(output) != STDIO:
            require_writable(
                output.resolve().parent, f"--output {output}", output if endless else None
            )
            if output.is_file():
                with output.open(encoding="utf-8", errors="replace", newline="") as file:
                    self._read_earlier(file)

    @property
    def _is_device(self) -> bool:
        """Whether nothing can be read back, such as from a pipe."""
        return self._output.exists() and not self._output.is_file()

    def _read_earlier(self, file: TextIO) -> None:
        """Note the rows of an earlier start; errors as of the class."""
        first, columns = file.readline(), list[Any]()
        with contextlib.suppress(ValueError, TypeError):  # no object
            columns = [*json.loads(first)] if self._jsonl else first.strip().split(",")
        streamed = all(name in columns for name in ("path", "class", "time"))
        if streamed and not self._endless:
            raise ConfigError(
                f"--output {self._output} holds rows of a watched folder or camera: choose another "
                "--output"
            )
        if not first or not self._endless:
            return
        expected = self._header.strip() or "path,class,time"
        begun = expected.startswith(first)
        if self._jsonl:
            begun = not columns and first[-1] != "\n" and '{"path": '.startswith(first[:9])
        if not begun and not (streamed if self._jsonl else columns == expected.split(",")):
            raise ConfigError(
                f"--output {self._output} holds other columns than {expected}: choose another "
                "file, or the --top-k of the rows in it"
            )
        file.seek(0)
        seen = [*filter(None, map(_seen, _rows_in(file, self._jsonl)))]
        self.answered, self.earlier = dict(seen), len(seen)

    def add(self, rows: Sequence[Row], time: str) -> str:
        """Tell scripts of further rows, and write them; a stream gets a note for people."""
        told = time if self._endless else None
        for path, prediction in rows:
            event("prediction", **as_row(path, prediction, self._top_k, told))
            if prediction.warning:
                self._doubted += 1
                self._doubt = self._doubt or f"{path}: {prediction.warning}"
                continue
            self._votes[prediction.ranked[0][0]] += 1
            self._entropy -= sum(p * math.log(p) for _, p in prediction.ranked if p > 0)
        self.count += len(rows)
        text = (to_jsonl if self._jsonl else to_csv)(rows, self._top_k, told)
        self._unwritten.append(text.removeprefix(self._header))
        if self._at_once:
            self._write()
        return rows[-1][1].shown if self._at_once else ""

    def _write(self) -> None:
        """Write what is not written yet; the first rows take the place of another file."""
        text = "".join(["" if self._begun else self._header, *self._unwritten])
        self._unwritten.clear()  # first: a signal after the writing must not double the rows
        if str(self._output) == STDIO:
            if not outlets.json:
                write_output(text)
        elif self._begun:
            self._append(text)
        else:
            write_text(self._output, text)
        self._begun = True

    def _append(self, text: str) -> None:
        """Put rows behind those of the file, or into a pipe."""
        try:
            with self._output.open("ab" if self._is_device else "a+b") as file:
                text = text if self._is_device else self._joint(file) + text
                file.write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            error.filename = error.filename or str(self._output)
            raise

    def _joint(self, file: BinaryIO) -> str:
        """What belongs between the rows of a file and further ones; a row that was cut off goes."""
        size = file.tell()
        file.seek(max(size - 1, 0))
        if file.read() in (b"", b"\n"):
            return "" if size else self._header
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        row = io.StringIO(self._header + last.decode(errors="replace"), newline="")
        if any(map(_seen, _rows_in(row, self._jsonl))):
            return "\n"
        file.truncate(size - len(last))
        return "" if size > len(last) else self._header

    def finish(self) -> None:
        """Warn of what looks wrong, and write what is not written yet."""
        if self._doubted:
            warn(
                f"{self._doubted} of {self.count} images do not look like those that the student "
                f"was trained on, such as {self._doubt}; see the column `warning`"
            )
        if (counted := self.count - self._doubted) >= FEWEST:
            shares = [self._votes[name] / counted for name in self._classes]
            message = collapse_warning(
                self._entropy / counted, shares, self._classes, "the student", "images",
                COLLAPSED["predict"],
            )  # fmt: skip
            if message:
                warn(message)
        if self._unwritten:
            self._write()
        if str(self._output) != STDIO:
            say(f"predict: {self.count} images" + f" in {self._output}" * bool(self.count))


def require_writable(folder: Path, option: str, file: Path | None = None) -> None:
    """Make a folder if it is missing; raises ConfigError if nothing can be written there.

    The message names ``option``. If ``file`` exists, the check is whether it can be written itself.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = file if file is not None and file.is_file() else None
        with there.open("r+b") if there else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} cannot be written ({first_line(error)}): choose another place"
        ) from None


def now() -> str:
    """ISO 8601 with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="microseconds")


_real = functools.lru_cache(1024)(os.path.realpath)


def place_of(path: str) -> str:
    """Where an image lies, as it stands in CSV: bytes that are not UTF-8 are escaped."""
    folder, name = os.path.split(path)
    return f"{_real(folder)}{os.sep}{name}".encode("utf-8", "backslashreplace").decode()


def _rows_in(file: TextIO, jsonl: bool) -> Iterator[Any]:
    """The rows of an output; what an interruption cut off, or another program wrote, may be odd."""
    if not jsonl:
        with contextlib.suppress(csv.Error):
            yield from csv.DictReader(file)
        return
    for line in file:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _seen(row: Any) -> tuple[str, float] | None:
    """Place and time (seconds since 1970) of the image of a row; None if the row is cut off."""
    try:
        time = datetime.fromisoformat(row["time"])
        whole = time.isoformat(timespec="microseconds") == row["time"]
        return (place_of(row["path"]), time.timestamp()) if whole else None
    except (KeyError, TypeError, ValueError):
        return None


def to_csv(rows: Sequence[Row], top_k: int, time: str | None = None) -> str:
    """Columns path, class, probability, class_2, probability_2 ... for ``top_k`` > 1, warning.

    Where there is a ``time``, it is the last column. Cells that a spreadsheet would run begin with
    ', but for paths, which stay as they are.
    """
    header = ["path", "class", "probability"]
    for place in range(2, top_k + 1):
        header += [f"class_{place}", f"probability_{place}"]
    end = [] if time is None else [time]
    header += ["warning", *["time" for _ in end]]
    lines = [
        [
            str(path),
            prediction.label,
            f"{prediction.probability:.6f}",
            *(cell for c, p in prediction.ranked[1:top_k] for cell in (c, f"{p:.6f}")),
            prediction.warning,
            *end,
        ]
        for path, prediction in rows
    ]
    return harmless_csv(header, lines, exact="path")


def to_jsonl(rows: Sequence[Row], top_k: int, time: str | None = None) -> str:
    """One object of :func:`as_row` per line."""
    lines = [json.dumps(as_row(*row, top_k, time), ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def as_row(
    path: str | Path, prediction: Prediction, top_k: int, time: str | None = None
) -> dict[str, Any]:
    """Path, class, probability, warning, top with the first ``top_k`` classes, time if given."""
    top = [{"class": c, "probability": _rounded(p)} for c, p in prediction.ranked[:top_k]]
    first = {"class": prediction.label, "probability": _rounded(prediction.probability)}
    row = {"path": str(path), **first, "warning": prediction.warning, "top": top}
    return row if time is None else {**row, "time": time}


def _rounded(probability: float) -> float | None:
    """None for NaN, which JSON has no word for."""
    return round(probability, 6) if math.isfinite(probability) else None
