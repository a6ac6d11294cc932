"""The run folder: what is done stays, what changed is named, and nothing is left half written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sfkt_cli import launch
from sfkt_cli.console import outlets
from sfkt_cli.errors import DataError, Interrupted, RunError, explain
from sfkt_cli.files import locking, replacing, sync_folder, write_json, write_record
from sfkt_cli.settings.config import Config, build, parse_assignments
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import find_run, remember_run
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage, deciding_settings
from sfkt_cli.stages.doctor import doctor
from sfkt_cli.student import find_student
from sfkt_cli.training.checkpoint import save_state

INPUTS = {"transfer.h5": "abc"}
RESULT = "results.json"
FILES = ("config.yaml", "done.json", "log.txt")


def settings(*assignments: str) -> Config:
    return build(parse_assignments(assignments))


def work(run: Run, stage: str, config: Config, **inputs: str) -> bool:
    """Do a stage whose result is one file; whether there was anything to do."""
    with run.open(stage, config, inputs or INPUTS) as opened:
        if opened is None:
            return False
        (opened.folder / RESULT).write_text(str(config.seed))
        opened.finish(accuracy=0.5)
    return True


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert work(run, "bridge", settings())
    assert run.finished("bridge")
    before = snapshot(run.folder)
    assert set(before) == {f"bridge/{name}" for name in (*FILES, RESULT)}
    assert not work(run, "bridge", settings())
    assert snapshot(run.folder) == before
    record = run.record("bridge")
    assert record["inputs"] == INPUTS
    assert record["accuracy"] == 0.5
    assert record["settings"]["bridge.alpha_f"] == Config().bridge.alpha_f
    assert {"sfkt", "python", "torch", "numpy"} <= set(record["versions"])


def test_settings_that_do_not_matter_may_change(tmp_path: Path) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings())
    assert not work(run, "bridge", settings("runtime.gpus=0", "tgkt.beta_f=9", "source.epochs=3"))


def test_a_setting_that_a_run_did_not_know_counts_as_what_the_run_did(tmp_path: Path) -> None:
    run, before = Run(tmp_path), "bridge.alpha_p=0"
    work(run, "bridge", settings(before))
    done = run.path("bridge", "done.json")
    record = run.record("bridge")
    for name in ("bridge.alpha_p", "bridge.rec_loss"):
        del record["settings"][name]
    write_record(done, record)
    assert not work(run, "bridge", settings(before))
    with pytest.raises(RunError, match=r"bridge\.alpha_p: was 0\.0, now 0\.3"):
        work(run, "bridge", settings())
    with pytest.raises(RunError, match=r"bridge\.rec_loss: was 'mse', now 'l1'"):
        work(run, "bridge", settings(before, "bridge.rec_loss=l1"))
    # Also one of a section that is used only by some.
    for stage, chosen, name in (
        ("prepare", "dataset=folders", "folders.missing"),
        ("bridge", "bridge.translator=vqgan", "vqgan.alpha_patch"),
    ):
        run = Run(tmp_path / name)
        work(run, stage, settings(chosen))
        record = run.record(stage)
        del record["settings"][name]
        write_record(run.path(stage, "done.json"), record)
        assert not work(run, stage, settings(chosen))


def test_a_setting_that_this_version_no_longer_has_is_no_change(tmp_path: Path) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings())
    record = run.record("bridge")
    record["settings"]["bridge.gone"] = 1
    write_record(run.path("bridge", "done.json"), record)
    assert not work(run, "bridge", settings())


@pytest.mark.parametrize("finished", [True, False])
def test_changed_settings_and_inputs_are_refused_and_named(tmp_path: Path, finished: bool) -> None:
    run = Run(tmp_path)
    if finished:
        work(run, "transfer/tgkt", settings())
    else:
        begin(run, "transfer/tgkt")
    before = snapshot(tmp_path)
    changed = settings("tgkt.beta_f=9", "transfer.epochs=99")
    with pytest.raises(RunError) as caught:
        work(run, "transfer/tgkt", changed, **{"transfer.h5": "a digest"})
    message = str(caught.value)
    for told in ("tgkt.beta_f: was 3.0, now 9.0", "transfer.epochs", "transfer.h5: has changed"):
        assert told in message
    assert "beta_self" not in message
    assert "a digest" not in message
    command = f"`sfkt transfer --method tgkt --run {tmp_path} --force --set tgkt.beta_f=9.0 "
    assert f"{command}--set transfer.epochs=99`" in message
    assert ("finished" in message) == finished
    assert snapshot(tmp_path) == before


def test_a_stage_that_failed_before_it_wrote_anything_may_be_corrected(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(ValueError, match="no such class"), run.open("bridge", settings(), INPUTS):
        raise ValueError("no such class")
    assert [path.name for path in run.path("bridge").iterdir()] == ["log.txt"]
    assert run.remembered("bridge") == {}
    assert work(run, "bridge", settings("seed=1"))


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, force: bool, dry: bool) -> None:
    run = Run(tmp_path, force=force, dry=dry)
    for name in ("config.yaml", "thesis.txt", "checkpoint/best.pth", "metrics.jsonl"):
        run.path("bridge", name).parent.mkdir(exist_ok=True, parents=True)
        run.path("bridge", name).write_text("mine: 1")
        before = snapshot(tmp_path)
        if name == "config.yaml":
            with pytest.raises(RunError, match="bridge is not the folder of a stage"):
                run.remembered("bridge")
        with pytest.raises(RunError, match=f"bridge is not the folder of a stage.*{name[:9]}"):
            work(run, "bridge", settings())
        assert snapshot(tmp_path) == before
        shutil.rmtree(run.path("bridge"))


def test_a_stage_whose_done_json_was_deleted_is_done_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings("seed=3"))
    run.path("bridge", "done.json").unlink()
    assert build(run.remembered("bridge")).seed == 3
    assert work(run, "bridge", settings("seed=3"))


def test_the_command_for_other_settings_can_be_pasted(tmp_path: Path) -> None:
    run = Run(tmp_path / "NAMES")
    work(run, "prepare", settings("dataset=folders"))
    changed = settings("dataset=folders", "prepare.fit=squash", "classes.tr=['a #1', no]")
    with pytest.raises(RunError) as caught:
        work(run, "prepare", changed)
    command = str(caught.value).split("`")[1]
    words = shlex.split(command)
    assert words[:5] == ["sfkt", "prepare", "folders", "--run", str(run.folder)]
    assert words[5:7] == ["--force", "--set"]
    values = {"classes.tr": ["a #1", "no"], "prepare.fit": "squash"}
    assert parse_assignments(words[6 + 1 :: 2]) == values


def test_a_translator_has_its_own_settings() -> None:
    plain = deciding_settings("bridge", settings())
    quantised = deciding_settings("bridge", settings("bridge.translator=vqgan"))
    assert set(quantised) - set(plain) == {
        f"vqgan.{name}" for name in type(Config().vqgan).model_fields
    }


def begin(run: Run, stage: str) -> None:
    """Be interrupted in a stage, after a checkpoint."""
    with contextlib.suppress(KeyboardInterrupt), run.open(stage, settings(), INPUTS) as opened:
        assert opened is not None
        opened.checkpoint.mkdir()
        (opened.checkpoint / "state.pt").write_text("state")
        raise KeyboardInterrupt


def test_the_source_model_does_not_depend_on_how_pairs_are_used() -> None:
    usual, few = settings(), settings("training.ti_fraction=0.1", "training.shuffle_pairs=true")
    assert deciding_settings("source", few) == deciding_settings("source", usual)
    assert deciding_settings("bridge", few) != deciding_settings("bridge", usual)
    unmoved = settings("training.shift=0")
    assert deciding_settings("source", unmoved) != deciding_settings("source", usual)


def test_force_starts_anew(tmp_path: Path) -> None:
    work(Run(tmp_path), "bridge", settings())
    (tmp_path / "bridge" / "images").mkdir()
    (tmp_path / "bridge" / "images" / "old.png").write_text("old")
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (tmp_path / "bridge" / "link").symlink_to(kept)
    forced = Run(tmp_path, force=True)
    assert work(forced, "bridge", settings("seed=7"))
    assert set(snapshot(tmp_path / "bridge")) == {*FILES, RESULT}
    assert (kept / "file").read_text() == "kept"
    assert (tmp_path / "bridge" / RESULT).read_text() == "7"
    assert work(forced, "bridge", settings("seed=7"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("unfinished", [False, True])
def test_a_forced_start_that_cannot_begin_loses_nothing(
    tmp_path: Path, error: type[BaseException], linked: bool, unfinished: bool
) -> None:
    run = Run(tmp_path / "run")
    if linked:
        (tmp_path / "large disk" / "bridge").mkdir(parents=True)
        run.folder.mkdir()
        run.path("bridge").symlink_to(tmp_path / "large disk" / "bridge")
    begin(run, "bridge") if unfinished else work(run, "bridge", settings("seed=1"))
    run.path("bridge", "images").mkdir()
    run.path("bridge", "images", "a.png").write_text("a picture")
    before, remembered = snapshot(tmp_path), run.remembered("bridge")
    forced = Run(run.folder, force=True)
    with contextlib.suppress(error), forced.open("bridge", settings("seed=2"), INPUTS):
        assert run.remembered("bridge") == remembered, "nobody can tell yet what comes of it"
        raise error
    assert snapshot(tmp_path) == before
    assert run.finished("bridge") != unfinished
    assert run.remembered("bridge") == remembered
    assert run.path("bridge").is_symlink() == linked
    assert work(Run(run.folder, force=True), "bridge", settings("seed=2"))
    assert set(snapshot(run.path("bridge"))) == {*FILES, RESULT}
    assert not list(tmp_path.rglob("*.before"))


@pytest.mark.parametrize("left", ["batch_size.json", "tensorboard", "oracle"])
def test_what_comes_before_the_first_step_is_no_work(
    tmp_path: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work(Run(tmp_path), "bridge", settings())
    before = snapshot(tmp_path)

    def fail() -> None:
        with Run(tmp_path, force=True).open("bridge", settings("seed=2"), INPUTS) as stage:
            assert stage is not None
            (stage.folder / left).mkdir()
            raise RuntimeError("the memory is full")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert snapshot(tmp_path) == before
    command = f"`sfkt bridge --run {tmp_path} --force --set seed=2`"
    assert command in " ".join(capsys.readouterr().err.split())
    assert caught.value.__notes__, "there is nothing to go on from"


@pytest.mark.parametrize("saved", ["checkpoint/state.pt", "oracle/checkpoint/state.pt"])
def test_a_saved_state_is_work(tmp_path: Path, saved: str) -> None:
    work(Run(tmp_path), "evaluate", settings())

    def stop() -> None:
        with Run(tmp_path, force=True).open("evaluate", settings("seed=2"), INPUTS) as stage:
            assert stage is not None
            (stage.folder / saved).parent.mkdir(parents=True)
            (stage.folder / saved).write_bytes(b"state")
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        stop()
    assert Run(tmp_path).path("evaluate", saved).is_file()


@pytest.mark.parametrize("again", ["", "begun", "finished", "aside"])
def test_of_several_processes_a_first_start_has_nothing_to_come_back(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a note, the message says to leave --force out: what was done before it stays."""

    def stop(job: object, count: int) -> None:
        if again == "aside":  # as a killed process leaves it
            (tmp_path / "bridge").rename(tmp_path / ".bridge.before")
        raise Interrupted("the same command continues")

    monkeypatch.setattr(launch, "_start", stop)
    if again:
        work(Run(tmp_path), "bridge", settings())
    if again == "begun":
        (tmp_path / "bridge/done.json").rename(tmp_path / "bridge/begun.json")
    config = build({"runtime": {"gpus": 0, "processes": 2}})
    with pytest.raises(Interrupted) as caught:
        launch.launch("bridge", config, Run(tmp_path, force=True))
    assert bool(getattr(caught.value, "__notes__", ())) == bool(again)


