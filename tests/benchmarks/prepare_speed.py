"""How fast is prepare, against bare decoding and resizing by the same processes; and its memory.

    python -m tests.benchmarks --only prepare_speed

makes 2,000 JPEG + 16-bit PNG pairs of 640 x 480 pixels, times both in turn, and prints the ratio.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from sfkt_cli.data.readers import read_archive
from sfkt_cli.data.records import FileLoader, Record
from sfkt_cli.settings.config import Config, as_dict, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import prepare
from tests.benchmarks.measuring import Row

PAIRS = 2000
SIZE = 224
ROUNDS = 2


def make_pairs(root: Path, pairs: int, distinct: int = 50) -> None:
    """A folder of pairs with the entropy of photographs; files repeat as hard links."""
    rng = np.random.default_rng(0)
    for role in ("rgb", "target"):
        (root / "ti" / role).mkdir(parents=True)
    (root / "tr" / "thing").mkdir(parents=True)
    for number in range(pairs):
        names = [root / "ti" / "rgb" / f"{number}.jpg", root / "ti" / "target" / f"{number}.png"]
        if number >= distinct:
            for name in names:
                os.link(name.with_stem(str(number % distinct)), name)
            continue
        coarse = rng.integers(0, 255, (30, 40, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
        noisy = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(names[0], quality=92)
        far = np.linspace(800, 5000, 480)[:, None] + 3.0 * image[:, :, 0]
        depth = np.rint(far / 8 + rng.normal(0, 0.4, far.shape)) * 8
        depth[rng.random(depth.shape) < 0.02] = 0
        Image.fromarray(depth.astype(np.uint16)).save(names[1])
    for number in range(5):
        os.link(root / "ti" / "target" / f"{number}.png", root / "tr" / "thing" / f"{number}.png")


def bare(loader: FileLoader, records: list[Record]) -> int:
    """Decode and resize, keeping nothing."""
    return sum(
        int(loader.rgb(record)[0, 0, 0]) + int(loader.target(record)[0, 0]) for record in records
    )


def run(quick: bool) -> list[Row]:
    """Measure both, in turn."""
    pairs, rounds = (200, 1) if quick else (PAIRS, ROUNDS)
    folder = Path(tempfile.mkdtemp(prefix="sfkt-bench-"))
    try:
        make_pairs(folder / "archive", pairs)
        return _measure(folder, pairs, rounds)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, pairs: int, rounds: int) -> list[Row]:
    settings = {"dataset": "folders", "image_size": SIZE, "classes": {"tr": ["thing"]}}
    config = build(settings, {"prepare": {"root": str(folder / "archive")}})
    ours, reference = [], []
    for number in range(rounds):
        reference.append(_time_bare(config))
        ours.append(_time_prepare(config, folder / f"run{number}"))
    cpu_ratio = _cpu_ratio(config, folder)
    ratio = float(np.median([b / o for o, b in zip(ours, reference, strict=True)]))
    return [
        Row("bare decode and resize", pairs / min(reference), "pairs/s", ""),
        Row("prepare", pairs / min(ours), "pairs/s", ""),
        Row("prepare / bare", 100 * ratio, "%", ">= 85"),
        Row("prepare / bare, CPU time", 100 * cpu_ratio, "%", ">= 85"),
        Row("peak memory of all processes", _peak_mb(config, folder), "MB", "< 600"),
    ]


def _cpu_ratio(config: Config, folder: Path) -> float:
    """Both in this process, by CPU time: other programs on the machine matter less."""
    alone = build({**as_dict(config), "prepare": {**as_dict(config.prepare), "workers": 1}})
    archive = read_archive(alone)
    began = time.process_time()
    bare(archive.loader, [record for record in archive.records if record.rgb])  # type: ignore[arg-type]
    decoded = time.process_time()
    prepare(alone, Run(folder / "alone"))
    shutil.rmtree(folder / "alone")
    return (decoded - began) / (time.process_time() - decoded)


def _time_bare(config: Config) -> float:
    archive = read_archive(config)
    records = [record for record in archive.records if record.rgb]
    processes = len(os.sched_getaffinity(0))
    blocks = [records[first : first + 32] for first in range(0, len(records), 32)]
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("forkserver")) as pool:
        for future in [pool.submit(bare, archive.loader, block) for block in blocks]:  # type: ignore[arg-type]
            future.result()
    return time.perf_counter() - began


def _time_prepare(config: Config, folder: Path) -> float:
    began = time.perf_counter()
    prepare(config, Run(folder))
    elapsed = time.perf_counter() - began
    shutil.rmtree(folder)
    return elapsed


def _peak_mb(config: Config, folder: Path) -> float:
    """Largest memory of the command and the processes below it; what they share counts once."""
    command = [
        sys.executable, "-m", "sfkt_cli", "prepare", "folders", "--run", str(folder / "seen"),
        "--root", str(config.prepare.root), "--set", f"image_size={SIZE}",
        "--set", "classes.tr=[thing]",
    ]  # fmt: skip
    peak = 0.0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            time.sleep(0.1)
            total = sum(_proportional_kb(process) for process in _tree(running.pid))
            peak = max(peak, total / 1024)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {running.returncode}")
    return peak


def _tree(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [process, *(below for child in text.split() for below in _tree(int(child)))]


def _proportional_kb(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
