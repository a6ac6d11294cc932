"""`sfkt predict`: classes of new images of the target sensor, as CSV or JSONL."""

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sfkt_cli.console import event, say, still_read, track, warn
from sfkt_cli.data.archive import is_system, list_files
from sfkt_cli.data.decode import SUFFIXES, tell_unread
from sfkt_cli.data.pictures import captioned
from sfkt_cli.data.text_files import lines_of
from sfkt_cli.data.video import frames, is_live, is_video, without_password
from sfkt_cli.errors import ConfigError, DataError, Interrupted
from sfkt_cli.files import replacing
from sfkt_cli.models.saving import CARD
from sfkt_cli.rows import STDIO, Row, RowWriter, now, place_of, require_writable
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.student import (
    BATCH,
    ExportedStudent,
    Prediction,
    Student,
    load_student,
    refuse_method,
)
from sfkt_cli.training.runtime import make_runtime

TABLE, STREAM = "predictions.csv", "stream.csv"  # the output where none is named
UNKNOWN = "unknown"
LOOK_EVERY_S = 0.5
SHOWN = 10  # so many broken files are named
LONGEST_NAME = 100  # bytes of an image's name in the name of its picture
AnyStudent = Student | ExportedStudent


class Batch(NamedTuple):
    """Some images that are classified at once."""

    images: list[tuple[str | Path, NDArray[Any]]]  # names and stored images
    time: str  # they were seen then, or later: ISO 8601


def predict(
    config: Config,
    run: Run,
    images: Sequence[str],
    *,
    output: Path | None = None,
    top_k: int = 1,
    method: str | None = None,
    model: Path | None = None,
    threshold: float = 0.0,
    save_images: Path | None = None,
    follow: bool = False,
) -> dict[str, Any]:
    """Classify images and write one row for each; broken files are left out and named at the end.

    If all of them are broken, nothing is written. The rows of videos and watched folders are
    written as they come. Those of cameras and watched folders have a time and are appended to
    existing rows. A signal ends these two, and so does a reader of standard output that leaves.

    The arguments are the options of the command. With ``--json``, each row is also an event, which
    replaces CSV on standard output.

    Returns:
        The number of images, and where the rows are.

    Raises:
        ConfigError: The output cannot be written, holds rows of another kind, or ends neither in
            .csv nor in .jsonl; nothing matches ``images``; the threshold is no share; or pictures
            cannot be saved, or among them.
        DataError: Some files could not be read; the rows of the others are written.
    """
    video = next((entry for entry in images if is_video(entry)), None)
    endless = follow or bool(video and is_live(video))
    output = output or Path(STREAM if endless else TABLE)
    _check(images, output, threshold, video, follow)
    paths = [] if follow or video else expand(images)
    if save_images:
        _make_folder(save_images, images, paths)
    student = open_student(config, model or run.folder, method)
    total = None if follow or video else len(paths)  # how many there are, where somebody knows
    rows = RowWriter(output, student.classes, top_k, at_once=total is None, endless=endless)
    broken: dict[Path, DataError] = {}
    if follow:
        batches = watch(student, images, broken, rows.answered)
    elif video:
        batches = batched(frames(video, student.sensor), 1 if endless else BATCH)
    else:
        batches = batched(read(student, paths, broken), BATCH)
    if endless:
        say(f"predict: writing rows to {output} as images come; Ctrl-C ends it")
    if rows.earlier:
        say(
            f"predict: keeping {rows.earlier} rows of an earlier start; their images are not "
            "classified again, unless you give another --output"
        )
    ended: DataError | None = None  # of a video
    try:
        with track("predict", total) as tracker, contextlib.closing(batches):
            for batch in batches:
                first, stored = rows.earlier + rows.count, [image for _, image in batch.images]
                answers = [judged(one, threshold) for one in student.predict_stored(stored)]
                names = [name for name, _ in batch.images]
                note = rows.add(lines := list(zip(names, answers, strict=True)), batch.time)
                if save_images:
                    save(save_images, first, student, stored, lines)
                tracker.advance(len(lines), len(lines), note)
                if endless and str(output) == STDIO and not still_read():
                    break
    except Interrupted:
        if not endless:
            written = video and rows.count
            kept = f"{output} has the rows until then" if written else "nothing was written"
            raise Interrupted(f"predict stopped after {rows.count} images; {kept}") from None
    except DataError as error:
        ended = error
    if rows.count or not (broken or ended):
        rows.finish()
    if ended:
        raise ended
    if broken:
        for path, reason in broken.items():
            event("unread", path=str(path), reason=str(reason))
        raise DataError(_broken_files([*map(str, broken.values())], total or len(broken)))
    return {"images": rows.count, "output": output}