def test_a_forced_start_that_ends_before_it_has_begun_loses_nothing(tmp_path: Path) -> None:
    def lose(finished: bool) -> bool:
        raise KeyboardInterrupt

    work(Run(tmp_path), "bridge", settings())
    before = snapshot(tmp_path)
    forced = Run(tmp_path, force=True, agree=lose)
    with pytest.raises(KeyboardInterrupt), forced.open("bridge", settings("seed=2"), INPUTS):
        pass
    assert snapshot(tmp_path) == before


def test_readers_are_told_of_a_stage_that_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, stage = Run(tmp_path), "transfer/tgkt"
    for name in (stage, "transfer/shot"):
        work(run, name, settings())
    with Run(tmp_path, force=True).open(stage, settings("seed=2"), INPUTS):
        told = r"transfer/tgkt is set aside by a start with --force: .* run `sfkt transfer --method"
        for read in (run.has, run.require):
            with pytest.raises(RunError, match=told):
                read(stage)
        assert run.methods() == ["shot", "tgkt"]
        with pytest.raises(RunError, match=told):
            find_student(tmp_path)
        with replace(run, dry=True).open(stage, settings(), INPUTS) as tried:
            assert tried is None
        assert doctor(tmp_path)["intact"] == [str(run.path("transfer/shot/done.json"))]
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    killed = Run(tmp_path.with_name("killed"))
    capsys.readouterr()
    assert not work(killed, stage, settings()), "it is what it was"
    assert f"--run {killed.folder} --force`" in " ".join(capsys.readouterr().err.split())
    assert killed.has(stage)


