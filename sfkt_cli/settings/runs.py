"""The run folder: its stages, what is finished, and with which settings.

    runs/current          the name of the run used last
    runs/<name>/<stage>   the folder of a stage, see :mod:`sfkt_cli.settings.stage`

``transfer`` has one such folder a method: ``runs/<name>/transfer/<method>``.
"""

import contextlib
import difflib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfkt_cli import console
from sfkt_cli.errors import DataError, RunError
from sfkt_cli.files import (
    locking,
    read_record,
    read_settings,
    sha256_file,
    sweep_partials,
    write_record,
    write_settings,
)
from sfkt_cli.settings.config import Config, merge, section_fields, to_yaml
from sfkt_cli.settings.stage import (
    BEFORE,
    LOG,
    Done,
    Stage,
    command_of,
    deciding_values,
    folder_that_counts,
    has_begun,
    outcome,
    record_of,
    refuse_foreign,
    restoring_on_failure,
    versions,
    why_not_done,
)

RUNS = Path("runs")


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
        """Target labels, which no training opens; ``evaluate`` reads them."""
        return self.path("prepare", "test.h5")

    def finished(self, stage: str) -> bool:
        """Whether a stage such as ``bridge`` or ``transfer/tgkt`` is done, its outputs in place.

        One with a damaged done.json counts; whoever reads that file says so.
        """
        try:
            return not why_not_done(self.path(stage))
        except DataError:
            return True

    def keeps(self, stage: str) -> bool:
        """Whether a stage is finished and not forced; its inputs may be gone by now."""
        return self.finished(stage) and not self.force

    def has(self, stage: str) -> bool:
        """Whether a stage that a command does not need is finished.

        Raises:
            RunError: It was finished, and lacks an output now, or is set aside while it starts
                anew: it must not be left out in silence.
            DataError: Its done.json is damaged.
        """
        if not (folder_that_counts(self.path(stage)) / "done.json").is_file():
            return False
        self.require(stage)
        return True

    def has_begun(self, stage: str) -> bool:
        """Whether a stage left work from which its next start continues."""
        return has_begun(folder_that_counts(self.path(stage)))

    def methods(self) -> list[str]:
        """Names of the transfer methods that are finished, or set aside while they start anew."""
        there = (path.name for path in self.path("transfer").glob("*"))
        names = {name.removeprefix(".").removesuffix(BEFORE) for name in there}
        folders = {name: folder_that_counts(self.path("transfer", name)) for name in sorted(names)}
        return [name for name, folder in folders.items() if (folder / "done.json").is_file()]

    def record(self, stage: str) -> dict[str, Any]:
        """The done.json of a finished stage; raises DataError if it is damaged."""
        return record_of(self.path(stage))

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

    def outcome(self, stage: str, folder: Path | None = None) -> dict[str, Any]:
        """What a finished stage found and wrote, in another folder perhaps, for scripts."""
        folder = folder or self.path(stage)
        return {"run": str(self.folder), "stage": stage, **outcome(folder, record_of(folder))}

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """The rows of a finished stage's metrics.jsonl; none if the file was deleted."""
        path = self.output(stage, "metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def require(self, stage: str) -> Path:
        """The folder of a finished stage.

        Raises:
            RunError: It is not finished; the message names the command that makes it.
            DataError: Its done.json is damaged.
        """
        folder = self.path(stage)
        lacking = why_not_done(folder)
        if lacking:
            command = command_of(stage, self.folder)
            if (aside := folder_that_counts(folder)) != folder and not why_not_done(aside):
                raise RunError(
                    f"{folder} is set aside by a start with --force: wait for that to end or, if "
                    f"it was killed, run `{command}`, which brings it back"
                )
            raise RunError(f"{lacking}: first run `{command}`{self._or_another()}")
        return folder

    def _or_another(self) -> str:
        """A hint at the run that was meant, if this is not a run but may be a part of one."""
        runs = {
            path.parent.name: path.parent
            for folder in (RUNS, self.folder.parent)
            for path in folder.glob("*/prepare")
        }
        near = [str(runs[name]) for name in difflib.get_close_matches(self.folder.name, runs)]
        if self.folder.exists():
            near = [str(run) for run in self.folder.parents if (run / "prepare").is_dir()]
        return f", or did you mean --run {' or '.join(near)}?" if near else ""

    def remembered(self, stage: str) -> dict[str, Any]:
        """Settings this run used before: the stage's own, else those of the stages above it.

        The settings of a stage that did not finish do not count, except for that stage itself,
        which continues with them unless it is started anew. Where it is killed before it has work
        that could be lost, those of what it was before count.

        Raises:
            RunError: A folder with the name of a stage is somebody else's.
            DataError: They are damaged, and the stage is not started anew.
        """
        settings: dict[str, Any] = {}
        for above in ("prepare", "source", "bridge", stage):
            folder, anew = folder_that_counts(self.path(above)), self.force and above == stage
            path, done = folder / "config.yaml", (folder / "done.json").is_file()
            if path.is_file():
                refuse_foreign(folder)
            if anew and path.is_file() and not done:
                console.warn(
                    f"{stage} starts from scratch and forgets the settings of its unfinished start"
                )
            if path.is_file() and (done or (above == stage and not anew)):
                try:
                    used = known_settings(read_settings(path))
                    settings |= used if above == "prepare" else deciding_values(above, used)
                except DataError as error:
                    if not anew:
                        raise
                    console.warn(f"{error}; {stage} starts from scratch without these settings")
            if above == stage:
                break
        return settings

    def open(
        self, stage: str, config: Config, inputs: Mapping[str, str], *, renew: bool = False
    ) -> AbstractContextManager[Stage | None]:
        """Enter a stage's folder under a lock; None where it is finished with these settings.

        An interrupted stage is entered again with what it left (its checkpoint). One that fails
        before there is such work leaves no settings: later commands do not take over the settings
        of a command that could not begin. With ``force`` it starts anew, and what it was before
        comes back where the start fails, or is killed, before there is such work. Of several
        processes the main one looks, locks and writes; the others wait for its verdict.

        ``inputs`` are the digests of its inputs by name. With ``renew`` it starts anew if settings
        or inputs have changed, as cheap and derived stages do.

        Raises:
            RunError: Another process works on the folder, it is somebody else's, or the stage was
                done or begun with other settings or inputs and ``force`` is not set.
            DataError: done.json or begun.json is damaged.
        """
        entered = Stage(stage, self.path(stage), config, inputs)
        if not self.main:
            return contextlib.nullcontext(None if self.agree(False) else entered)
        refuse_foreign(folder_that_counts(entered.folder))
        return self._rehearse(entered) if self.dry else self._enter(entered, renew)

    @contextlib.contextmanager
    def _rehearse(self, stage: Stage) -> Iterator[Stage | None]:
        """A stage in a temporary folder; None where it is finished."""
        there = replace(stage, folder=folder_that_counts(stage.folder))
        if not self.force and there.is_finished():
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="sfkt-") as place:
            yield replace(stage, folder=Path(place), dry=True)

    @contextlib.contextmanager
    def _enter(self, stage: Stage, renew: bool) -> Iterator[Stage | None]:
        """A stage in its folder, locked, begun and logged; None where it is finished."""
        name, folder = stage.name, stage.folder
        folder.resolve().mkdir(parents=True, exist_ok=True)
        # A finished run of somebody else's can be used without writing into it.
        if not self.force and not os.access(self.folder, os.W_OK) and stage.is_finished():
            self._skip(stage)
            yield None
            return
        busy = f"another sfkt process works on {folder}: wait for it to end"
        lock = self.path(f".{name.replace('/', '-')}.lock")
        with locking(lock, busy), restoring_on_failure(stage, self.force):
            sweep_partials(folder)
            begun = folder / "begun.json"
            stale = renew and stage.is_stale()
            if stale:
                shutil.rmtree(stage.checkpoint, ignore_errors=True)
            elif stage.is_finished():
                begun.unlink(missing_ok=True)  # left where the stage was killed just after the end
                shutil.rmtree(stage.checkpoint, ignore_errors=True)
                self._skip(stage)
                yield None
                return
            resumed = has_begun(folder) and not stale
            if not resumed:  # left by a start that was killed before it had work
                (folder / "batch_size.json").unlink(missing_ok=True)
            write_record(begun, stage.made_from)  # first: a stage's folder always has a mark
            (folder / "done.json").unlink(missing_ok=True)  # it is stale, or outputs are missing
            write_settings(folder / "config.yaml", to_yaml(stage.config))
            self.agree(False)
            with console.stage_log(name, folder / LOG), stage.forgetting_failures():
                installed = " ".join(f"{what} {number}" for what, number in versions().items())
                console.log(f"{'continues' if resumed else 'begins'}: {' '.join(sys.argv)}")
                console.log(f"{installed} on {platform.node()}, {platform.platform()}")
                console.event("started", folder=folder, resumed=resumed)
                yield stage

    def _skip(self, stage: Stage) -> None:
        """Tell the other processes, and scripts, that a stage is finished."""
        self.agree(True)
        console.event("skipped", stage=stage.name, folder=stage.folder, reason="done already")


def main_student(methods: Sequence[str], default_method: str) -> str | None:
    """The main student: that of ``default_method``, else of tgkt, else the first.

    ``methods`` are those of the finished students of a run; None without a student.
    """
    return next((name for name in (default_method, "tgkt", *methods) if name in methods), None)


def known_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this version has; an older run may name others."""
    known = section_fields()
    return {name: value for name, value in merge(values).items() if name in known}
