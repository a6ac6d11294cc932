"""Wall time until TGKT is as accurate as SOCKET in the end, over SOCKET's whole time.

The demo. On TGKT's side counts the whole bridge, everything before the first epoch of transfer, and
its epochs up to the first that is as good; on SOCKET's side its transfer alone. Accuracy is that on
the unlabelled target images, from the predictions that each epoch leaves behind.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sfkt_cli.config import Config, build
from sfkt_cli.console import quieten
from sfkt_cli.data.store import open_store
from sfkt_cli.runs import Run
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.selection import load_epochs, spread
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


def run(quick: bool) -> list[Row]:
    """Three seeds of the demo; quick: one of a small one."""
    quieten(True)
    rows, ratios = [], []
    for seed in (0,) if quick else (0, 1, 2):
        with tempfile.TemporaryDirectory(prefix="sfkt-bench-") as name:
            found = _seed(build({"runtime": {"gpus": 0}}, SHORT if quick else {}, {"seed": seed}),
                          Run(Path(name) / "run"))  # fmt: skip
        ratios.append(found["ratio"])
        rows += [Row(f"{key}, seed {seed}", value, unit) for key, (value, unit) in found["shown"]]
    worst = max(ratios)
    rows.append(
        Row("time to SOCKET's accuracy / SOCKET's time", worst, "", "<= 0.4", tuple(ratios))
    )
    return rows


def _seed(config: Config, run: Run) -> dict[str, Any]:
    prepare(config, run)
    source(config, run)
    peer = build(config.model_dump(), {"transfer": {"method": "socket"}})
    whole = seconds(lambda: transfer(peer, run))
    reached = accuracies(run, "transfer/socket")[-1]
    bridging = seconds(lambda: bridge(config, run))
    taken = seconds(lambda: transfer(config, run))
    epochs = _seconds_of_epochs(run, "transfer/tgkt")
    before = taken - epochs[-1]
    good = np.flatnonzero(accuracies(run, "transfer/tgkt") >= reached)
    until = bridging + before + epochs[good[0]] if len(good) else float("inf")
    shown = {
        "SOCKET, whole time": (whole, "s"),
        "SOCKET, accuracy": (100 * reached, "%"),
        "bridge": (bridging, "s"),
        "tgkt until as accurate, with bridge": (until, "s"),
        "tgkt, whole time, with bridge": (bridging + taken, "s"),
        "tgkt, accuracy": (100 * accuracies(run, "transfer/tgkt")[-1], "%"),
    }
    return {"ratio": until / whole, "shown": list(shown.items())}


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