def test_a_finished_stage_can_be_used_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work(Run(tmp_path), "bridge", settings())
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    verdicts: list[bool] = []

    def agree(finished: bool) -> bool:
        verdicts.append(finished)
        return finished

    outlets.json = True
    with Run(tmp_path, agree=agree).open("bridge", settings(), INPUTS) as opened:
        assert opened is None
    outlets.json = False
    assert verdicts == [True], "the other processes wait for it"
    assert json.loads(capsys.readouterr().out)["event"] == "skipped"
    assert snapshot(tmp_path) == before
    with pytest.raises(RunError, match=f"{tmp_path} cannot be written to: give a copy"):
        work(Run(tmp_path), "bridge", settings("seed=2"))


def test_only_work_is_an_unfinished_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.open("bridge", settings(), INPUTS):
        assert not run.has_begun("bridge")
        run.path("bridge", "metrics.jsonl").write_text("{}\n")  # one that diverges after an epoch
        run.path("bridge", "checkpoint").mkdir()  # or for whose state the disk is too full
        assert not run.has_begun("bridge")
    begin(run, "transfer/tgkt")
    assert run.has_begun("transfer/tgkt")


def test_an_interrupted_stage_goes_on_with_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    begin(run, "bridge")
    assert not run.finished("bridge")
    with run.open("bridge", settings(), INPUTS) as opened:
        assert opened is not None
        assert (opened.checkpoint / "state.pt").read_text() == "state"
        opened.finish()
    assert run.finished("bridge")
    assert set(snapshot(tmp_path)) == {f"bridge/{name}" for name in FILES}
    assert not (tmp_path / "bridge" / "checkpoint").exists()


