"""`sfkt predict`: classes of new images of the target sensor, as CSV or JSONL."""

import contextlib
import csv
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sfkt_cli.console import event, outlets, say, track, warn, write_output
from sfkt_cli.data.archive import is_system, list_files
from sfkt_cli.data.decode import SUFFIXES, tell_unread
from sfkt_cli.data.pictures import captioned
from sfkt_cli.data.video import frames, is_live, is_video, without_password
from sfkt_cli.errors import ConfigError, DataError, Interrupted, first_line
from sfkt_cli.evaluation.report import to_csv as harmless_csv
from sfkt_cli.files import lines_of, replacing, write_text
from sfkt_cli.models.saving import CARD
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.student import ExportedStudent, Prediction, Student, load_student
from sfkt_cli.training.predicting import COLLAPSED, FEWEST, collapse_warning
from sfkt_cli.training.runtime import make_runtime

BATCH = 64
STDIN = "-"
UNKNOWN = "unknown"
LOOK_EVERY_S = 0.5
SHOWN = 10  # so many broken files are named
LONGEST_NAME = 100  # bytes of an image's name in the name of its picture
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
    written as they come. Those of cameras and watched folders go behind the rows that are there; a
    signal ends these two.

    The arguments are the options of the command. Under ``--json`` each row is an event, too, and
    takes the place of CSV on standard output.

    Returns:
        The number of images, and where the rows are.

    Raises:
        ConfigError: The output cannot be written, holds other columns, or ends neither in .csv nor
            in .jsonl; nothing matches ``images``; or pictures cannot be saved, or among them.
        DataError: Some files could not be read; the rows of the others are written.
    """
    is_file = output.suffix.lower() in (".csv", ".jsonl") and not output.is_dir()
    if not is_file and str(output) != STDIN:
        raise ConfigError(f"--output {output}: name a file that ends in .csv or .jsonl")
    video = next((entry for entry in images if is_video(entry)), None)
    if video and (follow or len(images) > 1):
        raise ConfigError(
            f"{without_password(video)} is a video: give it alone, without other images or --follow"
        )
    if save_images:
        _make_folder(save_images, images)
    student = open_student(config, model or run.folder, method)
    broken: dict[Path, DataError] = {}
    total: int | None = None  # how many images there are, where somebody knows
    if follow:
        batches = watch(student, images, broken, output)
    elif video:
        batches = batched(frames(video, student.sensor), 1 if is_live(video) else BATCH)
    else:
        paths = expand(images)
        batches, total = batched(read(student, paths, broken), BATCH), len(paths)
    endless = follow or bool(video and is_live(video))
    rows = _Rows(output, student.classes, top_k, at_once=total is None, endless=endless)
    if endless:
        say(f"predict: rows are written to {output} as images come; Ctrl-C ends")
    ended: DataError | None = None  # of a video
    try:
        with track("predict", total) as tracker, contextlib.closing(batches):
            for batch in batches:
                first, stored = rows.earlier + rows.count, [image for _, image in batch]
                answers = [judged(one, threshold) for one in student.predict_stored(stored)]
                lines = [(path, answer) for (path, _), answer in zip(batch, answers, strict=True)]
                note = rows.add(lines)
                if save_images:
                    save(save_images, first, student, stored, lines)
                tracker.advance(len(batch), len(batch), note)
    except Interrupted:
        if not endless:
            kept = f"{output} has the rows until then" if video else "nothing was written"
            raise Interrupted(f"predict stopped after {rows.count} images; {kept}") from None
    except DataError as error:
        ended = error
    if rows.count or not (broken or ended):
        rows.finish()
    if ended:
        raise ended
    if broken:
        raise DataError(_broken_files([*map(str, broken.values())], total or len(broken)))
    return {"images": rows.count, "output": output}


class _Rows:
    """The rows of the output: written as they come, or all at the end.

    Those of ``endless`` images go behind the rows that an earlier start wrote.
    """

    def __init__(
        self, output: Path, classes: Sequence[str], top_k: int, *, at_once: bool, endless: bool
    ) -> None:
        self._output, self._classes, self._at_once = output, classes, at_once
        self._top_k = min(top_k, len(classes))
        self._jsonl = output.suffix.lower() == ".jsonl"
        self._header = "" if self._jsonl else to_csv([], self._top_k)
        self._unwritten: list[str] = []
        self._votes, self._entropy = Counter[str](), 0.0  # of images that are not doubted
        self._doubted, self._doubt = 0, ""
        self.count = 0
        self.earlier = 0  # rows that an earlier start wrote
        self._begun = str(output) != STDIN and self._can_append(endless)

    def _can_append(self, endless: bool) -> bool:
        """Whether rows go behind others; raises ConfigError if they cannot be written."""
        begin, header = None, self._header.encode()
        try:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            if endless and self._output.is_file():
                with self._output.open("r+b") as file:  # not written before there are rows
                    begin = file.read(len(header))
                    if begin == header:
                        lines = file.readlines()
                        if lines and not lines[-1].endswith(b"\n"):  # cut off by an interruption
                            file.seek(-len(lines.pop()), os.SEEK_END)
                            file.truncate()
                        self.earlier = len(lines)
            else:
                tempfile.TemporaryFile(dir=self._output.parent).close()
        except OSError as error:
            raise ConfigError(
                f"--output {self._output} cannot be written ({first_line(error)}): choose another "
                "file"
            ) from None
        if begin and begin != header:
            raise ConfigError(
                f"--output {self._output} holds other columns than {self._header.strip()}: choose "
                "another file, or the earlier --top-k"
            )
        return begin == header

    def add(self, rows: Sequence[Row]) -> str:
        """Tell scripts of further rows, and write them; a stream gets a note for people."""
        for path, prediction in rows:
            event("prediction", **as_row(path, prediction, self._top_k))
            if prediction.warning:
                self._doubted += 1
                self._doubt = self._doubt or f"{path}: {prediction.warning}"
                continue
            self._votes[prediction.ranked[0][0]] += 1
            self._entropy -= sum(p * math.log(p) for _, p in prediction.ranked if p > 0)
        self.count += len(rows)
        text = to_jsonl(rows, self._top_k) if self._jsonl else to_csv(rows, self._top_k)
        self._unwritten.append(text.removeprefix(self._header))
        if self._at_once:
            self._write()
        return f"{rows[-1][1].label} {rows[-1][1].probability:.0%}" if self._at_once else ""

    def _write(self) -> None:
        """Write what is not written yet; the first rows take the place of another file."""
        text = "".join(["" if self._begun else self._header, *self._unwritten])
        if str(self._output) == STDIN:
            if not outlets.json:
                write_output(text)
        elif self._begun:
            with self._output.open("ab") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        else:
            write_text(self._output, text)
        self._begun = True
        self._unwritten.clear()

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
        if str(self._output) != STDIN:
            say(f"predict: {self.count} images" + f" in {self._output}" * bool(self.count))


def open_student(config: Config, path: Path, method: str | None) -> AnyStudent:
    """The student of a run, of an export's folder, or of an ONNX file; errors as when loaded."""
    if path.suffix.lower() == ".onnx" and path.is_file():
        return ExportedStudent(path)
    files = [path / f"student{end}.onnx" for end in ("", "-fp16", "-int8")]
    file = next((file for file in files if file.is_file()), None)
    if file is not None and not (path / "student" / CARD).is_file():
        return ExportedStudent(file)
    device = make_runtime(config.runtime).device
    return load_student(path, method=method, usual=config.transfer.method, device=device)


