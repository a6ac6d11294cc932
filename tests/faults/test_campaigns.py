"""Killed at a random moment, or out of room: the same command completes with the same results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOM = ["unshare", "--map-root-user", "--mount"]
"""A process that may mount file systems that nobody else sees."""


def in_its_own_process(
    program: str, folder: Path, *arguments: str, before: Sequence[str] = ()
) -> Any:
    """What a program of this folder found; ``before`` is put in front of the command."""
    path = Path(__file__).with_name(program)
    done = subprocess.run(
        [*before, sys.executable, str(path), str(folder), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def kept_folder(usual: Path, name: str) -> Path:
    """Where a campaign keeps its trials, to go on after an interruption: below $SFKT_TRIALS."""
    kept = os.environ.get("SFKT_TRIALS")
    folder = Path(kept, name) if kept else usual
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def campaign(folder: Path, kind: str, trials: int, last: str) -> dict[str, Any]:
    before = ROOM if kind == "full" else ()
    found: dict[str, Any] = in_its_own_process(
        "campaign.py", folder, kind, str(trials), "0", last, before=before
    )
    counted = " ".join(f"{found[name]} {name}," for name in ("hit", "begun", "resumed"))
    print(f"{kind}: {found['identical']} of {trials} identical; {counted} ", end="")
    print(f"{found['repeated_steps']} steps repeated at most; seconds of a stage: ", end="")
    print(", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["seconds"].items()))
    return found


def check(found: dict[str, Any]) -> None:
    assert not found["wrong"], json.dumps(found["wrong"], indent=1)
    assert found["identical"] == found["trials"]
    assert found["hit"] == found["trials"]


def test_killed_stages_are_completed(tmp_path: Path) -> None:
    check(campaign(tmp_path, "kill", 2, "source"))


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    check(campaign(tmp_path, "kill", 100, "evaluate"))


def test_too_large_a_file_is_told_and_mended(tmp_path: Path) -> None:
    found = campaign(tmp_path, "large", 2, "source")
    check(found)
    assert all("arge" in message for message in found["messages"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["large", "full"])
def test_no_room_twenty_times(kind: str, tmp_path: Path) -> None:
    if kind == "full" and (
        not shutil.which("unshare") or subprocess.run([*ROOM, "true"]).returncode
    ):
        pytest.skip("may not mount a file system")
    found = campaign(tmp_path, kind, 20, "evaluate")
    check(found)
    assert len(found["messages"]) == found["hit"]
    told = {"large": ("arge",), "full": ("full", "space")}[kind]
    assert all(any(word in message for word in told) for message in found["messages"])