def test_what_a_kill_right_after_the_end_leaves_is_swept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    begin(run, "bridge")
    left = snapshot(tmp_path)
    with run.open("bridge", settings(), INPUTS) as opened:
        assert opened is not None
        opened.finish()
    whole = snapshot(tmp_path)
    for name, (content, _) in left.items():
        if name not in whole:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert (tmp_path / "bridge" / "checkpoint").exists()
    assert not work(run, "bridge", settings())
    assert snapshot(tmp_path) == whole
    assert not (tmp_path / "bridge" / "checkpoint").exists()


HOLD = """
import sys
from collections.abc import Callable
from pathlib import Path
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
with Run(Path(sys.argv[1])).open("bridge", Config(), {"transfer.h5": "abc"}):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(RunError, match="another sfkt process"):
            work(Run(tmp_path), "bridge", settings())
        assert work(Run(tmp_path), "transfer/tgkt", settings())
        other.communicate("")
    assert other.returncode == 0
    assert work(Run(tmp_path), "bridge", settings())


def test_stray_partial_files_are_swept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    begin(run, "bridge")
    strays = [
        tmp_path / "bridge" / ".model.json.123.partial",
        tmp_path / "bridge" / "images" / ".a.png.9.partial",
    ]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("half")
    (tmp_path / "bridge" / "images" / "a.png").write_text("whole")
    assert work(run, "bridge", settings())
    assert not any(stray.exists() for stray in strays)
    assert (tmp_path / "bridge" / "images" / "a.png").read_text() == "whole"


def test_a_missing_stage_says_which_command_makes_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match=f"first run `sfkt bridge --run {tmp_path}`"):
        run.require("bridge")
    with pytest.raises(RunError, match=f"sfkt prepare NAME --run {tmp_path}`"):
        run.require("prepare")
    with pytest.raises(RunError, match=f"sfkt transfer --method shot --run {tmp_path}`"):
        run.require("transfer/shot")
    with pytest.raises(RunError, match=f"sfkt evaluate --run {tmp_path}`"):
        run.require("evaluate/oracle")
    work(run, "bridge", settings())
    assert run.require("bridge") == tmp_path / "bridge"


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_records_are_named(tmp_path: Path, content: str) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings())
    (tmp_path / "bridge" / "done.json").write_text(content)
    with pytest.raises(DataError) as caught:
        work(run, "bridge", settings())
    assert "done.json" in str(caught.value)
    assert "--force" in str(caught.value)
    assert work(Run(tmp_path, force=True), "bridge", settings())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.yaml", lambda run: run.remembered("bridge")),
        ("done.json", lambda run: run.open("bridge", settings(), INPUTS, renew=True).__enter__()),
    ],
)
def test_a_record_that_the_disk_refuses_is_not_called_damaged(
    tmp_path: Path, name: str, read: Callable[[Run], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings())
    before = snapshot(tmp_path)

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        read(run)
    assert explain(caught.value)[0] == f"{run.path('bridge', name)}: {os.strerror(errno.EIO)}"
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert not work(run, "bridge", settings())


@pytest.mark.parametrize("content", [None, "7"])
def test_a_stage_that_lacks_an_output_is_done_anew(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = Run(tmp_path), tmp_path / "bridge" / RESULT
    work(run, "bridge", settings("seed=12"))
    result.unlink() if content is None else result.write_text(content)
    assert not run.finished("bridge")
    with pytest.raises(RunError, match=r"bridge/results.json .*: first run `sfkt bridge --run"):
        run.has("bridge")
    assert work(run, "bridge", settings("seed=34"))
    assert "bridge is done again" in capsys.readouterr().err
    assert run.finished("bridge")
    assert result.read_text() == "34"


def test_a_file_of_the_user_is_no_output(tmp_path: Path) -> None:
    run = Run(tmp_path)
    begin(run, "bridge")
    notes = run.path("bridge", "notes.md")
    notes.write_text("mine")
    work(run, "bridge", settings())
    record = run.record("bridge")
    assert set(record["outputs"]) == {"config.yaml", RESULT}
    record["outputs"][notes.name] = record["outputs"][RESULT]  # as an earlier version did
    write_record(run.path("bridge", "done.json"), record)
    notes.write_text("changed")
    assert not work(run, "bridge", settings())
    assert notes.read_text() == "changed"


def test_an_output_that_was_changed_is_named_by_its_reader(tmp_path: Path) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings("seed=12"))
    assert run.output("bridge", RESULT).read_text() == "12"
    run.path("bridge", RESULT).write_text("21")
    with pytest.raises(DataError, match=r"bridge/results.json is not what its stage wrote"):
        run.output("bridge", RESULT)


def test_settings_that_were_changed_are_refused_but_for_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    work(run, "bridge", settings("seed=12"))
    path = run.path("bridge", "config.yaml")
    path.write_text(path.read_text().replace("seed: 12", "seed: 13"))
    for stage in ("bridge", "transfer/tgkt"):
        with pytest.raises(DataError, match=r"bridge/config.yaml is damaged or was edited"):
            run.remembered(stage)
    assert Run(tmp_path, force=True).remembered("bridge") == {}
    assert "starts from scratch without these settings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["forced", "renewed", "finished"])
def test_killed_at_any_change_of_a_file_a_stage_starts_as_if_it_had_not_been(
    tmp_path: Path, kind: str
) -> None:
    for calls in itertools.count():
        run = Run(tmp_path / str(calls), force=kind == "forced")
        begin(run, "bridge") if kind == "finished" else work(run, "bridge", settings("seed=1"))
        run.path("bridge", "checkpoint").mkdir(exist_ok=True)
        died = killed(calls, lambda run=run: _work_on(run, kind))  # type: ignore[misc]
        if kind == "forced":
            _is_what_it_was_or_goes_on(Run(run.folder))
        _work_on(run, kind)
        assert set(snapshot(run.folder)) == {f"bridge/{name}" for name in (*FILES, RESULT)}
        assert not run.path("bridge", "checkpoint").exists()
        assert [path.name for path in run.folder.iterdir() if path.suffix != ".lock"] == ["bridge"]
        assert run.finished("bridge")
        assert run.path("bridge", RESULT).read_text() == "2"
        if not died:
            break
    assert calls > 10


def test_killed_at_any_moment_of_a_start_that_fails_nothing_is_lost(tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        with Run(run.folder, force=True).open("bridge", settings("seed=2"), INPUTS):
            raise ValueError("no such network")

    for calls in itertools.count():
        run = Run(tmp_path / str(calls))
        work(run, "bridge", settings("seed=1"))
        before = snapshot(run.folder)
        died = killed(calls, lambda run=run: fail(run))  # type: ignore[misc]
        assert build(run.remembered("bridge")).seed == 1
        assert not work(run, "bridge", settings("seed=1"))
        assert snapshot(run.folder) == before
        if not died:
            break
    assert calls > 10


def _is_what_it_was_or_goes_on(run: Run) -> None:
    """The stage that was started anew and killed: the finished one counts, or the new work does."""
    seed = build(run.remembered("bridge")).seed
    if seed == 1:
        assert not work(run, "bridge", settings("seed=1")), "it is finished as it was"
        assert run.path("bridge", RESULT).read_text() == "1"
    else:
        _work_on(run, "forced")
    assert run.finished("bridge")
    assert build(run.remembered("bridge")).seed == seed


def _work_on(run: Run, kind: str) -> None:
    config = settings() if kind == "finished" else settings("seed=2")
    with run.open("bridge", config, INPUTS, renew=kind == "renewed") as stage:
        if stage is not None:
            (stage.folder / RESULT).write_text("2")
            stage.finish()


def killed(count: int, do: Callable[[], object]) -> bool:
    """Do something in a process that dies before the call number ``count`` that changes a file.

    Returns:
        Whether it died; False: there are fewer such calls.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = [count]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        changes = event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if changes or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]):
            if not left[0]:
                os._exit(9)
            left[0] -= 1

    sys.addaudithook(note)
    with contextlib.suppress(BaseException):
        do()
    os._exit(0)


