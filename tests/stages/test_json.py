"""What scripts get to read: one JSON object a line, whatever the command does and how it ends."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfkt_cli.cli import app, config_app, main
from sfkt_cli.console import event, outlets, stage_log, warn
from sfkt_cli.settings.runs import Run
from tests.stages.conftest import SETTINGS

TINY = {
    **SETTINGS,
    "training": {"min_steps": 2},
    "source": {"epochs": 1, "width": 4, "bottleneck": 8},
    "bridge": {"epochs": 2, "width": 4},
    "transfer": {"epochs": 1},
    "evaluate": {"oracle": False, "pictures": False},
}
COMMANDS: tuple[tuple[str, set[str]], ...] = (
    ("prepare synthetic", {"skipped"}),
    ("source --force", {"started", "epoch", "finished"}),
    ("bridge --force", {"started", "epoch", "finished"}),
    ("transfer --force", {"started", "epoch", "finished"}),
    ("transfer --method sock", {"error"}),
    ("evaluate", {"started", "finished"}),
    ("run", {"skipped"}),
    ("benchmark absent.yaml", {"error"}),
    ("export --format safetensors", set()),
    ("predict depth.png", {"prediction"}),
    ("predict depth.png --output -", {"prediction"}),
    ("predict absent.png", {"error"}),
    ("inspect", set()),
    ("classes synthetic", set()),
    ("config show", set()),
    ("config check tiny.yaml", set()),
    ("config check absent.yaml", {"error"}),
    ("config init", set()),
    ("config schema", set()),
    ("doctor", set()),
    ("bridge --nosuch", {"error"}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, untrained_run: Run) -> Path:
    """A copy of the run, the settings for it, and an image."""
    folder = tmp_path_factory.mktemp("json")
    shutil.copytree(untrained_run.folder, folder / "runs/synthetic")
    (folder / "runs/current").write_text("runs/synthetic\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    from PIL import Image

    from sfkt_cli.data.store import open_store

    depth_mm = open_store(untrained_run.transfer_store)["target/target"][0]
    Image.fromarray(depth_mm).save(folder / "depth.png")
    return folder


def called(*arguments: str) -> int:
    """Run the program in this process and return its exit code."""
    before, sys.argv = sys.argv, ["sfkt", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.mark.parametrize(("command", "kinds"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_line_parses_and_the_last_tells_the_end(
    command: str, kinds: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    words = command.split()
    if words[0] in ("prepare", "source", "bridge", "transfer", "evaluate", "run"):
        words += ["--config", "tiny.yaml"]
    code = called(*words, "--json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {each["event"] for each in events}
    assert kinds <= found
    last = events[-1]
    assert last["event"] == ("error" if code else "result")
    if code:
        assert last["exit_code"] == code
        assert last["message"]
    for each in events:
        if each["event"] == "epoch":
            assert {"epoch", "epochs", "terms", "scores", "images_per_second"} <= set(each)
        if each["event"] == "finished":
            assert {"config.yaml", "log.txt"} <= set(each["files"])


def test_every_command_is_tried() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {f"config {command.name}" for command in config_app.registered_commands}
    tried = {command for command, _ in COMMANDS}
    assert not [n for n in names if not any(f"{each} ".startswith(f"{n} ") for each in tried)]


def test_a_log_holds_what_was_said_and_how_it_ended(tmp_path: Path) -> None:
    def fail() -> None:
        with stage_log("bridge", tmp_path / "log.txt"):
            warn("a line\nand another")
            raise ValueError("a bug")

    for _ in range(2):
        with pytest.raises(ValueError, match="a bug"):
            fail()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    stamped = [line for line in lines if line[:1].isdigit()]
    assert sum("warning: a line" in line for line in stamped) == 2
    assert sum("ended: Traceback" in line for line in stamped) == 2
    assert all(line.startswith(" " * 22) for line in lines if line not in stamped)


def test_events_name_their_stage_and_hold_plain_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outlets.json = True
    with stage_log("bridge", tmp_path / "log.txt"):
        event("epoch", score=float("nan"), folder=tmp_path, counts=(1, 2))
    (line,) = capsys.readouterr().out.splitlines()
    expected: dict[str, Any] = {"event": "epoch", "stage": "bridge", "score": None}
    assert json.loads(line) == {**expected, "folder": str(tmp_path), "counts": [1, 2]}
