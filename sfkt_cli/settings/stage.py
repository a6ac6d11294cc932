"""The folder of one stage: what it is made from, whether it is done, and what ``--force`` keeps.

config.yaml   resolved settings, written when the stage starts
log.txt       all that was said, with the time; grows line by line
begun.json    settings and inputs, until the stage is done
checkpoint/   the resumable state, until the stage is done
done.json     written last: settings, inputs, versions, machine, seconds, outputs
"""

import contextlib
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from sfkt_cli import __version__, console
from sfkt_cli.errors import DataError, RunError
from sfkt_cli.files import read_record, read_settings, sha256_file, sha256_json, write_record
from sfkt_cli.machine import machine
from sfkt_cli.settings.config import Config, current_name, one_line, section_of, values_of

LOG = "log.txt"
CHECKPOINT = "checkpoint"  # folder of the resumable state
WRITES: dict[str, tuple[str, ...]] = {
    "needed": (  # the stage is done again where one that it wrote is missing or has another size
        "config.yaml", "model.json", "model.safetensors", "transfer.h5", "results.json",
        "predictions.csv", "report.md", "report.html", "report.tex",
    ),
    "dispensable": ("batch_size.json", "metrics.jsonl", "epochs.npy", "source.h5", "test.h5"),
    "pictures": (
        "pairs.png", "gallery-ti.png", "gallery-tr.png", "errors.png", "confusion.png",
        "reliability.png", "features.png", "curves.png",
    ),
    "beside": ("done.json", LOG, "images/", "oracle/", "tensorboard/"),
    "in passing": ("begun.json", f"{CHECKPOINT}/"),
}  # fmt: skip
"""What stages write, of which the first three are outputs; other files there are the user's."""
_WORK = (
    f"{CHECKPOINT}/*.pt", f"oracle/{CHECKPOINT}/*.pt", "oracle/done.json", "model.safetensors",
    "transfer.h5", "results.json", "done.json",
)  # fmt: skip
"""What a stage that has not ended could lose."""
_HOW = ("stage", "settings", "inputs", "versions", "machine", "outputs")
STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "prepare": (
        "seed", "dataset", "image_size", "classes", "split", "prepare.root", "prepare.fit",
    ),
    "source": (
        "seed", "source", "runtime.batch_size",
        # The part of ``training`` that is not about TI pairs and label-free scores.
        "training.min_steps", "training.shift", "training.flip", "training.clip_norm",
        "training.warm_start",
    ),
    "bridge": ("seed", "encoding", "training", "bridge", "runtime.batch_size"),
    "transfer": ("seed", "encoding", "training", "transfer", "runtime.batch_size"),
    "evaluate": (
        "seed", "training", "evaluate", "encoding", "transfer.method", "runtime.precision",
    ),
}  # fmt: skip
"""The settings that decide what a stage writes; the others may change between runs of it."""
WHAT_RUNS_DID_BEFORE: dict[str, Any] = {"bridge.alpha_p": 0.0}
"""Values that stand for settings that are newer than a run, where their defaults change results."""


