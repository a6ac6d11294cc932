"""What people read on a terminal is broken between words, and elsewhere not at all."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from sfkt_cli import console as console_module
from sfkt_cli.console import console, say, stage_log, track
from sfkt_cli.errors import RunError
from sfkt_cli.settings.config import build, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import prepare

LINE = "bridge  1/3  " + "  ".join(f"term_{number} 0.12{number}" for number in range(8))


def test_long_lines_break_between_fields_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 40)
    with console.capture() as caught:
        say(f"short  line\n{LINE}")
    lines = caught.get().splitlines()
    assert lines[0] == "short  line"
    assert max(map(len, lines)) <= 40
    assert [part for line in lines[1:] for part in line.strip().split("  ")] == LINE.split("  ")


def test_a_path_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 20)
    path = "runs/" + "a" * 40
    with console.capture() as caught:
        say(f"see the picture in {path} now")
    assert path in caught.get()


def test_elsewhere_a_message_stays_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    say(LINE * 3)
    assert capfd.readouterr().err == LINE * 3 + "\n"


def test_a_terminal_without_utf_8_gets_a_bar_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1", errors="backslashreplace")
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)
    monkeypatch.setattr(console_module._errors, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", latin)
    with track("bridge", 3) as tracker:
        tracker.advance(1)
    latin.seek(0)
    assert "1/3" in (shown := latin.read())
    assert r"\u" not in shown


@pytest.mark.parametrize("width", [80, 120])
def test_scores_give_way_to_the_bar_the_losses_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    written = io.StringIO()
    shown = Console(file=written, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(console_module, "console", shown)
    monkeypatch.setattr(console_module._errors, "isatty", lambda: True)
    with track("transfer/tgkt", 12345, done=2400) as tracker:
        tracker.note = "ti_agreement 0.500  ti_closeness 0.250"
        for _ in range(3):
            tracker.advance(1, 64, "rec 0.100")
        tracker.bar.refresh()
        line = [line for line in written.getvalue().split("\r") if "transfer/tgkt" in line][-1]
    for part in ("\u2501", "2403/12345", "rec 0.100", "\u2026"):
        assert part in line
    assert re.search(r" \d\d:\d\d ", line), "the time left"


WORLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
"""Left over in the shell: a command that starts no job looks for no other process."""


def run_program(*arguments: str, stdout: int, stderr: int, world: Mapping[str, str] = WORLD) -> int:
    """The exit code of the program."""
    here = {**os.environ, **world, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "sfkt_cli", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=stderr, env=here, check=False, timeout=60
    ).returncode


def gone() -> int:
    """A pipe whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_of_the_output_may_go_away(tmp_path: Path, options: list[str]) -> None:
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        writer = gone()
        arguments = ["config", "show", *options]
        assert run_program(*arguments, stdout=writer, stderr=file.fileno()) == 0
        os.close(writer)
    assert "Traceback" not in errors.read_text()
    assert "sfkt: " not in errors.read_text()


@pytest.mark.parametrize("options", [["--json", "--quiet"], []])
def test_a_full_disk_behind_the_output_is_one_message(tmp_path: Path, options: list[str]) -> None:
    errors = tmp_path / "errors"
    arguments = ["config", "show", *options]
    with errors.open("w") as file, Path("/dev/full").open("w") as full:
        assert run_program(*arguments, stdout=full.fileno(), stderr=file.fileno()) == 1
    (line,) = errors.read_text().splitlines()
    assert "disk is full, standard output was not written" in line


def test_messages_that_nobody_can_read_stop_no_training(tmp_path: Path) -> None:
    sizes = {"image_size": 16, "synthetic": {"pairs": 100}, "source": {"epochs": 1, "width": 4}}
    config = build({**sizes, "prepare": {"workers": 1}, "runtime": {"gpus": 0}})
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    for errors in (gone(), os.open("/dev/full", os.O_WRONLY)):
        run = Run(tmp_path / f"run{errors}")
        prepare(config, run)
        arguments = ["source", "--run", str(run.folder), "--config", str(tmp_path / "tiny.yaml")]
        with (tmp_path / "output").open("w") as file:
            assert run_program(*arguments, stdout=file.fileno(), stderr=errors, world={}) == 0
        assert run.finished("source")
        os.close(errors)


@pytest.mark.parametrize("name", ["mug [red]", "mug [/red]", "[x]:cup:", "a\x1b[31m"])
def test_names_are_shown_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup, no emoji and no control characters, in messages and beside the bar."""
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", None)
    monkeypatch.setattr(console, "is_interactive", True)
    monkeypatch.setattr(console_module._errors, "isatty", lambda: True)
    monkeypatch.setattr(console, "width", 200)
    monkeypatch.setattr(console, "file", io.StringIO())
    say(f"class {name}")
    with track("predict", None) as tracker:
        tracker.advance(1, 1, f"{name} 98%")
        tracker.bar.refresh()
        console_module.warn(name)
    written, shown = console.file.getvalue(), name.replace("\x1b", r"\x1b")  # type: ignore[attr-defined]
    assert f"class {shown}\n" in written
    assert f"{shown} 98%" in written
    assert f"\x1b[2Kwarning: {shown}\n" in written, "the bar is taken away before"


@pytest.mark.parametrize("lacks", ["_errors.isatty", "console.is_interactive"])
def test_where_no_bar_can_be_redrawn_lines_tell(
    lacks: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file with FORCE_COLOR=1 is a terminal to rich; a dumb terminal is none that redraws."""
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", not lacks.endswith("is_interactive"))
    monkeypatch.setattr(console_module._errors, "isatty", lambda: not lacks.endswith("isatty"))
    with track("prepare", 40, line_s=0.0) as tracker:
        tracker.advance(10, 10)
    assert re.fullmatch(r"prepare  10 of 40 images  \d+ s left\n", capfd.readouterr().err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_a_full_disk_of_the_log_does_not_hide_why_a_stage_ended() -> None:
    with pytest.raises(RunError, match="why"), stage_log("x", Path("/dev/full")):
        raise RunError("why")


def test_without_a_terminal_a_line_tells_of_a_long_task(capfd: pytest.CaptureFixture[str]) -> None:
    with track("prepare", 40, line_s=0.0) as tracker:
        tracker.advance(10, 10)
    with track("predict", None, line_s=0.0) as tracker:
        tracker.advance(7, 7)
    with track("a.zip", 40, "bytes", done=20, line_s=0.0) as tracker:
        tracker.advance(10, 10)
    with track("bridge", 40) as tracker:
        tracker.advance(10, 10)
    first, second, third = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"prepare  10 of 40 images  \d+ s left", first)
    assert second == "predict  7 images"
    assert re.fullmatch(r"a\.zip  30 of 40 bytes  \d+ s left", third)


NASTY = "cup\x1b[31m\x07\x9b2J\u202egnp.\udcff"


def test_control_characters_of_names_reach_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with console_module.stage_log("prepare", tmp_path / "log.txt"):
        say(f"class {NASTY}\nof two lines")
        console_module.warn(NASTY)
        console_module.log(NASTY)
    console_module.tell(NASTY)
    console_module.output(NASTY)
    said = capfd.readouterr()
    for text in (said.out, said.err, (tmp_path / "log.txt").read_text()):
        assert r"cup\x1b[31m\x07\x9b2J\u202egnp.\udcff" in text
        assert console_module.printable(text) == text
    assert "\nof two lines" in said.err
