"""`sfkt predict`: classes of new images of the target sensor, as CSV or JSONL."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from sfkt_cli.console import event, say, speaks_json, track, warn, write_output
from sfkt_cli.data.archive import is_system, list_files
from sfkt_cli.data.decode import SUFFIXES, tell_unread
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.evaluation.report import to_csv as harmless_csv
from sfkt_cli.files import write_text
from sfkt_cli.models.prediction_check import warn_of_collapse
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.student import Prediction, Student, load_student
from sfkt_cli.training.runtime import make_runtime

BATCH = 64
STDIN = "-"


def predict(
    config: Config,
    run: Run,
    images: Sequence[str],
    *,
    output: Path,
    top_k: int = 1,
    method: str | None = None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Classify images and write one row for each; broken files are left out and named at the end.

    Where all of them are broken nothing is written.

    Under ``--json`` each row is an event, too, and takes the place of CSV on standard output.

    Args:
        config: ``runtime.gpus`` chooses the device.
        run: Where the student is.
        images: Files, folders, patterns, or ``-`` for a list of files on standard input.
        output: .csv or .jsonl; ``-`` writes CSV to standard output.
        top_k: Classes listed for each image.
        method: Which student of the run; None: the only one, or that of ``transfer.method``.
        model: Folder with another student, such as an exported one.

    Returns:
        The number of images, and where the rows are.

    Raises:
        ConfigError: The output's suffix is neither, or nothing matches ``images``.
        DataError: Some files could not be read; the rows of the others are written.
    """
    check_output(output)
    device = make_runtime(config.runtime).device
    student = load_student(
        model or run.folder, method=method, usual=config.transfer.method, device=device
    )
    paths = list(expand(images))
    broken: list[str] = []
    rows = []
    with track("predict", len(paths)) as tracker:
        for batch in read_batches(student, paths, broken):
            found = student.predict_stored([image for _, image in batch])
            rows += [(path, each) for (path, _), each in zip(batch, found, strict=True)]
            tracker.advance(len(batch), len(batch))
    if broken and not rows:
        raise DataError(_told(broken, len(paths)))
    warn_of_doubts([(str(path), prediction) for path, prediction in rows])
    for path, prediction in rows:
        event("prediction", **as_row(path, prediction, top_k))
    if str(output) != STDIN:
        jsonl = output.suffix.lower() == ".jsonl"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, to_jsonl(rows, top_k) if jsonl else to_csv(rows, top_k))
        say(f"predict: {len(rows)} images in {output}")
    elif not speaks_json():
        write_output(to_csv(rows, top_k))
    if broken:
        raise DataError(_told(broken, len(paths)))
    return {"images": len(rows), "output": output}


def warn_of_doubts(rows: Sequence[tuple[str, Prediction]]) -> None:
    """Warn of images that may be none of the sensor's, and of one class for nearly all."""
    doubted = [(name, prediction) for name, prediction in rows if prediction.warning]
    if doubted:
        name, prediction = doubted[0]
        warn(
            f"{len(doubted)} of {len(rows)} images do not look like those that the student was "
            f"trained on, such as {name}: {prediction.warning}; see the column `warning`"
        )
    if rows and not doubted:
        classes = sorted(name for name, _ in rows[0][1].ranked)
        shares = [[dict(said.ranked)[name] for name in classes] for _, said in rows]
        logits = torch.tensor(shares).clamp_min(1e-12).log()
        warn_of_collapse(logits, classes, "the student", "images", "predict")


def _told(broken: Sequence[str], count: int) -> str:
    """One message for all broken files."""
    lines = "".join(f"\n  {message}" for message in broken)
    return f"{len(broken)} of {count} images could not be read; mend them or leave them out:{lines}"


def check_output(output: Path) -> None:
    """Refuse what is neither .csv nor .jsonl nor standard output.

    Raises:
        ConfigError: It is none of them.
    """
    if output.suffix.lower() not in (".csv", ".jsonl") and str(output) != STDIN:
        raise ConfigError(f"--output {output}: the suffix must be .csv or .jsonl")


def expand(images: Sequence[str]) -> Iterator[Path]:
    """Files from files, folders, patterns and ``-``, each once, in the order given.

    Raises:
        ConfigError: An entry matches nothing.
    """
    seen: set[Path] = set()
    for entry in images:
        found = _matches(entry)
        if not found:
            raise ConfigError(f"{entry} matches no image: give files, folders, patterns or -")
        for path in found:
            if path not in seen:
                seen.add(path)
                yield path


def _matches(entry: str) -> list[Path]:
    if entry == STDIN:
        lines = sys.stdin.read().removeprefix("\ufeff").splitlines()
        return [Path(line) for line in lines if line.strip()]
    path = Path(entry)
    if path.is_dir():
        names = list_files(path)
        unread = tell_unread(names)
        if unread:
            warn(f"{path}: {unread}")
        return sorted(path / name for name in names if name.lower().endswith(SUFFIXES))
    if path.exists() or not any(sign in entry for sign in "*?["):
        return [path]
    fixed = next(place for place, part in enumerate(path.parts) if set(part) & set("*?["))
    base = Path(*path.parts[:fixed])
    found = base.glob(str(Path(*path.parts[fixed:])))
    return sorted(f for f in found if f.is_file() and not is_system(str(f.relative_to(base))))


def read_batches(
    student: Student, paths: Sequence[Path], broken: list[str]
) -> Iterator[list[tuple[Path, NDArray[Any]]]]:
    """Batches of paths and images; messages about unreadable ones are added to ``broken``."""
    batch: list[tuple[Path, NDArray[Any]]] = []
    for path in paths:
        try:
            batch.append((path, student.read(path)))
        except DataError as error:
            broken.append(str(error))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def to_csv(rows: Sequence[tuple[Path, Prediction]], top_k: int) -> str:
    """Columns path, class, probability, class_2, probability_2 ... for ``top_k`` > 1, warning.

    Cells that a spreadsheet would run begin with ', but for paths, which stay as they are.
    """
    header = ["path", "class", "probability"]
    count = min(top_k, len(rows[0][1].ranked)) if rows else top_k
    for place in range(2, count + 1):
        header += [f"class_{place}", f"probability_{place}"]
    lines = [
        [
            str(path),
            *(cell for c, p in prediction.ranked[:count] for cell in (c, f"{p:.6f}")),
            prediction.warning,
        ]
        for path, prediction in rows
    ]
    return harmless_csv([*header, "warning"], lines, exact="path")


def to_jsonl(rows: Sequence[tuple[Path, Prediction]], top_k: int) -> str:
    """One object a line, as :func:`as_row` makes it."""
    lines = [json.dumps(as_row(*row, top_k), ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def as_row(path: Path, prediction: Prediction, top_k: int) -> dict[str, Any]:
    """Path, class, probability, warning, and top with the first ``top_k`` classes."""
    top = [{"class": c, "probability": round(p, 6)} for c, p in prediction.ranked[:top_k]]
    return {"path": str(path), **top[0], "warning": prediction.warning, "top": top}
