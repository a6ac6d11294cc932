"""The estimate of `sfkt doctor --cost` for one step, over the measured one, on this CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sfkt_cli.config import Config, build, fixed_batch_size
from sfkt_cli.stages.cost import Counts, stage_costs, this_machine
from sfkt_cli.stages.workload import Workload
from sfkt_cli.training.runtime import Runtime, make_runtime
from tests.benchmarks.measuring import Row, ratio_row, seconds, time_row

CASES: dict[str, dict[str, Any]] = {
    "small, 48 px, 64 images": {},
    "resnet18, 64 px, 32 images": {
        "image_size": 64, "source": {"backbone": "resnet18"}, "runtime": {"batch_size": 32},
    },
    "mobilenet_v2, 96 px, 16 images": {
        "image_size": 96, "source": {"backbone": "mobilenet_v2"}, "runtime": {"batch_size": 16},
    },
}  # fmt: skip


def run(quick: bool) -> list[Row]:
    """Every stage of three networks; the machine is measured anew before each measured step."""
    rounds = 5 if quick else 9
    counts = Counts(1000, 1000, 1000)
    rows = []
    for title, changes in CASES.items():
        config = build(changes, {"runtime": {"gpus": 0}})
        runtime = make_runtime(config.runtime)
        for stage in ("source", "bridge", "transfer"):
            step = _step(config, runtime, stage)
            step()
            estimated, measured = [], []
            for _ in range(rounds):
                costs = stage_costs(config, counts, this_machine(runtime), runtime)
                estimated.append(next(cost.step.seconds for cost in costs if cost.stage == stage))
                measured.append(seconds(step))
            rows += [
                time_row(f"{stage} step, {title}", measured),
                ratio_row(f"estimate / {stage} step, {title}", estimated, measured, "1/1.5 .. 1.5"),
            ]
    return rows


def _step(config: Config, runtime: Runtime, stage: str) -> Callable[[], None]:
    batch = fixed_batch_size(config.runtime)
    work = Workload(config, runtime, batch)
    return partial(getattr(work, f"{stage}_step"), batch)