def judged(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction, or ``unknown`` where it is too unsure or its image is doubted."""
    if threshold and (not prediction.probability >= threshold or prediction.warning):
        return replace(prediction, label=UNKNOWN)
    return prediction


def _make_folder(folder: Path, images: Sequence[str]) -> None:
    """A folder for pictures; raises ConfigError where it lies below those of images, or cannot."""
    for entry in images:
        with contextlib.suppress(OSError):  # such as a name that is too long
            if Path(entry).is_dir() and folder.resolve().is_relative_to(Path(entry).resolve()):
                raise ConfigError(
                    f"--save-images {folder} lies in {entry}, whose images are classified: the "
                    "pictures would be classified, too; choose a folder outside of it"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--save-images {folder} cannot be written ({error.strerror}): choose another folder"
        ) from None


def save(
    folder: Path,
    first: int,
    student: AnyStudent,
    images: Sequence[NDArray[Any]],
    rows: Sequence[Row],
) -> None:
    """Write a PNG for each image: its place in the output, its name, and its class drawn below."""
    for number, (image, (path, answer)) in enumerate(zip(images, rows, strict=True), first):
        text = f"{answer.label}  {answer.probability:.0%}" + ("  doubted" if answer.warning else "")
        name = re.sub(r"[^\w.#-]+", "_", Path(path).name.removesuffix(".png"))
        name = name.encode()[:LONGEST_NAME].decode("utf-8", "ignore")
        with replacing(folder / f"{number:06d}-{name}.png") as partial:
            captioned(image, student.sensor.missing, text).save(partial, format="PNG")


def watch(
    student: AnyStudent, folders: Sequence[str], broken: dict[Path, DataError], output: Path
) -> Generator[Batch]:
    """Batches of the images of folders, and of those that come or change, without an end.

    Images that have a row in ``output`` from an earlier start, under the same path, are done unless
    they changed after that file's time. The time is set back to the look before its newest rows, so
    that a change in the meantime counts. A file is read once it has stayed the same between two
    looks. A broken one is warned of, as is a folder that cannot be read for a while; what cannot be
    read is tried again. Raises ConfigError if one of them is not a folder.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--follow watches folders, but {folder} is not a folder")
    before: set[tuple[str, str]] = set()
    done: set[tuple[str, str]] = set()
    answered = _paths_in(output)
    written_ns = output.stat().st_mtime_ns if answered else 0
    trouble, told, look_ns = "", set[str](), 0
    while True:
        last_ns, look_ns = look_ns, time.time_ns()
        try:
            listed = [(folder, list_files(Path(folder), quiet=True)) for folder in folders]
        except DataError as error:  # such as a network folder that is away for a while
            if str(error) != trouble:
                trouble = str(error)
                warn(f"{trouble}; looking again")
            time.sleep(LOOK_EVERY_S)
            continue
        trouble = ""
        now = {
            (str(Path(folder, name)), state)
            for folder, files in listed
            for name, state in files.items()
            if name.lower().endswith(SUFFIXES)
        }
        done |= {
            (path, state)
            for path, state in now
            if _escaped(path) in answered and _changed_ns(path) <= written_ns
        }
        answered.clear()  # what changes from now on is classified again
        ready = sorted((now & before) - done)
        for batch in batched(read(student, [Path(path) for path, _ in ready], broken), BATCH):
            yield batch
            if str(output) != STDIN:
                with contextlib.suppress(OSError):  # see above
                    os.utime(output, ns=(last_ns, last_ns))
        away = {str(path) for path, error in broken.items() if isinstance(error.__cause__, OSError)}
        for message in dict.fromkeys(map(str, broken.values())):
            if message not in told:
                warn(message)
        told = {str(error) for error in broken.values()}
        broken.clear()
        # A folder without any image may be a drive that is away for a while.
        empty = tuple(f"{Path(folder)}{os.sep}" for folder, files in listed if not files)
        known = done | {(path, state) for path, state in ready if path not in away}
        before, done = now, {one for one in known if one in now or one[0].startswith(empty)}
        time.sleep(LOOK_EVERY_S)


def _escaped(path: str) -> str:
    """A path as it stands in CSV: bytes that are not UTF-8 are escaped."""
    return path.encode("utf-8", "backslashreplace").decode()


def _changed_ns(path: str) -> int:
    """When a file was put there or changed, whatever time its writer gave it; 0: it is gone."""
    try:
        return Path(path).stat().st_ctime_ns
    except OSError:
        return 0


def _paths_in(output: Path) -> set[str]:
    """Paths of the images that have a row in an output; none where it is not there."""
    if str(output) == STDIN or not output.is_file():
        return set()
    paths = set[str]()
    with output.open(encoding="utf-8", errors="replace", newline="") as file:
        if output.suffix.lower() == ".csv":
            with contextlib.suppress(csv.Error):  # of a cell that an interruption cut off
                for row in csv.DictReader(file):
                    if None not in row.values():
                        paths.add(row["path"])
            return paths
        for line in file:
            # a line that an interruption cut off, or of another program
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                paths.add(_escaped(json.loads(line)["path"]))
        return paths


def _broken_files(broken: Sequence[str], count: int) -> str:
    """One message for all of them."""
    lines = "".join(f"\n  {message}" for message in broken[:SHOWN])
    if len(broken) > SHOWN:
        lines += f"\n  and {len(broken) - SHOWN} more, all without a row in the output"
    return f"{len(broken)} of {count} images could not be read; fix them or leave them out:{lines}"


def expand(images: Sequence[str]) -> list[Path]:
    """Files from files, folders, patterns and ``-``, each once, in the order given.

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
    if entry == STDIN:
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


def batched(images: Iterable[tuple[str | Path, NDArray[Any]]], size: int) -> Generator[Batch]:
    """Batches of named images; an error comes after the images before it."""
    batch: Batch = []
    try:
        for image in images:
            batch.append(image)
            if len(batch) == size:
                yield batch
                batch = []
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
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
    top = [{"class": c, "probability": _rounded(p)} for c, p in prediction.ranked[:top_k]]
    first = {"class": prediction.label, "probability": _rounded(prediction.probability)}
    return {"path": str(path), **first, "warning": prediction.warning, "top": top}


def _rounded(probability: float) -> float | None:
    """None for NaN, which JSON has no word for."""
    return round(probability, 6) if math.isfinite(probability) else None
