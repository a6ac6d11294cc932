"""`sfkt prepare` and `sfkt evaluate`, whole commands, against the number of images.

The rendered data at 32 pixels, an untrained source model. What one more pair takes is compared
between many pairs and few, so that start-up, which is the same for all, does not enter.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks.measuring import Row, ratio_row

SETTINGS = (
    "runtime.gpus=0", "image_size=32", "source.epochs=0", "evaluate.oracle=false",
    "evaluate.pictures=false", "prepare.workers=1",
)  # fmt: skip

WATCH = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A program between: a process is charged with the memory of the one that it was started from."""


def run(quick: bool) -> list[Row]:
    """5,000, 25,000 and 100,000 pairs; quick: 500, 1,000 and 2,000."""
    sizes = (500, 1_000, 2_000) if quick else (5_000, 25_000, 100_000)
    rounds = 1 if quick else 9
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sfkt-bench-", dir=Path.cwd()) as name:
        more = {n: ["--run", f"{name}/{n}", "--set", f"synthetic.pairs={n}"] for n in sizes}
        for count in sizes:
            found["prepare", count] = [_command("prepare", "synthetic", *more[count])]
            _command("source", *more[count])
        for _ in range(rounds):  # all sizes in turn: what a machine does besides hits all alike
            for count in sizes:
                done = _command("evaluate", "--force", *more[count])
                found.setdefault(("evaluate", count), []).append(done)
    rows: list[Row] = []
    for stage in ("prepare", "evaluate"):
        seconds = [median(took for took, _ in found[stage, count]) for count in sizes]
        for count, time_s in zip(sizes, seconds, strict=True):
            title = f"{stage}, {count:,} pairs"
            rows += [
                Row(f"time, {title}", time_s, "s"),
                Row(f"peak memory, {title}", max(mb for _, mb in found[stage, count]), "MB"),
            ]
        early, late = (
            (seconds[place + 1] - seconds[place]) / (sizes[place + 1] - sizes[place])
            for place in (0, 1)
        )
        label = f"{sizes[1]:,} .. {sizes[2]:,} / {sizes[0]:,} .. {sizes[1]:,} pairs, {stage}"
        rows.append(ratio_row(f"time of one more pair, {label}", [late], [early], "0.9 .. 1.1"))
    return rows


def _command(*words: str) -> tuple[float, float]:
    """Seconds and largest resident memory, in MB, of a command in its own process."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "sfkt_cli", *words, *settings]
    done = subprocess.run([sys.executable, "-c", WATCH, *command], check=True, capture_output=True)
    took, kilobytes = done.stdout.split()[-2:]
    return float(took), float(kilobytes) / 1024
