"""Time of an epoch and peak memory against the number of pairs, each size in a fresh process.

The store is random numbers, on disk, read through a memory map; the networks are narrow, so that
what grows with the store would show. Sizes are run in turn, several times over; memory is what the
process holds for itself. Resident memory, given beside, counts mapped pages of the file, too, which
the system takes back at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from sfkt_cli.console import console
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages import bridge, transfer
from tests.benchmarks.made import make_run, settings
from tests.benchmarks.measuring import Row, own_peak_mb, ratio_row
from tests.benchmarks.step_time import capture

SIZE, BATCH = 64, 64


def run(quick: bool) -> list[Row]:
    """1,000, 10,000 and 100,000 pairs at 64 pixels; quick: 500 and 2,000."""
    sizes = (500, 2_000) if quick else (1_000, 10_000, 100_000)
    rounds = 1 if quick else 2
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="sfkt-bench-", dir=Path.cwd()) as name:
        for count in sizes:
            make_run(Path(name) / str(count), _config(), pairs=count, targets=500)
        for _ in range(rounds):
            for count in sizes:
                for stage in ("bridge", "transfer"):
                    found.setdefault((count, stage), []).append(_epoch(Path(name), count, stage))
    rows = []
    for (count, stage), each in found.items():
        title = f"{stage}, {count:,} pairs"
        times = [1e3 * one["seconds"] / count for one in each]
        rows += [
            Row(f"epoch a pair, {title}", median(times), "ms", "", tuple(times)),
            Row(f"peak of own memory, {title}", max(one["own_mb"] for one in each), "MB"),
            Row(f"peak with mapped pages, {title}", max(one["peak_mb"] for one in each), "MB"),
        ]
    for stage in ("bridge", "transfer"):
        few, many = (found[count, stage] for count in sizes[-2:])
        label = f"{sizes[-1]:,} / {sizes[-2]:,} pairs, {stage}"
        above = [one["seconds"] / sizes[-1] for one in many]
        below = [one["seconds"] / sizes[-2] for one in few]
        rows += [
            ratio_row(f"time a pair, {label}", above, below, "0.9 .. 1.1"),
            ratio_row(
                f"own memory, {label}", [one["own_mb"] for one in many],
                [one["own_mb"] for one in few], "<= 1.1",
            ),
        ]  # fmt: skip
    return rows


def _config() -> Any:
    runtime = {"batch_size": BATCH, "gpus": 0, "checkpoint_seconds": 1e9}
    narrow = {"source": {"width": 8, "bottleneck": 32}, "bridge": {"width": 8}}
    return settings(SIZE, runtime=runtime, training={"min_steps": 1}, **narrow)


def _epoch(folder: Path, count: int, stage: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", str(folder / str(count)), stage]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, stage: str) -> dict[str, float]:
    """One epoch of a stage on a copy of its inputs, in this process."""
    console.quiet = True
    module = {"bridge": bridge, "transfer": transfer}[stage]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Run(Path(name))
        for before in ("prepare", "source", *(["bridge"] if stage == "transfer" else [])):
            (Path(name) / before).symlink_to(folder / before)
        peak = _Peak()
        training = capture(lambda: getattr(module, stage)(_config(), run))
        began = time.perf_counter()
        replace(training, epochs=1, select=None).fit()
        return {
            "seconds": time.perf_counter() - began,
            "own_mb": peak.stop(),
            "peak_mb": own_peak_mb(),
        }


class _Peak:
    """Largest memory of this process without mapped files, in MB, looked at 50 times a second."""

    def __init__(self) -> None:
        self._most, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._end.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self._most = max(self._most, own / 1024)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
