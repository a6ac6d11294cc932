"""Two CPU processes that share the batches of a bridge, against one; one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.made import make_run, settings
from tests.benchmarks.measuring import Row, alternate, ratio_row, time_row

SIZE = 64


def run(quick: bool) -> list[Row]:
    """The whole command `sfkt bridge`, start-up included."""
    count, rounds = (1280, 2) if quick else (6400, 5)
    config = settings(SIZE)
    with tempfile.TemporaryDirectory(prefix="sfkt-bench-") as name:
        folder = Path(name) / "run"
        make_run(folder, config, pairs=count, targets=640)

        def bridge(processes: int) -> None:
            command = [
                sys.executable, "-m", "sfkt_cli", "bridge", "--run", str(folder), "--force",
                "--set", "bridge.epochs=2", "--set", "runtime.gpus=0",
                "--set", f"runtime.processes={processes}", "--set", f"image_size={SIZE}",
            ]  # fmt: skip
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=alone)

        one, two = alternate(lambda: bridge(1), lambda: bridge(2), rounds)
    return [
        time_row("bridge, one process", one),
        time_row("bridge, two processes", two),
        ratio_row("one process / two, bridge", one, two),
    ]
