"""Levels: the right modules, noted only where that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from sfkt_cli.models.backbones import SmallResNet, make_backbone
from sfkt_cli.models.levels import Levels
from sfkt_cli.models.programs import Program
from sfkt_cli.models.recording import record


def levels_of(network: nn.Module, images: torch.Tensor) -> Levels:
    return Levels([network], network, images)


def test_a_level_is_the_last_module_of_a_resolution_of_a_quarter_and_below() -> None:
    network = SmallResNet(4).eval()
    levels = levels_of(network, images := torch.rand(2, 3, 32, 32))
    assert levels.names == ["stages.1", "stages"]
    with levels.noted() as seen:
        network(images)
    assert [tuple(level.shape) for level in seen] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert levels.variances == pytest.approx([level.var().item() for level in seen])


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny"])
def test_networks_of_torchvision_have_a_level_at_each_resolution(name: str) -> None:
    network, _ = make_backbone(name, width=0, pretrained=False)
    levels = levels_of(network.eval(), torch.rand(1, 3, 64, 64))
    with levels.noted() as seen, torch.no_grad():
        network(torch.rand(2, 3, 64, 64))
    sides = [level.shape[-1] for level in seen if level.shape[-1] == level.shape[-2]]
    assert sides == sorted(set(sides), reverse=True)
    assert {16, 8, 4, 2} <= set(sides)


def test_a_recorded_program_has_the_levels_of_its_network() -> None:
    torch.manual_seed(0)
    original = models.get_model("resnet18", weights=None).eval()
    kept, tensors, _, _ = record(original, 64, "resnet18")
    program = Program(**kept).eval()
    program.network.load_state_dict(tensors, strict=False)
    images = torch.rand(2, 3, 64, 64)
    original.fc = nn.Identity()
    seen = []
    for network in (original, program):
        levels = levels_of(network, images)
        with levels.noted() as noted, torch.no_grad():
            network(images)
        seen.append(noted)
    assert [level.shape[-1] for level in seen[1]] == [16, 8, 4, 2]
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one, two)
    assert program.watch is None


def test_only_passes_inside_the_block_are_noted_and_the_output_stays() -> None:
    network = SmallResNet(4).eval()
    images = torch.rand(2, 3, 16, 16)
    before = network(images)
    levels = levels_of(network, images)
    assert torch.equal(network(images), before)
    with levels.noted() as first:
        assert torch.equal(network(images), before)
    network(images)
    with levels.noted() as second:
        pass
    assert len(first) == 2
    assert second == []


def test_a_gradient_flows_from_a_level_to_the_images() -> None:
    network = SmallResNet(4).eval()
    levels = levels_of(network, torch.rand(1, 3, 16, 16))
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    with levels.noted() as seen:
        network(images)
    torch.autograd.backward(seen[0].square().sum())
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_networks_side_by_side_have_the_levels_of_each() -> None:
    networks, images = [SmallResNet(4).eval(), SmallResNet(6).eval()], torch.rand(2, 3, 16, 16)

    def look(images: torch.Tensor) -> None:
        for network in networks:
            network(images)

    levels = Levels(networks, look, images)
    with levels.noted() as seen:
        look(images)
    assert [level.shape[1] for level in seen] == [8, 16, 12, 24]
    assert len(levels.names) == 4


def test_a_network_without_maps_has_no_levels() -> None:
    class Flat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool2d(images, 1).flatten(1)

    flat = nn.Sequential(Flat(), nn.Linear(3, 4))
    assert levels_of(flat, torch.rand(1, 3, 8, 8)).names == []
