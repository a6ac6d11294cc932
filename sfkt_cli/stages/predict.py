"""`sfkt predict`: classes of new images of the target sensor, as CSV or JSONL."""

import contextlib
import itertools
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from sfkt_cli.console import event, say, speaks_json, track, warn, write_output
from sfkt_cli.data.archive import is_system, list_files
from sfkt_cli.data.decode import SUFFIXES, tell_unread
from sfkt_cli.data.pictures import captioned
from sfkt_cli.data.sensor import frames, is_live, is_video
from sfkt_cli.errors import ConfigError, DataError, Interrupted
from sfkt_cli.evaluation.report import to_csv as harmless_csv
from sfkt_cli.files import replacing, write_text
from sfkt_cli.models.saving import CARD
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.student import ExportedStudent, Prediction, Student, load_student
from sfkt_cli.training.predicting import warn_of_collapse
from sfkt_cli.training.runtime import make_runtime

BATCH = 64
STDIN = "-"
UNKNOWN = "unknown"
LAST = 1000  # number of the latest rows of a stream that are checked when it ends
LOOK_EVERY_S = 0.5
SHOWN = 10  # so many broken files are named
Batch = list[tuple[str | Path, NDArray[Any]]]  # names and stored images
Row = tuple[str | Path, Prediction]
AnyStudent = Student | ExportedStudent


def predict(
    config: Config,
    run: Run,
    images: Sequence[str],
    *,
    output: Path,
    top_k: int = 1,
    method: str | None = None,
    model: Path | None = None,
    threshold: float = 0.0,
    save_images: Path | None = None,
    follow: bool = False,
) -> dict[str, Any]:
    """Classify images and write one row for each; broken files are left out and named at the end.

    Where all of them are broken nothing is written. The rows of videos and watched folders are
    written as they come; a signal ends cameras and watched folders.

    Under ``--json`` each row is an event, too, and takes the place of CSV on standard output.

    Args:
        config: ``runtime.gpus`` chooses the device.
        run: Where the student is.
        images: Files, folders, patterns, or ``-`` for a list of files on standard input; or one
            video, camera or address.
        output: .csv or .jsonl; ``-`` writes CSV to standard output.
        top_k: Classes listed for each image.
        method: Which student of the run; None: the only one, or that of ``transfer.method``.
        model: Another student: a folder, such as an exported one, or an exported ONNX file.
        threshold: Less probable classes, and those of doubted images, are ``unknown``; 0: none.
        save_images: Folder for a picture of each image with its class below.
        follow: Watch the folders ``images`` for new files.

    Returns:
        The number of images, and where the rows are.

    Raises:
        ConfigError: The output's suffix is neither, or nothing matches ``images``.
        DataError: Some files could not be read; the rows of the others are written.
    """
    if output.suffix.lower() not in (".csv", ".jsonl") and str(output) != STDIN:
        raise ConfigError(f"--output {output}: the suffix must be .csv or .jsonl")
    video = next((entry for entry in images if is_video(entry)), None)
    if video and (follow or len(images) > 1):
        raise ConfigError(f"{video} is a video: give it alone, without other images or --follow")
    student = open_student(config, model or run.folder, method)
    broken: list[str] = []
    batches, total = _batches(student, images, video, follow, broken)
    rows = _Rows(output, min(top_k, len(student.classes)), at_once=total is None)
    endless = follow or bool(video and is_live(video))
    if endless:
        say(f"predict: rows are written to {output} as images come; Ctrl-C ends")
    try:
        with track("predict", total) as tracker:
            for batch in batches:
                first, stored = rows.count, [image for _, image in batch]
                answers = [judged(one, threshold) for one in student.predict_stored(stored)]
                lines = [(path, answer) for (path, _), answer in zip(batch, answers, strict=True)]
                note = rows.add(lines)
                if save_images:
                    save(save_images, first, student, stored, lines)
                tracker.advance(len(batch), len(batch), note)
    except Interrupted:
        if not endless:
            raise
    if rows.count or not broken:
        rows.finish()
    if broken:
        raise DataError(_broken_files(broken, total or len(broken)))
    return {"images": rows.count, "output": output}


def _batches(
    student: AnyStudent, images: Sequence[str], video: str | None, follow: bool, broken: list[str]
) -> tuple[Iterator[Batch], int | None]:
    """Batches of images, and how many images there are; None: nobody knows."""
    if follow:
        return watch(student, images, broken), None
    if video:
        return batched(frames(video, student.sensor), 1 if is_live(video) else BATCH), None
    paths = list(expand(images))
    return read_batches(student, paths, broken), len(paths)


