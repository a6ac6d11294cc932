"""Paper arithmetic: FLOPs as counted by hand, and an estimate near what is measured."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from sfkt_cli.config import Config, build, fixed_batch_size
from sfkt_cli.errors import ConfigError
from sfkt_cli.stages.cost import Counts, stage_costs, tell_cost, this_machine
from sfkt_cli.stages.workload import Workload
from sfkt_cli.training.devices import PEAKS, named_machine
from sfkt_cli.training.roofline import at_batch, cost_of, operations_of
from sfkt_cli.training.runtime import Runtime, make_runtime

CPU = {"runtime": {"gpus": 0}}
FP32 = Runtime(torch.device("cpu"), torch.float32)


def test_operations_are_those_of_a_convolution() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    images = torch.rand(2, 4, 10, 10)
    forward = 2 * 2 * 8 * 10 * 10 * 4 * 9
    found = operations_of(lambda: conv(images))
    assert sum(each.flops for each in found) == forward
    moved = 4 * (images.numel() + conv.weight.numel() + 2 * 8 * 100)
    assert sum(each.moved for each in found) == moved
    both = operations_of(lambda: conv(images).sum().backward())
    assert sum(each.flops for each in both) == 2 * forward


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradients_of_grouped_convolutions_are_counted_as_such(kind: Any, groups: int) -> None:
    layer = kind(8, 8, 3, groups=groups, bias=False)
    images = torch.rand(2, 8, 10, 10, requires_grad=True)
    forward = sum(each.flops for each in operations_of(lambda: layer(images)))
    both = sum(each.flops for each in operations_of(lambda: layer(images).sum().backward()))
    assert both == 3 * forward > 0


def test_depthwise_convolutions_have_rates_of_their_own() -> None:
    def kinds(layer: nn.Module) -> list[str]:
        images = torch.rand(2, 16, 8, 8, requires_grad=True)
        return [each.kind for each in operations_of(layer(images).sum().backward) if each.flops]

    assert kinds(nn.Conv2d(16, 16, 3, groups=16)) == ["depthwise"] * 2
    assert kinds(nn.Conv2d(16, 32, 5, groups=16)) == [
        "large depthwise", "weights of large depthwise",
    ]  # fmt: skip
    assert kinds(nn.Conv2d(16, 16, 3, groups=2)) == ["narrow"] * 2


def test_what_does_not_grow_with_the_batch_is_counted_once() -> None:
    layer = nn.Linear(5, 7)

    def work(rows: int) -> None:
        layer(torch.ones(rows, 5))
        layer.weight.detach().sqrt()

    few, many = at_batch(work, (2, 4), 16), operations_of(lambda: work(16))
    assert few == many


def test_time_is_the_longer_of_computing_and_moving() -> None:
    machine = named_machine("rtx 4090")
    operations = operations_of(lambda: torch.ones(1000) + 1.0)
    cost = cost_of(operations, machine)
    assert cost.transfer == pytest.approx(cost.moved / machine.bandwidth)
    assert cost.compute == 0
    assert (cost + cost * 2).seconds == pytest.approx(3 * cost.seconds)


def test_every_named_device_is_known() -> None:
    assert [named_machine(name).name for name in PEAKS] == list(PEAKS)


def test_a_named_device_takes_some_time() -> None:
    costs = stage_costs(Config(), Counts(1000, 2000, 1000), named_machine("T4"), FP32)
    assert [cost.stage for cost in costs] == ["source", "bridge", "transfer"]
    for cost in costs:
        assert 0 < cost.step.seconds < cost.whole.seconds < 3600
        assert 0 < cost.memory < 8e9


def test_an_unknown_device_and_an_unprepared_data_set_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my.yaml"
    file.write_text("dataset: sun-rgbd\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="choose one of H200"):
        tell_cost(file, {}, "abacus")
    with pytest.raises(ConfigError, match="sfkt prepare sun-rgbd"):
        tell_cost(file, {}, "H100")
    half = {"dataset": "synthetic", "runtime": {"precision": "fp16", "gpus": 0}}
    assert tell_cost(file, half, "H100")["stages"][0]["stage"] == "source"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source", "bridge", "transfer"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_size": 64, "source": {"backbone": "resnet18"}, "runtime": {"batch_size": 32}},
        {"image_size": 96, "source": {"backbone": "mobilenet_v2"}, "runtime": {"batch_size": 16}},
    ],
)
def test_the_estimate_is_near_the_measured_cpu_time(
    stage: str, settings: dict[str, object]
) -> None:
    config = build(settings, CPU)
    runtime = make_runtime(config.runtime)
    costs = stage_costs(config, Counts(1000, 1000, 1000), this_machine(runtime), runtime)
    estimate = next(cost.step.seconds for cost in costs if cost.stage == stage)
    batch = fixed_batch_size(config.runtime)
    step = getattr(Workload(config, runtime, batch), f"{stage}_step")
    times = []
    for _ in range(6):
        began = time.thread_time()
        step(batch)
        times.append(time.thread_time() - began)
    assert 1 / 1.5 < estimate / median(times[1:]) < 1.5
