"""Killed at a random moment, or out of room: the same command completes with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def campaign(folder: Path, kind: str, trials: int, last: str) -> dict[str, Any]:
    program = Path(__file__).with_name("campaign.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), kind, str(trials), "0", last],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind}: {found['identical']} of {trials} identical, {found['hit']} hit")
    return found


def check(found: dict[str, Any]) -> None:
    assert not found["wrong"], json.dumps(found["wrong"], indent=1)
    assert found["identical"] == found["trials"]
    assert found["hit"]


def test_killed_stages_are_completed(tmp_path: Path) -> None:
    check(campaign(tmp_path, "kill", 2, "source"))


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    check(campaign(tmp_path, "kill", 100, "evaluate"))


def test_no_room_is_told_and_mended(tmp_path: Path) -> None:
    found = campaign(tmp_path, "full", 2, "source")
    check(found)
    assert all("arge" in message or "full" in message for message in found["messages"])


@pytest.mark.slow
def test_no_room_twenty_times(tmp_path: Path) -> None:
    found = campaign(tmp_path, "full", 20, "evaluate")
    check(found)
    assert len(found["messages"]) == found["hit"]