class _Rows:
    """The rows of the output: written as they come, or all at the end."""

    def __init__(self, output: Path, top_k: int, *, at_once: bool) -> None:
        self._output, self._top_k, self._at_once = output, top_k, at_once
        self._latest: deque[Row] = deque(maxlen=LAST if at_once else None)
        self.count = 0

    def add(self, rows: Sequence[Row]) -> str:
        """Tell scripts of further rows, and write them; a stream gets a note for people."""
        for path, prediction in rows:
            event("prediction", **as_row(path, prediction, self._top_k))
        if self._at_once:
            write_rows(rows, self._output, self._top_k, append=self.count > 0)
        self._latest += rows
        self.count += len(rows)
        return f"{rows[-1][1].label} {rows[-1][1].probability:.0%}" if self._at_once else ""

    def finish(self) -> None:
        """Warn of what looks wrong, and write what is not written yet."""
        rows = list(self._latest)
        warn_of_doubts(rows)
        if not self._at_once:
            write_rows(rows, self._output, self._top_k)
        if str(self._output) != STDIN:
            say(f"predict: {self.count} images in {self._output}")


def open_student(config: Config, path: Path, method: str | None) -> AnyStudent:
    """The student of a run, of an export's folder, or of an ONNX file.

    Raises:
        ConfigError: onnxruntime is not installed.
        RunError: There is none.
        DataError: It is damaged.
    """
    if path.suffix.lower() == ".onnx" and path.is_file():
        return ExportedStudent(path)
    if (path / "student.onnx").is_file() and not (path / "student" / CARD).is_file():
        return ExportedStudent(path / "student.onnx")
    device = make_runtime(config.runtime).device
    return load_student(path, method=method, usual=config.transfer.method, device=device)


