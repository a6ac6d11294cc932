"""`sfkt prepare` and `sfkt evaluate`, whole commands, against the number of images.

The rendered data at 32 pixels, an untrained source model. Start-up is included, so that time an
image falls a little as there are more of them; it must not rise.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

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
    """10,000 and 100,000 pairs; quick: 500 and 2,000."""
    sizes = (500, 2_000) if quick else (10_000, 100_000)
    rows: list[Row] = []
    found: dict[str, list[tuple[float, float]]] = {"prepare": [], "evaluate": []}
    with tempfile.TemporaryDirectory(prefix="sfkt-bench-", dir=Path.cwd()) as name:
        for count in sizes:
            folder = Path(name) / str(count)
            more = ["--run", str(folder), "--set", f"synthetic.pairs={count}"]
            found["prepare"].append(_command("prepare", "synthetic", *more))
            _command("source", *more)
            found["evaluate"].append(_command("evaluate", *more))
    for stage, each in found.items():
        for count, (took, megabytes) in zip(sizes, each, strict=True):
            title = f"{stage}, {count:,} pairs"
            rows += [
                Row(f"time a pair, {title}", 1e3 * took / count, "ms"),
                Row(f"peak memory, {title}", megabytes, "MB"),
            ]
        (few, few_mb), (many, many_mb) = each
        label = f"{sizes[1]:,} / {sizes[0]:,} pairs, {stage}"
        rows += [
            ratio_row(f"time a pair, {label}", [many / sizes[1]], [few / sizes[0]], "<= 1.1"),
            ratio_row(f"peak memory, {label}", [many_mb], [few_mb]),
        ]
    return rows


def _command(*words: str) -> tuple[float, float]:
    """Seconds and largest resident memory, in MB, of a command in its own process."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "sfkt_cli", *words, *settings]
    done = subprocess.run([sys.executable, "-c", WATCH, *command], check=True, capture_output=True)
    took, kilobytes = done.stdout.split()[-2:]
    return float(took), float(kilobytes) / 1024
