"""The run folder: where each stage reads and writes, what is finished, and with which settings.

    runs/current                        the name of the run used last
    runs/<name>/<stage>/config.yaml     resolved settings, written when the stage starts
    runs/<name>/<stage>/log.txt         all that was said, with the time; grows line by line
    runs/<name>/<stage>/done.json       written last: settings, inputs, versions, seconds, outputs

``transfer`` has one such folder a method: ``runs/<name>/transfer/<method>``.
"""

import contextlib
import difflib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from sfkt_cli import __version__, console
from sfkt_cli.errors import DataError, RunError
from sfkt_cli.files import (
    locking,
    read_record,
    read_settings,
    sha256_file,
    sha256_json,
    sweep_partials,
    write_record,
    write_settings,
)
from sfkt_cli.settings.config import (
    Config,
    DatasetName,
    as_dict,
    current_name,
    merge,
    nested,
    pick,
    section_fields,
    section_of,
    to_yaml,
)

RUNS = Path("runs")
LOG = "log.txt"
_IN_PASSING = ("begun.json", "checkpoint")
_NO_WORK = ("begun.json", "config.yaml", LOG, "batch_size.json", "tensorboard")
"""What a stage writes before it has work that could be lost."""
_MARKS = ("done.json", "begun.json")
"""Without one of these a folder holds nothing that counts."""
_HOW = ("stage", "settings", "inputs", "versions", "outputs")
_OWN_CHECKSUM = (".h5", ".safetensors")
_DISPENSABLE = (
    "source.h5", "test.h5", "epochs.npy", "metrics.jsonl", "batch_size.json", ".png",
)  # fmt: skip
"""Ends of the names of outputs that may be deleted."""
DATA_FIELDS = ("seed", "dataset", "image_size", "classes", "split")
DATA_SECTIONS = {
    name: section_of(name)
    for name in get_args(DatasetName)
    if section_of(name) in Config.model_fields
}
SOURCE_TRAINING = tuple(
    f"training.{name}" for name in ("min_steps", "shift", "flip", "clip_norm", "warm_start")
)
"""The part of ``training`` that is not about TI pairs and label-free scores."""
STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "prepare": (*DATA_FIELDS, "prepare.root", "prepare.fit"),
    "source": ("seed", *SOURCE_TRAINING, "source", "runtime.batch_size"),
    "bridge": ("seed", "encoding", "training", "bridge", "runtime.batch_size"),
    "transfer": ("seed", "encoding", "training", "transfer", "runtime.batch_size"),
    "evaluate": ("seed", "training", "evaluate", "encoding", "runtime.precision"),
}
"""The settings that decide what a stage writes; the others may change between runs of it."""
WHAT_RUNS_DID_BEFORE: dict[str, Any] = {"bridge.alpha_p": 0.0}
"""Values that stand for settings that are newer than a run, where their defaults change results."""
READS: dict[str, tuple[str, ...]] = {
    "source": ("prepare/source.h5",),
    "bridge": ("prepare/transfer.h5", "source/model.safetensors"),
    "transfer": ("prepare/transfer.h5", "source/model.safetensors", "bridge/model.safetensors"),
    "evaluate": (
        "prepare/transfer.h5", "prepare/test.h5", "source/model.safetensors",
        "bridge/model.safetensors", "transfer/[!.]*/model.safetensors",
    ),
}  # fmt: skip
"""What a stage reads, below the run folder."""


class Output(BaseModel):
    """A file that a stage wrote; without ``sha256`` where it carries a checksum of its own."""

    bytes: NonNegativeInt
    sha256: str | None


class Begun(BaseModel):
    """The content of begun.json: what an unfinished stage is made from."""

    settings: dict[str, Any]
    inputs: dict[str, str]


