"""`sfkt doctor --cost`: what training takes, from the arithmetic of its networks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfkt_cli.config import Config, build, fixed_batch_size, read_yaml
from sfkt_cli.console import output
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import ConfigError
from sfkt_cli.runs import RUNS, Run
from sfkt_cli.stages.selection import SCORE_ROWS
from sfkt_cli.stages.streams import HELD_OUT
from sfkt_cli.stages.workload import COUNTED, Workload
from sfkt_cli.training.batch_size import TRANSIENT, kept_bytes
from sfkt_cli.training.devices import named_machine
from sfkt_cli.training.memory import free_memory
from sfkt_cli.training.roofline import (
    DEPTHWISE,
    MIDDLING,
    NARROW,
    WIDE,
    Cost,
    Machine,
    at_batch,
    cost_of,
    measure_machine,
)
from sfkt_cli.training.runtime import Runtime, make_runtime

LOOK = 256
"""Images that are looked at in one pass."""


@dataclass(frozen=True)
class Counts:
    """Samples of a run: TR RGB images, TI pairs and TR target images."""

    source: int
    ti: int
    target: int


@dataclass(frozen=True)
class StageCost:
    """What a stage takes.

    Attributes:
        stage: Its name.
        step: One training step.
        whole: All steps, and a look at every image before and after.
        memory: Bytes of weights, gradients, optimiser and activations.
    """

    stage: str
    step: Cost
    whole: Cost
    memory: float

    def as_values(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "stage": self.stage,
            "step_flops": self.step.flops,
            "step_bytes": self.step.moved,
            "step_seconds": self.step.seconds,
            "seconds": self.whole.seconds,
            "memory_bytes": self.memory,
            "limit": self.whole.limit,
        }


def tell_cost(file: Path, changes: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Print what the stages of a configuration take here, or on a named device.

    Args:
        file: Settings.
        changes: Nested settings that win over those of the file.
        device: Name of a device; None: this machine's.

    Returns:
        The same figures for scripts: seconds and bytes.

    Raises:
        ConfigError: The file is wrong, the device is unknown, or nobody knows how many images.
    """
    config = build(read_yaml(file), changes)
    if device:  # its shares of the peak stand for its precision; operations are counted as they are
        machine = named_machine(device)
        runtime = make_runtime(config.runtime.model_copy(update={"precision": "fp32"}))
    else:
        runtime = make_runtime(config.runtime)
        machine = this_machine(runtime)
    counts = count_samples(config)
    output(describe(machine))
    output(f"{counts.source:,} source images, {counts.ti:,} TI pairs, {counts.target:,} targets")
    output(f"{'stage':10}{'GFLOP/step':>12}{'GB/step':>10}{'s/step':>10}{'time':>12}{'memory':>10}")
    costs = stage_costs(config, counts, machine, runtime)
    for cost in costs:
        output(
            f"{cost.stage:10}{cost.step.flops / 1e9:12,.1f}{cost.step.moved / 1e9:10.2f}"
            f"{cost.step.seconds:10.2g}{cost.whole.seconds:10,.0f} s{cost.memory / 1e9:7.1f} GB"
            f"   limit: {cost.whole.limit}"
        )
        if cost.memory > machine.memory:
            output(f"advice: {cost.stage} does not fit: set runtime.batch_size lower")
    return {"device": asdict(machine), "stages": [cost.as_values() for cost in costs]}


def describe(machine: Machine) -> str:
    """One line on where the figures of a machine come from."""
    rates = ", ".join(
        f"{machine.flops[kind] / 1e9:,.0f}" for kind in (NARROW, MIDDLING, WIDE, DEPTHWISE)
    )
    how = "measured now" if machine.measured else "assumed shares of the data sheet, never checked"
    return (
        f"{machine.name}: {rates} GFLOP/s in narrow, middling, wide and depthwise "
        f"convolutions, "
        f"{machine.bandwidth / 1e9:,.1f} GB/s ({how})"
    )


def this_machine(runtime: Runtime) -> Machine:
    """The device of this process, measured."""
    if runtime.device.type == "cuda":
        has = torch.cuda.get_device_properties(runtime.device)
        return measure_machine(has.name, runtime, has.total_memory)
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return measure_machine(name, runtime, free_memory())


def count_samples(config: Config) -> Counts:
    """Samples of the data set: from its prepared run, or of what would be rendered.

    Raises:
        ConfigError: It is not prepared.
    """
    store = Run(RUNS / config.dataset).transfer_store
    if store.is_file():
        has = open_store(store)
        target = has.count("target")
        rest = 1 - config.split.source - config.split.test
        return Counts(round(target * config.split.source / rest), has.count("ti"), target)
    if config.dataset != "synthetic":
        raise ConfigError(
            f"dataset = {config.dataset!r} is not prepared, so nobody knows how many images it "
            f"has: first run `sfkt prepare {config.dataset}`"
        )
    ti = round(config.synthetic.pairs * config.synthetic.ti_share)
    tr = config.synthetic.pairs - ti
    source, test = (round(share * tr) for share in (config.split.source, config.split.test))
    return Counts(source, ti, tr - source - test)


def stage_costs(
    config: Config, counts: Counts, machine: Machine, runtime: Runtime
) -> list[StageCost]:
    """What source, bridge and transfer take; evaluation and pictures are left out.

    Args:
        config: Settings.
        counts: Samples of each kind.
        machine: Where the operations are to run.
        runtime: Where they are counted, and in which precision.
    """
    work = Workload(config, runtime)
    trains = machine  # as it is while it trains the classifier, which may want fp32
    if machine.measured and runtime.precision_for(work.model) != runtime.precision:
        trains = this_machine(replace(runtime, precision=torch.float32))
    batch = fixed_batch_size(config.runtime)
    found = []
    for stage, step, look, epochs, trained, seen, looks in (
        ("source", work.source_step, work.source_look, config.source.epochs,
         counts.source, [work.model], 0),
        ("bridge", work.bridge_step, work.bridge_look, config.bridge.epochs,
         max(counts.ti, counts.target), [work.translator, work.frozen],
         config.bridge.epochs * (min(counts.ti // 10, HELD_OUT) + min(counts.target, SCORE_ROWS))),
        ("transfer", work.transfer_step, work.source_look, config.transfer.epochs,
         max(counts.ti, counts.target), [work.model, work.frozen],
         2 * counts.ti + counts.target * 2 * (2 + config.transfer.epochs)),
    ):  # fmt: skip
        step(COUNTED[-1])
        device = machine if stage == "bridge" else trains
        once = cost_of(at_batch(step, COUNTED, batch), device)
        steps = epochs * max(trained // batch, config.training.min_steps)
        look_once = cost_of(at_batch(look, COUNTED, LOOK), machine)
        weights = sum(p.numel() * p.element_size() for m in seen for p in m.parameters())
        kept = kept_bytes(partial(step, COUNTED[-1])) / COUNTED[-1] * batch
        found.append(
            StageCost(
                stage, once, once * steps + look_once * (looks / LOOK),
                5 * weights + TRANSIENT * kept,
            )
        )  # fmt: skip
    return found