def _check(
    images: Sequence[str], output: Path, threshold: float, video: str | None, follow: bool
) -> None:
    """Raise ConfigError if options exclude each other; ``video`` is one of the images."""
    is_file = output.suffix.lower() in (".csv", ".jsonl") and not output.is_dir()
    if not is_file and str(output) != STDIO:
        raise ConfigError(f"--output {output}: name a file that ends in .csv or .jsonl")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold}: choose a probability from 0 to 1")
    if video and (follow or len(images) > 1):
        raise ConfigError(
            f"{without_password(video)} is a video: give it alone, without other images or --follow"
        )


def open_student(config: Config, path: Path, method: str | None) -> AnyStudent:
    """The student of a run, of an export's folder, or of an ONNX file; errors as when loaded."""
    if path.suffix.lower() == ".onnx" and path.is_file():
        file: Path | None = path
    elif (path / "student" / CARD).is_file():
        file = None
    else:  # fp32 before fp16 and int8
        found = path.glob("student*.onnx")
        file = min(found, key=lambda file: (len(file.name), file.name), default=None)
    if file is not None:
        refuse_method(file, method)
        return ExportedStudent(file)
    device = make_runtime(config.runtime).device
    return load_student(path, method=method, default_method=config.transfer.method, device=device)


def judged(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction, or ``unknown`` if it is too unsure or its image has a warning."""
    if threshold and (not prediction.probability >= threshold or prediction.warning):
        return replace(prediction, label=UNKNOWN)
    return prediction


def _make_folder(folder: Path, images: Sequence[str], paths: Sequence[Path]) -> None:
    """Make a folder for pictures; raises ConfigError if that fails or it is among the images."""
    place = Path(os.path.realpath(folder))
    among = str(place) in {os.path.realpath(path.parent) for path in paths}
    if among or any(
        place.is_relative_to(os.path.realpath(entry)) and Path(entry).is_dir() for entry in images
    ):
        raise ConfigError(
            f"--save-images {folder} lies among the images that are classified: the pictures would "
            "be classified, too; choose a folder outside of theirs"
        )
    require_writable(folder, f"--save-images {folder}")


def save(
    folder: Path,
    first: int,
    student: AnyStudent,
    images: Sequence[NDArray[Any]],
    rows: Sequence[Row],
) -> None:
    """Write a PNG for each image: its place in the output, its name, and its class drawn below."""
    for number, (image, (path, answer)) in enumerate(zip(images, rows, strict=True), first):
        text = answer.shown + ("  doubted" if answer.warning else "")
        name = re.sub(r"[^\w.#-]+", "_", Path(path).name.removesuffix(".png"))
        name = name.encode()[:LONGEST_NAME].decode("utf-8", "ignore")
        with replacing(folder / f"{number:06d}-{name}.png") as partial:
            captioned(image, student.sensor.missing, text).save(partial, format="PNG")


def watch(
    student: AnyStudent,
    folders: Sequence[str],
    broken: dict[Path, DataError],
    answered: Mapping[str, float],
) -> Generator[Batch]:
    """Batches of the images in folders, and of those that are added or change, without an end.

    An image that is ``answered`` (see :class:`RowWriter`) is done unless it changed after that
    time. The time of a batch is the end of the previous look, so that a change in the meantime
    counts. A file is read once it has stayed the same between two looks. Warns of broken files, and
    of folders that cannot be read for a while, and tries both again. Raises ConfigError if one of
    ``folders`` is not a folder.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--follow watches folders, but {folder} is not a folder")
    before: set[tuple[str, str]] = set()
    done: set[tuple[str, str]] = set()
    trouble, told, looked = "", set[str](), now()
    while True:
        try:
            listed = [(folder, list_files(Path(folder), quiet=True)) for folder in folders]
        except DataError as error:  # such as a network folder that is away for a while
            if str(error) != trouble:
                trouble = str(error)
                warn(f"{trouble}; looking again")
            time.sleep(LOOK_EVERY_S)
            continue
        trouble, earlier_look, looked = "", looked, now()
        there = {
            (str(Path(folder, name)), state)
            for folder, files in listed
            for name, state in files.items()
            if name.lower().endswith(SUFFIXES)
        }
        if answered:
            done |= {
                one
                for one in there - before
                if _changed(one[0]) <= answered.get(place_of(one[0]), -1.0)
            }
        ready = sorted((there & before) - done)
        images = read(student, [Path(path) for path, _ in ready], broken)
        yield from batched(images, BATCH, earlier_look)
        again = {str(p) for p, error in broken.items() if isinstance(error.__cause__, OSError)}
        for file, reason in broken.items():
            if str(reason) not in told:
                warn(str(reason))
                event("unread", path=str(file), reason=str(reason))
        told = {str(reason) for reason in broken.values()}
        broken.clear()
        done |= {(path, state) for path, state in ready if path not in again}
        away = _away(done - there, there)
        before, done = there, {one for one in done if one in there or one in away}
        time.sleep(LOOK_EVERY_S)


def _away(missing: set[tuple[str, str]], there: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of the missing images whose folder has no image at all: its drive may be gone."""
    folders = {Path(path).parent for path, _ in there} if missing else ()
    filled = {parent for folder in folders for parent in (folder, *folder.parents)}

    @functools.cache
    def is_away(folder: Path) -> bool:
        return next(filter(Path.is_dir, (folder, *folder.parents)), None) not in filled

    return {one for one in missing if is_away(Path(one[0]).parent)}


def _changed(path: str) -> float:
    """When a file was added or changed, whatever time its writer gave it; 0: it is gone.

    In seconds since 1970.
    """
    try:
        return Path(path).stat().st_ctime
    except OSError:
        return 0.0


def _broken_files(broken: Sequence[str], count: int) -> str:
    """One message for all broken files."""
    lines = "".join(f"\n  {message}" for message in broken[:SHOWN])
    if len(broken) > SHOWN:
        lines += f"\n  and {len(broken) - SHOWN} more, all without a row in the output"
    return f"{len(broken)} of {count} images could not be read; fix them or leave them out:{lines}"


def expand(images: Sequence[str]) -> list[Path]:
    """The files that files, folders, patterns and ``-`` stand for, each once, in the given order.

    Raises ConfigError if an entry matches nothing.
    """
    paths: dict[Path, None] = {}
    for entry in images:
        matching = _matches(entry)
        if not matching:
            raise ConfigError(f"{entry} matches no image: give files, folders, patterns or -")
        paths |= dict.fromkeys(matching)
    return list(paths)


def _matches(entry: str) -> list[Path]:
    if entry == STDIO:
        text = sys.stdin.read().removeprefix("\ufeff")
        lines = text.split("\0") if "\0" in text else lines_of(text)  # as `find -print0` does
        return [Path(line) for line in lines if line.strip()]
    path = Path(entry)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # such as a name that is too long: reading it says so, and the others go on
        return [path]
    if is_folder:
        names = list_files(path)
        if unread := tell_unread(names):
            warn(f"{path}: {unread}")
        return sorted(path / name for name in names if name.lower().endswith(SUFFIXES))
    if is_there or not any(sign in entry for sign in "*?["):
        return [path]
    fixed = next(place for place, part in enumerate(path.parts) if set(part) & set("*?["))
    base = Path(*path.parts[:fixed])
    paths = base.glob(str(Path(*path.parts[fixed:])))
    return sorted(p for p in paths if _may_be_file(p) and not is_system(str(p.relative_to(base))))


def _may_be_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that cannot be read
        return True


def read(
    student: AnyStudent, paths: Iterable[Path], broken: dict[Path, DataError]
) -> Iterator[tuple[Path, NDArray[Any]]]:
    """Paths and their images; errors of unreadable ones are added to ``broken``."""
    for path in paths:
        try:
            yield path, student.read(path)
        except DataError as error:
            broken[path] = error


def batched(
    images: Iterable[tuple[str | Path, NDArray[Any]]], size: int, time: str = ""
) -> Generator[Batch]:
    """Batches of named images, of this time or the present one; an error comes after the last."""
    batch: list[tuple[str | Path, NDArray[Any]]] = []
    try:
        for image in images:
            batch.append(image)
            if len(batch) == size:
                yield Batch(batch, time or now())
                batch = []
    except DataError:
        if batch:
            yield Batch(batch, time or now())
        raise
    if batch:
        yield Batch(batch, time or now())
