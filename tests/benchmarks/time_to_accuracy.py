"""Wall time until TGKT is as accurate as SOCKET in the end, over SOCKET's whole time.

The demo. On TGKT's side counts the whole bridge, everything before the first epoch of transfer, and
its epochs up to the first that is as good; on SOCKET's side its transfer alone. Accuracy is that on
the unlabelled target images, from the predictions that each epoch leaves behind. TGKT runs with its
defaults, and with sample_configs/hurry.yaml: a smaller translator, two epochs of each stage.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sfkt_cli.console import console
from sfkt_cli.data.store import open_store, spread
from sfkt_cli.methods.label_free import load_epochs
from sfkt_cli.settings.config import Config, build, read_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import transfer
from tests.benchmarks.measuring import Row, seconds

SHORT: dict[str, Any] = {
    "synthetic": {"pairs": 400},
    "training": {"min_steps": 3},
    "source": {"epochs": 3},
    "bridge": {"epochs": 2},
    "transfer": {"epochs": 2},
}
"""Small and short: shows that it runs, its figures mean nothing."""

HURRY = Path(__file__).parents[2] / "sample_configs" / "hurry.yaml"
ARMS: dict[str, dict[str, Any]] = {"defaults": {}, "in a hurry": read_yaml(HURRY)}
"""Settings of TGKT."""


def run(quick: bool) -> list[Row]:
    """Three seeds of the demo; quick: one of a small one."""
    console.quiet = True
    rows: list[Row] = []
    ratios: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in (0,) if quick else (0, 1, 2):
        config = build({"runtime": {"gpus": 0}}, SHORT if quick else {}, {"seed": seed})
        with tempfile.TemporaryDirectory(prefix="sfkt-bench-") as name:
            run = Run(Path(name) / "run")
            prepare(config, run)
            source(config, run)
            whole, reached = _socket(config, run)
            rows += [
                Row(f"SOCKET, whole time, seed {seed}", whole, "s"),
                Row(f"SOCKET, accuracy, seed {seed}", 100 * reached, "%"),
            ]
            for arm, settings in ARMS.items():
                own = build(config.model_dump(), settings)
                found = _tgkt(own, Run(run.folder, force=True), reached)
                ratios[arm].append(found["until as accurate"][0] / whole)
                rows += [
                    Row(f"tgkt, {arm}: {what}, seed {seed}", value, unit)
                    for what, (value, unit) in found.items()
                ]
    for arm, each in ratios.items():
        title = f"time to SOCKET's accuracy / SOCKET's time, {arm}"
        rows.append(Row(title, max(each), "", "<= 0.4", tuple(each)))
    return rows


def _socket(config: Config, run: Run) -> tuple[float, float]:
    """Seconds of SOCKET and its final accuracy."""
    peer = build(config.model_dump(), {"transfer": {"method": "socket"}})
    whole = seconds(lambda: transfer(peer, run))
    return whole, float(accuracies(run, "transfer/socket")[-1])


def _tgkt(config: Config, run: Run, reached: float) -> dict[str, tuple[float, str]]:
    """Seconds of bridge and transfer until an accuracy is reached, and in all."""
    bridging = seconds(lambda: bridge(config, run))
    taken = seconds(lambda: transfer(config, run))
    epochs = _seconds_of_epochs(run, "transfer/tgkt")
    found = accuracies(run, "transfer/tgkt")
    good = np.flatnonzero(found >= reached)
    until = bridging + taken - epochs[-1] + epochs[good[0]] if len(good) else float("inf")
    return {
        "bridge": (bridging, "s"),
        "until as accurate": (until, "s"),
        "whole time": (bridging + taken, "s"),
        "accuracy": (100 * float(found[-1]), "%"),
    }


def accuracies(run: Run, stage: str) -> Any:
    """Accuracy on target images after each epoch of a stage."""
    said = load_epochs(run.path(stage))
    rows = spread(open_store(run.transfer_store).count("target"))
    test = open_store(run.test_store)
    label_of = dict(zip(test.strings("labels/id"), test.labels("labels"), strict=True))
    ids = open_store(run.transfer_store).strings("target/id")
    return (said == np.array([label_of[ids[row]] for row in rows])).mean(axis=1)


def _seconds_of_epochs(run: Run, stage: str) -> list[float]:
    lines = run.path(stage, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["seconds"]) for line in lines]
