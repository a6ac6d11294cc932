"""The program used for long in one process: memory and file handles stay where they are."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from sfkt_cli.console import console
from sfkt_cli.settings.config import build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.evaluate import evaluate
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import transfer
from tests.faults.campaign import SETTINGS
from tests.faults.test_campaigns import in_its_own_process

RUNS = 50


def measure(folder: Path, runs: int) -> list[tuple[float, int]]:
    """Memory in MB and open files after each of several complete runs in this process."""
    console.quiet = True
    found = []
    for number in range(runs):
        run = Run(folder / "run")
        config = build(yaml.safe_load(SETTINGS), {"seed": number % 2})
        for stage in (prepare, source, bridge, transfer, evaluate):
            stage(config, run)
        shutil.rmtree(run.folder)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(list(Path("/proc/self/fd").iterdir()))
        found.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files))
    return found


@pytest.mark.slow
def test_fifty_runs_leak_nothing(tmp_path: Path) -> None:
    found = in_its_own_process("test_leaks.py", tmp_path, str(RUNS))
    (tenth, files), (last, files_now) = found[9], found[-1]
    print(f"run 10: {tenth:.0f} MB, {files} files; run {RUNS}: {last:.0f} MB, {files_now} files")
    assert last <= 1.05 * tenth
    assert files_now <= files


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