class Done(Begun):
    """The content of done.json; figures of a stage's own may come on top."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    stage: str
    settings: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    outputs: dict[str, Output] = {}
    versions: dict[str, str] = {}
    seconds: float = 0.0
    best_epoch: PositiveInt | None = None
    peak_memory_mb: float | None = None
    ti_agreement: float | None = None
    samples: dict[str, NonNegativeInt] = {}


@dataclass(frozen=True)
class Stage:
    """One stage's folder while it runs; in a dry run a temporary one."""

    name: str
    folder: Path
    config: Config
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    dry: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        """Folder of the resumable state; gone once the stage is done."""
        return self.folder / "checkpoint"

    @property
    def digest(self) -> str:
        """Digest of settings and inputs: what a resumable state belongs to."""
        return sha256_json({"settings": self.settings, "inputs": dict(self.inputs)})

    def make_room(self, size: int) -> None:
        """Delete what a forced stage was before, where ``size`` bytes do not fit beside it."""
        before = _before(self.folder)
        if before.is_dir() and shutil.disk_usage(before).free < size:
            _delete(before)

    def finish(self, **summary: Any) -> None:
        """Write done.json, last of all, and drop the resumable state."""
        if self.dry:
            return
        files = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        passing = (*_IN_PASSING, LOG)
        written = [name for name in files if name not in passing and name[0] != "."]
        record = {
            "stage": self.name,
            "settings": self.settings,
            "inputs": dict(self.inputs),
            "seconds": round(time.monotonic() - self.started, 3),
            "versions": versions(),
            "outputs": digest_outputs(self.folder, written),
            **summary,
        }
        write_record(self.folder / "done.json", record)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        console.log(f"done after {console.duration(record['seconds'])}")
        console.event("finished", **_outcome(self.folder, record))


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path  # ``runs/<name>``
    force: bool = False  # start finished or differently set stages anew
    dry: bool = False  # write nothing into the run folder
    main: bool = True  # whether this process writes; of several, one does
    # The main process's verdict, whether a stage is finished, for all of them (see :meth:`open`).
    agree: Callable[[bool], bool] = bool

    def path(self, *parts: str) -> Path:
        """A path below the run folder."""
        return self.folder.joinpath(*parts)

    @property
    def source_store(self) -> Path:
        """TR RGB and labels; opened by ``source`` alone."""
        return self.path("prepare", "source.h5")

    @property
    def transfer_store(self) -> Path:
        """TI pairs and TR target images, unlabelled."""
        return self.path("prepare", "transfer.h5")

    @property
    def test_store(self) -> Path:
        """Target labels; opened by ``evaluate`` alone."""
        return self.path("prepare", "test.h5")

    def finished(self, stage: str) -> bool:
        """Whether a stage such as ``bridge`` or ``transfer/tgkt`` is done, its outputs in place.

        One with a damaged done.json counts; whoever reads that file says so.
        """
        try:
            return not _lacks(self.path(stage))
        except DataError:
            return True

    def has(self, stage: str) -> bool:
        """Whether a stage that a command does not need is finished.

        Raises:
            RunError: It was finished, and lacks an output now, or is set aside while it starts
                anew: it must not be left out in silence.
            DataError: Its done.json is damaged.
        """
        if not (_standing(self.path(stage)) / "done.json").is_file():
            return False
        kind, _, method = stage.partition("/")
        self.require(stage, f"sfkt {kind} --method {method}" if method else f"sfkt {kind}")
        return True

    def has_begun(self, stage: str) -> bool:
        """Whether a stage left work from which its next start goes on."""
        return _has_begun(_standing(self.path(stage)))

    def methods(self) -> list[str]:
        """Names of the transfer methods that are finished, or set aside while they start anew."""
        there = (path.name for path in self.path("transfer").glob("*"))
        names = {name.removeprefix(".").removesuffix(BEFORE) for name in there}
        folders = {name: _standing(self.path("transfer", name)) for name in sorted(names)}
        return [name for name, folder in folders.items() if (folder / "done.json").is_file()]

    def record(self, stage: str) -> dict[str, Any]:
        """The done.json of a finished stage; raises DataError if it is damaged."""
        done = read_record(self.path(stage, "done.json"), Done)
        return done.model_dump(mode="json", exclude_unset=True)

    def output(self, stage: str, name: str) -> Path:
        """A file of a finished stage, if it is there; raises DataError if it has changed."""
        path = self.path(stage, name)
        written = read_record(self.path(stage, "done.json"), Done).outputs.get(name)
        if written and written.sha256 and path.is_file() and sha256_file(path) != written.sha256:
            raise DataError(
                f"{path} is not what its stage wrote (the checksum in done.json differs): "
                "restore it, or run the stage again with --force"
            )
        return path

    def outcome(self, stage: str) -> dict[str, Any]:
        """What a finished stage found and wrote, for scripts."""
        outcome = _outcome(self.path(stage), self.record(stage))
        return {"run": str(self.folder), "stage": stage, **outcome}

    def reads(self, stage: str) -> list[Path]:
        """The files that a stage reads, those that are there."""
        patterns = READS.get(stage.partition("/")[0], ())
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """The rows of a finished stage's metrics.jsonl; none where the file was deleted."""
        path = self.output(stage, "metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def require(self, stage: str, command: str) -> Path:
        """The folder of a finished stage.

        Raises:
            RunError: It is not finished; the message names the command that makes it.
            DataError: Its done.json is damaged.
        """
        folder = self.path(stage)
        lacking = _lacks(folder)
        if lacking:
            if (standing := _standing(folder)) != folder and not _lacks(standing):
                raise RunError(
                    f"{folder} is set aside by a start with --force: wait for that to end or, if "
                    f"it was killed, run `{command}`, which brings it back"
                )
            raise RunError(f"{lacking}: first run `{command}`{self._or_another()}")
        return folder

    def _or_another(self) -> str:
        """A hint at the run that was meant, where this one does not exist; else nothing."""
        if self.folder.exists():
            return ""
        runs = {
            path.parent.name: path.parent
            for folder in (RUNS, self.folder.parent)
            for path in folder.glob("*/prepare")
        }
        near = [str(runs[name]) for name in difflib.get_close_matches(self.folder.name, runs)]
        return f", or did you mean --run {' or '.join(near)}?" if near else ""

    def remembered(self, stage: str) -> dict[str, Any]:
        """Settings this run used before: the stage's own, else those of the stages above it.

        The settings of a stage that did not finish do not count, except for that stage itself,
        which goes on with them unless it is started anew. Where it is killed before it has work
        that could be lost, those of what it was before count.

        Raises:
            DataError: They are damaged, and the stage is not started anew.
        """
        settings: dict[str, Any] = {}
        for above in ("prepare", "source", "bridge", stage):
            folder, anew = _standing(self.path(above)), self.force and above == stage
            path = folder / "config.yaml"
            if path.is_file() and not (folder / "done.json").is_file():
                if anew:
                    console.warn(
                        f"{stage} starts anew and forgets the settings of its unfinished start"
                    )
                if anew or above != stage:
                    continue
            try:
                used = known_settings(read_settings(path)) if path.is_file() else {}
            except DataError as error:
                if not anew:
                    raise
                console.warn(f"{error}; {stage} starts anew without these settings")
                break
            names = _fields(above, used)
            fields = {n: value for n in names if (value := pick(used, n, ...)) is not ...}
            settings = merge(settings, used if above == "prepare" else {}, nested(fields))
            if above == stage:
                break
        return settings

    @contextlib.contextmanager
    def open(
        self, stage: str, config: Config, inputs: Mapping[str, str], *, renew: bool = False
    ) -> Iterator[Stage | None]:
        """Enter a stage's folder under a lock; None where it is finished with these settings.

        An interrupted stage is entered again with what it left (its checkpoint). One that fails
        before there is such work leaves no settings: later commands do not take over the settings
        of a command that could not begin. With ``force`` it starts anew, and what it was before
        comes back where the start fails, or is killed, before there is such work. Of several
        processes the main one looks, locks and writes; the others wait for its verdict.

        ``inputs`` are the digests of its inputs by name. With ``renew`` it starts anew if settings
        or inputs have changed, as cheap and derived stages do.

        Raises:
            RunError: Another process works on the folder, or the stage was done or begun with
                other settings or inputs and ``force`` is not set.
            DataError: done.json or begun.json is damaged.
        """
        folder = self.path(stage)
        entered = Stage(stage, folder, config, stage_settings(stage, config), inputs)
        state = {"settings": entered.settings, "inputs": dict(inputs)}
        if not self.main:
            yield None if self.agree(False) else entered
            return
        if self.dry:
            if not self.force and _is_finished(stage, _standing(folder), state):
                yield None
                return
            with tempfile.TemporaryDirectory(prefix="sfkt-") as place:
                yield replace(entered, folder=Path(place), dry=True)
            return
        _make(folder)
        busy = f"another sfkt process works on {folder}: wait for it to end"
        lock = self.path(f".{stage.replace('/', '-')}.lock")
        with locking(lock, busy), _settled(stage, folder, self.force):
            if self.force:
                _set_aside(folder)
            if renew:
                _forget_stale(stage, folder, state)
            sweep_partials(folder)
            begun = folder / "begun.json"
            if _is_finished(stage, folder, state):
                begun.unlink(missing_ok=True)  # left where the stage was killed just after the end
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
                self.agree(True)
                console.event("skipped", stage=stage, folder=folder, reason="done already")
                yield None
                return
            resumed = _has_begun(folder)
            (folder / "done.json").unlink(missing_ok=True)  # of a stage that lacks outputs
            if not resumed:  # left by a start that was killed before it had work
                (folder / "batch_size.json").unlink(missing_ok=True)
            write_record(begun, state)
            write_settings(folder / "config.yaml", to_yaml(config))
            self.agree(False)
            with console.stage_log(stage, folder / LOG), _forgetting_failures(stage, folder):
                installed = " ".join(f"{name} {number}" for name, number in versions().items())
                console.log(f"{'goes on' if resumed else 'begins'}: {' '.join(sys.argv)}")
                console.log(f"{installed} on {platform.node()}, {platform.platform()}")
                console.event("started", folder=folder, resumed=resumed)
                yield entered


@contextlib.contextmanager
def _forgetting_failures(stage: str, folder: Path) -> Iterator[None]:
    """Where a stage fails before there is work that could be lost, unmark it as begun."""
    try:
        yield
    except Exception as error:  # not an interruption, after which it goes on as it was
        if not folder.is_dir():
            raise RunError(
                f"{stage}: {folder} was moved or deleted while the stage worked in it: the same "
                "command, with the new place as --run, continues from the last saved state"
            ) from error
        if not _has_begun(folder):
            for name in ("begun.json", "config.yaml"):
                (folder / name).unlink(missing_ok=True)
        raise


def call_stage(name: str, config: Config, run: Run) -> None:
    """Run a stage, such as ``evaluate`` or ``transfer/tgkt``, in this process."""
    stage = name.partition("/")[0]
    getattr(import_module(f"sfkt_cli.stages.{stage}"), stage)(config, run)


def stage_settings(stage: str, config: Config) -> dict[str, Any]:
    """The settings that decide what a stage writes, as dotted names."""
    values = as_dict(config)
    flat: dict[str, Any] = {}
    for name in _fields(stage, values):
        value = pick(values, name)
        section = isinstance(value, dict)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if section else {name: value}
    return flat


def _fields(stage: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the settings and sections, among these values, that a stage works with."""
    kind, _, method = stage.partition("/")
    # A data set, a translator or a method may have a section of its own.
    chosen = {"prepare": "dataset", "bridge": "bridge.translator"}.get(kind)
    own = section_of(pick(values, chosen, "") if chosen else method)
    return (*STAGE_FIELDS.get(kind, ()), *([own] if own in values else []))


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "torchvision", "numpy", "h5py", "pillow")
    installed = {name: metadata.version(name) for name in packages}
    return {"sfkt": __version__, "python": platform.python_version(), **installed}


def _outcome(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a done.json, and the names of what lies beside it."""
    files = [
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in sorted(folder.iterdir())
        if entry.name not in _IN_PASSING and not entry.name.startswith(".")
    ]
    figures = {name: value for name, value in record.items() if name not in _HOW}
    return {"folder": str(folder), "figures": figures, "files": files}


def known_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this version has; an older run may name others."""
    used = {name: pick(values, name, ...) for name in section_fields()}
    return nested({name: value for name, value in used.items() if value is not ...})


def digest_outputs(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and digest of files that a stage wrote, for ``outputs`` of its done.json."""
    return {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": None if name.endswith(_OWN_CHECKSUM) else sha256_file(folder / name),
        }
        for name in names
    }


def _lacks(folder: Path) -> str:
    """Why a stage does not count as finished, or ""; raises DataError if its record is damaged."""
    done = folder / "done.json"
    if not done.is_file():
        return f"{folder} is missing or unfinished"
    for name, output in read_record(done, Done).outputs.items():
        path = folder / name
        if name.endswith(_DISPENSABLE):
            continue
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != output.bytes:
            return f"{path} has {path.stat().st_size} bytes, {output.bytes} were written"
    return ""


def _is_finished(stage: str, folder: Path, now: Mapping[str, Any]) -> bool:
    """Whether a stage is done; raises RunError if so with other settings or inputs."""
    done = folder / "done.json"
    lacking = _lacks(folder)
    changes: list[str] = []
    if not lacking:
        changes = _changes(stage, read_record(done, Done), now)
    elif done.is_file():
        console.warn(f"{stage} is done anew: {lacking}")
    elif _has_begun(folder):
        changes = _changes(stage, read_record(folder / "begun.json", Begun), now)
    if changes:
        state = "begun" if lacking else "finished"
        raise RunError(
            f"{stage} in {folder} was {state} with other settings or inputs:\n"
            + "\n".join(changes)
            + "\nuse --force to start it anew, or --run DIR for another run"
        )
    return not lacking


def _has_begun(folder: Path) -> bool:
    """Whether a stage left more than what it writes before all else: work that could be lost."""
    if not (folder / "begun.json").is_file():
        return False
    names = {entry.name for entry in folder.iterdir() if entry.name[0] != "."}
    return bool(names.difference(_NO_WORK))


def _changes(stage: str, before: Begun, now: Mapping[str, Any]) -> list[str]:
    """Lines that name each setting and input that has changed."""
    # A setting that did not exist then counts as its default, which mostly changes nothing.
    usual = stage_settings(stage, Config()) | WHAT_RUNS_DID_BEFORE
    settings = {name: usual[name] for name in now["settings"] if name in usual} | before.settings
    if "encoding" in settings:
        settings["encoding"] = current_name(settings["encoding"])
    changes = []
    for old, new in ((settings, now["settings"]), (before.inputs, now["inputs"])):
        for name in sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
            change = f"was {old.get(name)!r}, now {new.get(name)!r}"
            if old is before.inputs and old.get(name) and new.get(name):
                change = "has changed since"
                if name == "archive":
                    change += " (names, sizes or times of its files; a copy may change the times)"
            changes.append(f"  {name}: {change}")
    return changes


def _forget_stale(stage: str, folder: Path, now: Mapping[str, Any]) -> None:
    """Unmark a stage that was done or begun with other settings or inputs; its files stay."""
    for name, kind in (("done.json", Done), ("begun.json", Begun)):
        path = folder / name
        try:
            stale = path.is_file() and bool(_changes(stage, read_record(path, kind), now))
        except DataError:
            stale = True
        if stale:
            path.unlink()
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)