def deciding_values(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, among these by dotted name, that decide what a stage writes."""
    kind, _, method = stage.partition("/")
    # A data set, a translator or a method may have a section of its own.
    chosen = {"prepare": "dataset", "bridge": "bridge.translator"}.get(kind)
    own = section_of(values.get(chosen, "") if chosen else method)
    deciding = {*STAGE_FIELDS.get(kind, ()), own}
    return {
        name: value
        for name, value in values.items()
        if name in deciding or name.partition(".")[0] in deciding
    }


def deciding_settings(stage: str, config: Config) -> dict[str, Any]:
    """The settings that decide what a stage writes, by dotted name."""
    return deciding_values(stage, values_of(config))


class Output(BaseModel):
    """A file that a stage wrote; without ``sha256`` if it carries its own checksum."""

    bytes: NonNegativeInt
    sha256: str | None


class Begun(BaseModel):
    """The content of begun.json: what an unfinished stage is made from."""

    settings: dict[str, Any] = {}
    inputs: dict[str, str] = {}


class Done(Begun):
    """The content of done.json; figures of a stage's own may come on top."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    stage: str
    outputs: dict[str, Output] = {}
    versions: dict[str, str] = {}
    machine: str = "an unknown machine"  # of an earlier version
    seconds: float = 0.0
    best_epoch: PositiveInt | None = None
    peak_memory_mb: float | None = None
    ti_agreement: float | None = None
    samples: dict[str, NonNegativeInt] = {}


@dataclass(frozen=True)
class Stage:
    """One stage's folder while it runs; in a dry run a temporary one."""

    name: str  # such as ``bridge`` or ``transfer/tgkt``
    folder: Path
    config: Config
    inputs: Mapping[str, str]  # digests of its inputs by name
    dry: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        """Folder of the resumable state; gone once the stage is done."""
        return self.folder / CHECKPOINT

    @property
    def made_from(self) -> dict[str, Any]:
        """Settings and inputs, as in begun.json and done.json."""
        return {"settings": deciding_settings(self.name, self.config), "inputs": dict(self.inputs)}

    @property
    def digest(self) -> str:
        """Digest of settings and inputs: what a resumable state belongs to."""
        return sha256_json(self.made_from)

    def finish(self, **summary: Any) -> None:
        """Write done.json, last of all, and drop the resumable state."""
        if self.dry:
            return
        names = sorted(n for kind in ("needed", "dispensable", "pictures") for n in WRITES[kind])
        written = [name for name in names if (self.folder / name).is_file()]
        record = {
            "stage": self.name,
            **self.made_from,
            "seconds": round(time.monotonic() - self.started, 3),
            "versions": versions(),
            "machine": machine(),
            "outputs": digest_outputs(self.folder, written),
            **summary,
        }
        write_record(self.folder / "done.json", record)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        console.log(f"done after {console.duration(record['seconds'])}")
        console.event("finished", **outcome(self.folder, record))

    def is_finished(self) -> bool:
        """Whether the stage is done; raises RunError if it is not made from the same."""
        done = self.folder / "done.json"
        lacking = why_not_done(self.folder)
        changes: dict[str, str] = {}
        if not lacking:
            changes = self.changes_since(read_record(done, Done))
        elif done.is_file():
            console.warn(f"{self.name} is done again: {lacking}")
        elif has_begun(self.folder):
            changes = self.changes_since(read_record(self.folder / "begun.json", Begun))
        if changes:
            state = "begun" if lacking else "finished"
            lines = "\n".join(f"  {name}: {change}" for name, change in changes.items())
            advice = f"{self.start_from_scratch(changes)}; --run DIR is for another run"
            if not os.access(self.run_folder, os.W_OK):
                advice = f"{self.run_folder} cannot be written to: give a copy of it as --run"
            raise RunError(
                f"{self.name} in {self.folder} was {state} with other settings or inputs:\n"
                f"{lines}\n{advice}"
            )
        return not lacking

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return self.folder.parents[self.name.count("/")]

    def start_from_scratch(self, changes: Iterable[str]) -> str:
        """Advice: the command that starts the stage anew with the settings among ``changes``."""
        values = deciding_settings(self.name, self.config)
        changed = [f"{name}={one_line(values[name])}" for name in changes if name in values]
        options = shlex.join(["--force", *(word for each in changed for word in ("--set", each))])
        command = command_of(self.name, self.run_folder, self.config.dataset)
        return f"`{command} {options}` starts it from scratch"

    def is_stale(self) -> bool:
        """Whether it was done or begun with other settings or inputs, or its record is damaged."""
        records = [(self.folder / name, kind) for name, kind in _MARKS.items()]
        try:
            there = [read_record(path, kind) for path, kind in records if path.is_file()]
        except DataError:
            return True
        return any(map(self.changes_since, there))

    def changes_since(self, before: Begun) -> dict[str, str]:
        """Each setting and input that has changed, by its name, with its change."""
        now = {**deciding_settings(self.name, self.config), **self.inputs}
        # A setting that did not exist then counts as its default, which mostly changes nothing.
        was = values_of(Config()) | WHAT_RUNS_DID_BEFORE | before.settings | before.inputs
        was["encoding"] = current_name(was["encoding"])
        changes = {}
        for name in sorted(now.keys() | before.inputs.keys()):
            moved = name == "prepare.root" and was.get("archive") == now.get("archive")
            if moved or was.get(name) == now.get(name):
                continue
            change = f"was {was.get(name)!r}, now {now.get(name)!r}"
            if before.inputs.get(name) and self.inputs.get(name):  # their digests tell nobody
                change = "has changed since"
                if name == "archive":
                    change += (
                        " (names, sizes or times of its files; where it was only copied, --force "
                        "writes the same data, and what was trained on them stays)"
                    )
            changes[name] = change
        return changes

    @contextlib.contextmanager
    def forgetting_failures(self) -> Iterator[None]:
        """Where the stage fails before there is work that could be lost, unmark it as begun."""
        try:
            yield
        except Exception as error:  # not an interruption, after which it goes on as it was
            if not self.folder.is_dir():
                raise RunError(
                    f"{self.name}: {self.folder} was moved or deleted while the stage worked in "
                    "it: the same command, with the new place as --run, continues from the last "
                    "saved state"
                ) from error
            if not has_begun(self.folder):
                for name in set(chain(*WRITES.values())) - {LOG}:
                    path = self.folder / name
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            raise


def command_of(stage: str, run: Path, dataset: str = "NAME") -> str:
    """The command that makes a stage of a run, such as ``transfer/tgkt``."""
    kind, _, method = stage.partition("/")
    what = f"prepare {dataset}" if kind == "prepare" else kind
    which = f"--method {method} " if kind == "transfer" and method else ""
    return f"sfkt {what} {which}--run {shlex.quote(str(run))}"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "torchvision", "numpy", "h5py", "pillow")
    installed = {name: metadata.version(name) for name in packages}
    return {"sfkt": __version__, "python": platform.python_version(), **installed}


