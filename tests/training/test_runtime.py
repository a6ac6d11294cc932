"""The precision of a process: what auto chooses, and what it leaves alone."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfkt_cli import machine
from sfkt_cli.errors import ConfigError
from sfkt_cli.models.onnx_network import OnnxNetwork
from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.training.runtime import Runtime, make_runtime

PLAIN = nn.Conv2d(4, 4, 3)
RECORDED = OnnxNetwork(
    nodes=[["Conv", ["images", "kernel"], ["maps"], {"group": 4}]], input="images", output="maps",
    channels_last=False, tensors={"kernel": [[4, 1, 3, 3], "float32", True]}, norms=[], features=4,
)  # fmt: skip
DEPTHWISE = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
GROUPED = nn.Conv2d(4, 4, 3, groups=2)
IMAGES = torch.rand(2, 4, 8, 8)


class OwnConvolution(nn.Conv2d):
    """As EfficientNet's, which pads by itself."""


def computed_in(precision: str, trained: nn.Module | None) -> torch.dtype:
    runtime = make_runtime(RuntimeConfig(gpus=0, precision=precision))
    with runtime.autocast(trained):
        found: torch.dtype = PLAIN(IMAGES).dtype
    return found


@pytest.mark.parametrize("trained", [None, PLAIN, GROUPED, DEPTHWISE, RECORDED])
@pytest.mark.parametrize("units", [True, False])
def test_a_cpu_computes_in_bf16_where_it_is_faster(
    units: bool, trained: nn.Module | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    fast = units and trained not in (DEPTHWISE, RECORDED)
    assert computed_in("auto", trained) == (torch.bfloat16 if fast else torch.float32)
    assert computed_in("fp32", trained) == torch.float32
    assert computed_in("bf16", trained) == torch.bfloat16


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="use fp32 or bf16"):
        make_runtime(RuntimeConfig(gpus=0, precision="fp16"))


def test_the_state_of_a_training_tells_the_precision_that_it_trained_in() -> None:
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, automatic=True)
    assert runtime.environment(PLAIN)["precision"] == "bfloat16"
    assert runtime.environment(DEPTHWISE)["precision"] == "float32"


@pytest.mark.parametrize(
    ("trained", "held_in"), [(PLAIN, torch.bfloat16), (DEPTHWISE, torch.float32)]
)
def test_frozen_convolutions_are_held_in_the_type_they_work_in(
    trained: nn.Module, held_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    runtime = make_runtime(RuntimeConfig(gpus=0, precision="auto"))
    frozen = nn.Sequential(OwnConvolution(4, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    with runtime.autocast(trained):
        before = frozen(IMAGES)
        runtime.cast_frozen(frozen, trained)
        after = frozen(IMAGES)
    assert [value.dtype for value in frozen.parameters()] == [held_in] * 2 + [torch.float32] * 2
    assert torch.equal(before, after)


def test_frozen_depthwise_convolutions_with_a_stride_stay_in_fp32_on_a_cpu() -> None:
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, automatic=True)
    strided = nn.Conv2d(4, 4, 3, stride=2, groups=4).requires_grad_(False)
    frozen = nn.Sequential(nn.Conv2d(4, 4, 3), strided).requires_grad_(False)
    runtime.cast_frozen(frozen, PLAIN)
    with runtime.autocast(PLAIN):
        before = frozen[0](IMAGES)
        after = frozen(IMAGES)
    assert before.dtype == torch.bfloat16
    assert torch.equal(
        after, torch.conv2d(before.float(), strided.weight, strided.bias, 2, groups=4)
    )


@pytest.mark.parametrize(("platform", "largest"), [("linux", 3 * 2**10), ("darwin", 3 * 2**20)])
def test_peak_memory_is_in_megabytes_on_every_system(
    platform: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(machine, "Path", lambda name: Path("/nowhere") / name[1:])
    monkeypatch.setattr(resource, "getrusage", lambda whose: SimpleNamespace(ru_maxrss=largest))
    assert Runtime(torch.device("cpu"), torch.float32).peak_memory_mb() == 3.0
