"""One file of a run is damaged, then one command works on it: it refuses, or does the same.

Run as a program in a process of its own: ``damages.py FOLDER TRIALS``. It makes a tiny run and a
tiny benchmark in FOLDER, copies of them before each command and halfway through each training, and
then damages one file of a copy. Each trial is a line of ``trials.jsonl`` there: started again, the
program runs those that are missing or went wrong. The last line it prints is a summary as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfkt_cli.benchmark import report, run
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import STOPPED
from sfkt_cli.files import SEAL
from sfkt_cli.stages import doctor, inspect
from tests.faults.campaign import ended, fingerprint, start, steady
from tests.faults.mutating import mutate

SETTINGS: dict[str, Any] = {
    "image_size": 16,
    "synthetic": {"pairs": 60},
    "prepare": {"workers": 1},
    "training": {"min_steps": 2},
    "source": {"epochs": 2, "width": 4, "bottleneck": 8},
    "bridge": {"epochs": 2, "width": 4},
    "transfer": {"epochs": 2},
    "evaluate": {"oracle": False, "pictures": False},
    "runtime": {"gpus": 0, "batch_size": 8, "checkpoint_seconds": 0.0, "threads": 1},
}
PLAN = {
    "output": "place/run",
    "methods": ["source-only", "bridge-only", "shot", "tgkt"],
    "seeds": [0],
    "settings": {**SETTINGS, "dataset": "synthetic", "evaluate": {}},
}
RUN, ROWS, ERRORS, TRIALS = map(Path, ("place/run", "rows.csv", "errors.txt", "trials.jsonl"))
GIVEN = ["--run", str(RUN), "--config", "tiny.yaml"]
COMMANDS = {
    "prepare": ["prepare", "synthetic", *GIVEN],
    "source": ["source", *GIVEN],
    "bridge": ["bridge", *GIVEN],
    "transfer": ["transfer", *GIVEN],
    "evaluate": ["evaluate", *GIVEN],
    "export": ["export", "--format", "safetensors", *GIVEN],
    "predict": ["predict", "0.npy", "1.npy", "2.npy", "--output", str(ROWS), *GIVEN],
    "inspect": ["inspect", str(RUN / "prepare/test.h5")],
    "doctor": ["doctor", "--verify", str(RUN)],
    "benchmark": ["benchmark", "plan.yaml", "--processes", "0"],
}
HALFWAY = {
    "source": "source/**/previous.pt",
    "bridge": "bridge/**/previous.pt",
    "transfer": "transfer/**/previous.pt",
    "benchmark": "stages/transfer-*/begun.json",
}
"""A sign that a command is at work."""
KINDS = (".h5", ".safetensors", ".json", ".yaml", ".npy", ".jsonl", ".pt", ".csv")
LOADED = (doctor, inspect, report, run)
"""Imported here once, not in every fork."""


@dataclass(frozen=True)
class Start:
    """A command, and a copy of the run that it begins from."""

    command: str
    copy: Path


def begin_from(copy: Path) -> None:
    """Put a copy in the place of the run."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(copy, RUN, symlinks=True)


def result(command: str) -> dict[str, Any]:
    """What a command wrote or said, times left out."""
    if command == "predict":
        return {"rows": ROWS.read_text()}
    if command in ("inspect", "doctor"):
        return {"said": ERRORS.read_text()}
    if command == "benchmark":
        tables = json.loads((RUN / "benchmark.json").read_text())
        return {"rows": [steady(row) for row in tables["rows"]]}
    return fingerprint(RUN / command)


