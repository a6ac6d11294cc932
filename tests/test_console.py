"""What people read on a terminal is broken between words, and elsewhere not at all."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sfkt_cli import console as console_module
from sfkt_cli.console import console, say, track

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


@pytest.mark.parametrize("width", [80, 120])
def test_scores_give_way_to_the_bar_the_losses_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    written = io.StringIO()
    shown = Console(file=written, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(console_module, "console", shown)
    with track("transfer/tgkt", 12345, done=2400) as tracker:
        tracker.note = "ti_agreement 0.500  ti_closeness 0.250"
        tracker.advance(1, 64, "rec 0.100")
        assert tracker._bar is not None
        tracker._bar.refresh()
        line = [line for line in written.getvalue().split("\r") if "transfer/tgkt" in line][-1]
    for part in ("transfer/tgkt", "\u2501", "2401/12345", "0:0", "rec 0.100", "\u2026"):
        assert part in line


def run_program(*arguments: str, stdout: int, stderr: int) -> int:
    """Exit code of the program in a shell where other processes seem to be about."""
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
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
    assert not errors.read_text()


def test_a_full_disk_behind_the_output_is_one_message(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with errors.open("w") as file, Path("/dev/full").open("w") as full:
        assert run_program("config", "show", stdout=full.fileno(), stderr=file.fileno()) == 1
    (line,) = errors.read_text().splitlines()
    assert "disk is full, standard output was not written" in line


@pytest.mark.parametrize("stream", ["full", "gone"])
def test_messages_that_nobody_can_read_stop_no_training(tmp_path: Path, stream: str) -> None:
    errors = gone() if stream == "gone" else os.open("/dev/full", os.O_WRONLY)
    settings = ["image_size=16", "synthetic.pairs=100", "source.epochs=1", "source.width=4",
                "prepare.workers=1"]  # fmt: skip
    options = ["--run", str(tmp_path / "run"), "--verbose"]
    for setting in settings:
        options += ["--set", setting]
    for command in (["prepare", "synthetic"], ["source", "--gpus", "0"]):
        log = tmp_path / "log"
        # Of torchrun and the like nothing is left over here: a training would wait for the others.
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        program = [sys.executable, "-m", "sfkt_cli", *command, *options]
        with log.open("w") as file:
            done = subprocess.run(program, stdout=file, stderr=errors, env=here, check=False)
        assert done.returncode == 0
    os.close(errors)
    assert (tmp_path / "run" / "source" / "done.json").is_file()