# Force: while a start has no work that could be lost, what the stage was before lies beside it.

BEFORE = ".before"
"""End of the name of the folder in which it lies."""


def _before(folder: Path) -> Path:
    """Where what a stage was before lies; a link to the stage's folder stays as it is."""
    real = folder.resolve()
    return real.with_name(f".{real.name}{BEFORE}")


def _standing(folder: Path) -> Path:
    """The folder of what counts of a stage: itself, or what it was before."""
    before = _before(folder)
    of_worth = any((before / name).is_file() for name in _MARKS)
    replaced = (folder / "done.json").is_file() or _has_begun(folder)
    return before if of_worth and not replaced else folder


def _set_aside(folder: Path) -> None:
    """Begin a stage anew."""
    folder.resolve().rename(_before(folder))
    _make(folder)


@contextlib.contextmanager
def _settled(stage: str, folder: Path, force: bool) -> Iterator[None]:
    """Settle a stage before the block and however it ends.

    Says so where the stage is what it was before; an error that ends the block carries it as a
    note (``__notes__``), which tells that there is nothing to go on from.
    """
    back = f"{stage} is what it was before --force; to start it anew, give --force again"
    if _settle(folder) and not force:  # an earlier start was killed
        console.warn(back)
    try:
        yield
    except BaseException as error:
        if _settle(folder):
            console.warn(back)
            error.add_note(back)
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
    if _standing(folder) != before:
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


def _make(folder: Path) -> None:
    folder.resolve().mkdir(parents=True, exist_ok=True)