def record_of(folder: Path) -> dict[str, Any]:
    """The done.json of a stage's folder; raises DataError if it is damaged."""
    done = read_record(folder / "done.json", Done)
    return done.model_dump(mode="json", exclude_unset=True)


def outcome(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a done.json, and the names of outputs and what lies beside them."""
    names = sorted([*record.get("outputs", ()), *WRITES["beside"]])
    files = [name for name in names if (folder / name).exists()]
    figures = {name: value for name, value in record.items() if name not in _HOW}
    return {"folder": str(folder), "figures": figures, "files": files}


def digest_outputs(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and digest of files that a stage wrote, for ``outputs`` of its done.json."""
    sealed = (".h5", ".safetensors")  # with a checksum of their own
    return {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": None if name.endswith(sealed) else sha256_file(folder / name),
        }
        for name in names
    }


def why_not_done(folder: Path) -> str:
    """Why a stage does not count as done, or ""; raises DataError if its record is damaged."""
    done = folder / "done.json"
    if not done.is_file():
        return f"{folder} is missing or unfinished"
    record = read_record(done, Done)
    for name, output in record.outputs.items():
        path = folder / name
        if record.stage != "export" and name not in WRITES["needed"]:
            continue
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != output.bytes:
            return f"{path} has {path.stat().st_size} bytes, {output.bytes} were written"
    return ""


def has_begun(folder: Path) -> bool:
    """Whether an unfinished stage left work that could be lost."""
    begun = (folder / "begun.json").is_file()
    return begun and any(any(folder.glob(place)) for place in _WORK)


# Force: while a start has no work that could be lost, what the stage was before lies beside it.

BEFORE = ".before"
"""End of the name of the folder in which it lies."""
_MARKS: dict[str, type[Begun]] = {"done.json": Done, "begun.json": Begun}
"""Without one of these a folder holds nothing that counts."""


def refuse_foreign(folder: Path) -> None:
    """Raise RunError if a folder holds files, but not those of a stage: they must not be lost."""
    there = {entry.name for entry in folder.glob("[!.]*")}
    files = there - {LOG}
    if not files or not there.isdisjoint(_MARKS):
        return
    try:
        read_settings(folder / "config.yaml")  # such as where done.json was deleted
    except DataError:
        raise RunError(
            f"{folder} is not the folder of a stage, and holds {', '.join(sorted(files)[:3])}: "
            "move these files away or delete them, or choose another run with --run"
        ) from None


def _before(folder: Path) -> Path:
    """Where what a stage was before lies; a link to the stage's folder stays as it is."""
    real = folder.resolve()
    return real.with_name(f".{real.name}{BEFORE}")


def folder_that_counts(folder: Path) -> Path:
    """The folder that counts for a stage: its own, or that of the old stage during ``--force``."""
    before = _before(folder)
    of_worth = any((before / name).is_file() for name in _MARKS)
    replaced = (folder / "done.json").is_file() or has_begun(folder)
    return before if of_worth and not replaced else folder


@contextlib.contextmanager
def restoring_on_failure(stage: Stage, force: bool) -> Iterator[None]:
    """Settle a stage before the block and however it ends; with ``force`` it starts anew there.

    Says so if the stage is the old one again. An error that ends the block then carries a note
    (``__notes__``), which means that there is nothing to continue from.
    """
    folder = stage.folder

    def back() -> str:
        before = folder / "done.json" if (folder / "done.json").is_file() else folder / "begun.json"
        changes: Iterable[str] = ()
        with contextlib.suppress(DataError):
            changes = stage.changes_since(read_record(before, Begun))
        command = stage.start_from_scratch(changes)
        message = (
            f"{stage.name} is what it was before --force: {command}, and `sfkt run` then continues "
            "without --force"
        )
        console.warn(message)
        return message

    if _settle(folder) and not force:  # an earlier start was killed
        back()
    try:
        if force:
            folder.resolve().rename(_before(folder))
            folder.resolve().mkdir()
        yield
    except BaseException as error:
        if _settle(folder):
            error.add_note(back())
        raise
    _settle(folder)
    if (folder / "done.json").is_file():
        (folder / "begun.json").unlink(missing_ok=True)


def _settle(folder: Path) -> bool:
    """Keep what counts of a stage, which may have been killed at any moment, and nothing else.

    Returns:
        Whether the stage is what it was before it was forced.
    """
    before, real = _before(folder), folder.resolve()
    if not before.is_dir():
        return False
    if folder_that_counts(folder) != before:
        _delete(before)
        return False
    shutil.rmtree(real, ignore_errors=True)
    before.rename(real)
    return True


def _delete(folder: Path) -> None:
    """Delete a folder, first the files that say that there is something in it."""
    for name in _MARKS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder)