def make_starts() -> tuple[list[Start], dict[str, dict[str, Any]]]:
    """Run every command once undisturbed; the copies to begin from, and the right results."""
    starts, right = list[Start](), dict[str, dict[str, Any]]()

    def keep(command: str, name: str) -> None:
        shutil.copytree(RUN, name, symlinks=True)
        starts.append(Start(command, Path(name)))

    def stop_halfway(command: str, sign: str) -> None:
        code = 0
        while code != STOPPED:  # it may be done already when the signal comes
            begin_from(before)
            child = start(COMMANDS[command], ERRORS)
            while not list(RUN.glob(sign)):
                time.sleep(0.001)
            os.kill(child, signal.SIGTERM)
            code = ended(child)
        keep(command, f"half-{command}")

    for stale in (RUN.parent, *Path().glob("*-*")):
        shutil.rmtree(stale, ignore_errors=True)
    Path("tiny.yaml").write_text(json.dumps(SETTINGS))
    Path("plan.yaml").write_text(json.dumps(PLAN))
    for command in COMMANDS:
        if command == "source":
            depth_mm = open_store(RUN / "prepare" / "transfer.h5")["target/target"]
            for row in range(3):
                np.save(f"{row}.npy", depth_mm[row])
        before = Path(f"before-{command}")
        if command in ("prepare", "benchmark"):  # these begin with nothing
            before.mkdir()
        else:
            keep(command, before.name)
        if command in HALFWAY:
            stop_halfway(command, HALFWAY[command])
        if code := ended(start(COMMANDS[command], ERRORS)):
            raise SystemExit(f"{command}: exit code {code}: {ERRORS.read_text()}")
        right[command] = result(command)
    keep("benchmark", "whole-benchmark")
    return starts, right


def same_record(before: bytes, now: bytes) -> bool:
    """Whether two contents are one JSON record, written in other blanks."""
    try:
        values = json.loads(now)
        return SEAL in values and bool(values == json.loads(before))
    except (ValueError, TypeError):
        return False


def went_wrong(trial: dict[str, Any]) -> bool:
    """Whether a damage was neither refused nor without effect."""
    return not (trial["refused"] or trial["unharmed"])


def damage(starts: list[Start], right: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
    """One trial: the file, the command, and how it ended."""
    chance = random.Random(number)
    beginning = starts[number % len(starts)]
    command = beginning.command
    begin_from(beginning.copy)
    ROWS.unlink(missing_ok=True)
    files = [path for path in sorted(RUN.rglob("*")) if path.suffix in KINDS and path.is_file()]
    path = chance.choice([path for path in files if not path.is_symlink()])
    before = path.read_bytes()
    damaged = mutate(before, chance)
    path.write_bytes(damaged)
    began = time.monotonic()
    code = ended(start(COMMANDS[command], ERRORS))
    seconds, said = time.monotonic() - began, ERRORS.read_text(errors="replace")
    refused = code == 1 and "Traceback" not in said and "sfkt: " in said
    now = result(command) if code == 0 else {}
    unharmed = now == right[command]
    if command == "doctor" and damaged != before:  # it has no result of its own: it has to notice
        unharmed &= same_record(before, damaged)
    trial = {"number": number, "command": command, "copy": str(beginning.copy), "file": str(path),
             "refused": refused, "unharmed": unharmed, "seconds": round(seconds, 3)}  # fmt: skip
    if went_wrong(trial):
        expected = right[command]
        trial["differing"] = [name for name in expected if now.get(name) != expected[name]]
        trial["code"], trial["said"] = code, said[-1500:]
    return trial


def main(folder: Path, trials: int) -> None:
    """Run the trials that are missing, and print a summary of all."""
    torch.set_num_threads(1)
    os.chdir(folder)
    starts, right = make_starts()
    lines = TRIALS.read_text().splitlines() if TRIALS.exists() else []
    done = {trial["number"]: trial for trial in map(json.loads, lines) if not went_wrong(trial)}
    with TRIALS.open("a", buffering=1) as log:
        for number in range(trials):
            if number not in done:
                done[number] = damage(starts, right, number)
                log.write(f"{json.dumps(done[number])}\n")
    found = list(done.values())
    print(json.dumps({
        "trials": len(found),
        "refused": sum(trial["refused"] for trial in found),
        "unharmed": sum(trial["unharmed"] for trial in found),
        "commands": Counter(trial["command"] for trial in found),
        "seconds": round(sum(trial["seconds"] for trial in found), 1),
        "wrong": [trial for trial in found if went_wrong(trial)],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