def judged(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction, or ``unknown`` where it is too unsure or its image is doubted."""
    if threshold and (prediction.probability < threshold or prediction.warning):
        return replace(prediction, label=UNKNOWN)
    return prediction


def write_rows(rows: Sequence[Row], output: Path, top_k: int, *, append: bool = False) -> None:
    """Write rows as the output's suffix says, behind those that are there or in their place."""
    jsonl = output.suffix.lower() == ".jsonl"
    text = to_jsonl(rows, top_k) if jsonl else to_csv(rows, top_k)
    if append and not jsonl:
        text = text.partition("\n")[2]
    if str(output) == STDIN:
        if not speaks_json():
            write_output(text)
    elif append:
        with output.open("a", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)


def save(
    folder: Path,
    first: int,
    student: AnyStudent,
    images: Sequence[NDArray[Any]],
    rows: Sequence[Row],
) -> None:
    """Write a PNG for each image: its place in the output, its name, and its class drawn below."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, (path, answer)) in enumerate(zip(images, rows, strict=True), first):
        text = f"{answer.label}  {answer.probability:.0%}" + ("  doubted" if answer.warning else "")
        name = re.sub(r"[^\w.#-]+", "_", Path(path).name.removesuffix(".png"))
        with replacing(folder / f"{number:06d}-{name}.png") as partial:
            captioned(image, student.sensor.missing, text).save(partial, format="PNG")


def watch(student: AnyStudent, folders: Sequence[str], broken: list[str]) -> Iterator[Batch]:
    """Batches of the images of folders, and of those that come or change, without an end.

    A file is read once it has stayed the same between two looks; a broken one is warned of.

    Raises:
        ConfigError: One of them is not a folder.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--follow watches folders, but {folder} is not a folder")
    before: set[tuple[str, int, int]] = set()
    done: set[tuple[str, int, int]] = set()
    while True:
        now = set()
        for path in (path for folder in folders for path in _images_below(folder)):
            with contextlib.suppress(OSError):  # gone again
                now.add((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        ready = sorted((now & before) - done)
        yield from read_batches(student, [Path(path) for path, _, _ in ready], broken)
        while broken:
            warn(broken.pop(0))
        before, done = now, (done | set(ready)) & now
        time.sleep(LOOK_EVERY_S)


def warn_of_doubts(rows: Sequence[Row]) -> None:
    """Warn of images that may not come from the sensor, and of one class for nearly all."""
    doubted = [(name, prediction) for name, prediction in rows if prediction.warning]
    if doubted:
        name, prediction = doubted[0]
        warn(
            f"{len(doubted)} of {len(rows)} images do not look like those that the student was "
            f"trained on, such as {name}: {prediction.warning}; see the column `warning`"
        )
    if rows and not doubted:
        classes = sorted(name for name, _ in rows[0][1].ranked)
        shares = [[dict(answer.ranked)[name] for name in classes] for _, answer in rows]
        logits = torch.tensor(shares).clamp_min(1e-12).log()
        warn_of_collapse(logits, classes, "the student", "images", "predict")


def _broken_files(broken: Sequence[str], count: int) -> str:
    """One message for all of them."""
    lines = "".join(f"\n  {message}" for message in broken[:SHOWN])
    if len(broken) > SHOWN:
        lines += f"\n  and {len(broken) - SHOWN} more, all without a row in the output"
    return f"{len(broken)} of {count} images could not be read; mend them or leave them out:{lines}"


def expand(images: Sequence[str]) -> Iterator[Path]:
    """Files from files, folders, patterns and ``-``, each once, in the order given.

    Raises:
        ConfigError: An entry matches nothing.
    """
    returned: set[Path] = set()
    for entry in images:
        paths = _matches(entry)
        if not paths:
            raise ConfigError(f"{entry} matches no image: give files, folders, patterns or -")
        yield from (path for path in dict.fromkeys(paths) if path not in returned)
        returned.update(paths)


def _matches(entry: str) -> list[Path]:
    if entry == STDIN:
        lines = sys.stdin.read().removeprefix("\ufeff").splitlines()
        return [Path(line) for line in lines if line.strip()]
    path = Path(entry)
    if path.is_dir():
        unread = tell_unread(list_files(path))
        if unread:
            warn(f"{path}: {unread}")
        return _images_below(entry)
    if path.exists() or not any(sign in entry for sign in "*?["):
        return [path]
    fixed = next(place for place, part in enumerate(path.parts) if set(part) & set("*?["))
    base = Path(*path.parts[:fixed])
    paths = base.glob(str(Path(*path.parts[fixed:])))
    return sorted(p for p in paths if p.is_file() and not is_system(str(p.relative_to(base))))


def _images_below(folder: str) -> list[Path]:
    names = (name for name in list_files(Path(folder)) if name.lower().endswith(SUFFIXES))
    return sorted(Path(folder, name) for name in names)


def read_batches(student: AnyStudent, paths: Sequence[Path], broken: list[str]) -> Iterator[Batch]:
    """Batches of paths and images; messages about unreadable ones are added to ``broken``."""

    def read() -> Iterator[tuple[Path, NDArray[Any]]]:
        for path in paths:
            try:
                yield path, student.read(path)
            except DataError as error:
                broken.append(str(error))

    return batched(read(), BATCH)


def batched(images: Iterable[tuple[str | Path, NDArray[Any]]], size: int) -> Iterator[Batch]:
    """Batches of named images."""
    images = iter(images)
    while batch := list(itertools.islice(images, size)):
        yield batch


def to_csv(rows: Sequence[Row], top_k: int) -> str:
    """Columns path, class, probability, class_2, probability_2 ... for ``top_k`` > 1, warning.

    Cells that a spreadsheet would run begin with ', but for paths, which stay as they are.
    """
    header = ["path", "class", "probability"]
    for place in range(2, top_k + 1):
        header += [f"class_{place}", f"probability_{place}"]
    lines = [
        [
            str(path),
            prediction.label,
            f"{prediction.probability:.6f}",
            *(cell for c, p in prediction.ranked[1:top_k] for cell in (c, f"{p:.6f}")),
            prediction.warning,
        ]
        for path, prediction in rows
    ]
    return harmless_csv([*header, "warning"], lines, exact="path")


def to_jsonl(rows: Sequence[Row], top_k: int) -> str:
    """One object a line, as :func:`as_row` makes it."""
    lines = [json.dumps(as_row(*row, top_k), ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def as_row(path: str | Path, prediction: Prediction, top_k: int) -> dict[str, Any]:
    """Path, class, probability, warning, and top with the first ``top_k`` classes."""
    top = [{"class": c, "probability": round(p, 6)} for c, p in prediction.ranked[:top_k]]
    first = {"class": prediction.label, "probability": round(prediction.probability, 6)}
    return {"path": str(path), **first, "warning": prediction.warning, "top": top}