def test_a_run_remembers_the_settings_it_used(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.remembered("bridge") == {}
    clipped = ("seed=3", "training.clip_norm=5")
    work(run, "prepare", settings(*clipped, "image_size=32", "dataset=folders"))
    work(run, "source", settings("seed=3", "source.epochs=4", "bridge.epochs=77"))
    vqgan = ("bridge.translator=vqgan", "vqgan.codes=64")
    work(run, "bridge", settings("seed=3", "bridge.epochs=5", "training.shift=0.2", *vqgan))
    work(run, "transfer/tgkt", settings("seed=3", "tgkt.beta_f=8", "transfer.epochs=6"))
    work(run, "transfer/shot", settings("seed=3", "transfer.epochs=9", "transfer.method=shot"))
    found = build(run.remembered("transfer/tgkt"))
    assert found.seed == 3
    assert found.dataset == "folders"
    assert found.image_size == 32
    assert found.source.epochs == 4
    assert found.bridge.epochs == 5
    assert found.transfer.epochs == 6
    assert found.tgkt.beta_f == 8
    assert build(run.remembered("transfer/shot")).transfer.epochs == 9
    assert build(run.remembered("source")).source.epochs == 4
    assert found.training.clip_norm is None, "the last one set it to null"
    assert found.vqgan.codes == 64
    for stage in ("prepare", "source", "bridge", "transfer/tgkt", "transfer/shot"):
        again = build(run.remembered(stage))
        assert deciding_settings(stage, again) == run.record(stage)["settings"], stage


def test_settings_of_a_start_that_failed_are_forgotten_by_force_and_later_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    config = settings("bridge.epochs=5", "training.shift=0.2")
    with contextlib.suppress(ValueError), run.open("bridge", config, INPUTS):
        run.path("bridge", "checkpoint").mkdir()
        run.path("bridge", "checkpoint", "state.pt").write_text("state")
        raise ValueError("the loss is nan")
    assert build(run.remembered("bridge")).bridge.epochs == 5, "the same command continues"
    assert run.remembered("transfer/shot") == {}
    assert Run(tmp_path, force=True).remembered("bridge") == {}
    assert (
        "starts from scratch and forgets the settings of its unfinished start"
        in capsys.readouterr().err
    )


def test_every_setting_of_a_stage_exists() -> None:
    for stage in ("prepare", "source", "bridge", "transfer/tgkt", "transfer/socket", "evaluate"):
        names = deciding_settings(stage, Config())
        assert names
        build(parse_assignments(f"{name}={json.dumps(value)}" for name, value in names.items()))
    assert "tgkt.beta_f" in deciding_settings("transfer/tgkt", Config())
    assert "tgkt.beta_f" not in deciding_settings("transfer/shot", Config())
    assert "synthetic.pairs" in deciding_settings("prepare", Config())


def test_the_run_used_last_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    usual = Options()
    with pytest.raises(RunError, match="sfkt prepare"):
        find_run(usual, None, new_run=False)
    first = find_run(usual, "rgb-nir", new_run=True)
    assert first.folder == Path("runs/rgb-nir")
    remember_run(first)
    assert find_run(usual, None, new_run=False).folder == Path("runs/rgb-nir")
    assert find_run(usual, None, new_run=True).folder == Path("runs/synthetic")
    remember_run(Run(Path("runs/my run ")))
    assert find_run(usual, None, new_run=False).folder == Path("runs/my run ")
    other = Options(run=tmp_path / "other", force=True)
    assert find_run(other, "rgb-nir", new_run=False) == Run(tmp_path / "other", True)
    assert find_run(usual, "synthetic", new_run=False) == Run(Path("runs/synthetic"))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    write_json(path, {"a": 1})
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_that_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "model.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there" / "model.json").read_text()) == {"a": 1}


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """So does a device: root must not lose /dev/null to `--output /dev/null`."""
    os.mkfifo(pipe := tmp_path / "report.json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, 1)
    assert os.read(reader, 9) == b"1\n"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_stage_ends_with_done_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there when done.json appears, appears before it."""
    seen: list[Any] = []
    finish = Stage.finish

    def watched(self: Stage, **summary: Any) -> None:
        seen.append(sorted(path.name for path in self.folder.iterdir()))
        finish(self, **summary)

    monkeypatch.setattr(Stage, "finish", watched)
    work(Run(tmp_path), "bridge", settings())
    assert seen == [["begun.json", "config.yaml", "log.txt", RESULT]]


@pytest.mark.parametrize(
    "write",
    [
        lambda stage: write_json(stage.folder / "metrics.jsonl", {}),
        lambda stage: save_state(stage.checkpoint, {}),
        lambda stage: stage.finish(),
    ],
)
def test_a_run_that_is_moved_while_a_stage_works_does_not_come_back(
    tmp_path: Path, write: Callable[[Stage], None]
) -> None:
    run = Run(tmp_path / "run")
    moved = pytest.raises(RunError, match=r"run/bridge was moved or deleted while the stage worked")
    with moved, run.open("bridge", settings(), INPUTS) as stage:
        assert stage is not None
        run.folder.rename(tmp_path / "elsewhere")
        write(stage)
    assert not run.folder.exists()
    assert "was moved or deleted" in (tmp_path / "elsewhere" / "bridge" / "log.txt").read_text()
    assert work(Run(tmp_path / "elsewhere"), "bridge", settings())


@pytest.mark.parametrize(
    ("number", "raised"), [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)]
)
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, raised: bool
) -> None:
    """Some network file systems sync no folders; a failing disk is another thing."""

    def fail(descriptor: int) -> None:
        raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no") if raised else contextlib.nullcontext():
        sync_folder(tmp_path)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(RunError, match=r"run/\.bridge\.lock cannot be locked .*local disk"):
        work(Run(tmp_path / "run"), "bridge", settings())


@pytest.mark.parametrize(("number", "raised"), [("EBADF", False), ("ENOLCK", False), ("EIO", True)])
def test_a_folder_of_a_network_file_system_is_used_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, raised: bool
) -> None:
    """Such file systems may lock files alone; a failing disk is another thing."""

    def fail(*_: int) -> None:
        raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(fcntl, "flock", fail)
    entered = False
    with contextlib.suppress(OSError), locking(tmp_path, "busy"):
        entered = True
    assert entered != raised


def test_a_working_folder_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    remember_run(Run(tmp_path / "run"))
    assert f"give --run {tmp_path / 'run'}" in capsys.readouterr().err
