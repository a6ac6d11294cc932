"""Feature maps: the right modules, recorded only where that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfkt_cli.models.backbones import SmallResNet, make_backbone
from sfkt_cli.models.frozen import FeatureMaps
from sfkt_cli.models.onnx_network import OnnxNetwork


def feature_maps_of(network: nn.Module, images: torch.Tensor) -> FeatureMaps:
    return FeatureMaps([network], network, images)


def test_a_level_is_the_last_module_of_a_resolution_of_a_quarter_and_below() -> None:
    network = SmallResNet(4).eval()
    feature_maps = feature_maps_of(network, images := torch.rand(2, 3, 32, 32))
    assert feature_maps.names == ["stages.1", "stages"]
    with feature_maps.recording() as seen:
        network(images)
    assert [tuple(level.shape) for level in seen] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert feature_maps.variances == pytest.approx([level.var().item() for level in seen])


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"]),  # shares activations
        ("mobilenet_v3_small", ["features.1", "features.3", "features.8", "features"]),
        ("densenet121", [*(f"features.denseblock{n}" for n in (1, 2, 3)), "features"]),
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features"]),
    ],
)
def test_the_levels_of_networks_of_torchvision_are_the_ends_of_their_stages(
    name: str, ends: list[str]
) -> None:
    network, _ = make_backbone(name, width=0, pretrained=False)
    feature_maps = feature_maps_of(network.eval(), images := torch.rand(2, 3, 64, 64))
    assert feature_maps.names == ends
    with feature_maps.recording() as seen, torch.no_grad():
        network(images)
    assert [level.shape[-1] for level in seen] == [16, 8, 4, 2]
    assert len(feature_maps.variances) == 4


class Padded(nn.Module):
    """Pads before it strides, and uses one activation everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.activation = nn.ZeroPad2d(1), nn.ReLU()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        coarse = self.conv2(self.pad(self.activation(self.conv1(self.activation(images)))))
        return torch.flatten(self.activation(coarse), 1)


def test_a_module_is_a_level_at_one_of_its_calls_and_padding_at_none() -> None:
    network, images = Padded().eval(), torch.rand(2, 3, 32, 32)
    feature_maps = feature_maps_of(network, images)
    with feature_maps.recording() as seen:
        network(images)
    assert feature_maps.names == ["activation", "activation"]
    assert [tuple(level.shape) for level in seen] == [(2, 4, 8, 8), (2, 6, 4, 4)]


def test_an_onnx_network_has_levels_of_whole_batches() -> None:
    strided = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    network = OnnxNetwork(
        nodes=[
            ["Conv", ["images", "w"], ["a"], strided], ["Conv", ["a", "v"], ["b"], strided],
            ["Relu", ["b"], ["c"], {}], ["Conv", ["c", "v"], ["d"], strided],
            ["ReduceMean", ["d", [2, 3]], ["f"], {"keepdims": 0}],
        ],
        input="images", output="f", channels_last=False, norms=[], features=4,
        tensors={"w": [[4, 3, 3, 3], "float32", True], "v": [[4, 4, 3, 3], "float32", True]},
    ).eval()  # fmt: skip
    images = torch.rand(3, 3, 32, 32)
    feature_maps = feature_maps_of(network, images)
    with feature_maps.recording() as seen, torch.no_grad():
        network(images)
    assert feature_maps.names == ["c Relu", "d Conv"]
    assert [tuple(level.shape) for level in seen] == [(3, 4, 8, 8), (3, 4, 4, 4)]
    assert network.watch is None


def test_only_passes_inside_the_block_are_noted_and_the_output_stays() -> None:
    network = SmallResNet(4).eval()
    images = torch.rand(2, 3, 16, 16)
    before = network(images)
    feature_maps = feature_maps_of(network, images)
    assert torch.equal(network(images), before)
    with feature_maps.recording() as first:
        assert torch.equal(network(images), before)
    network(images)
    with feature_maps.recording() as second:
        pass
    assert len(first) == 2
    assert second == []


def test_a_gradient_flows_from_a_level_to_the_images() -> None:
    network = SmallResNet(4).eval()
    feature_maps = feature_maps_of(network, torch.rand(1, 3, 16, 16))
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    with feature_maps.recording() as seen:
        network(images)
    torch.autograd.backward(seen[0].square().sum())
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_networks_side_by_side_have_the_levels_of_each() -> None:
    networks, images = [SmallResNet(4).eval(), SmallResNet(6).eval()], torch.rand(2, 3, 16, 16)

    def look(images: torch.Tensor) -> None:
        for network in networks:
            network(images)

    feature_maps = FeatureMaps(networks, look, images)
    with feature_maps.recording() as seen:
        look(images)
    assert [level.shape[1] for level in seen] == [8, 16, 12, 24]
    assert len(feature_maps.names) == 4


def test_a_network_without_maps_has_no_levels() -> None:
    class Flat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool2d(images, 1).flatten(1)

    flat = nn.Sequential(Flat(), nn.Linear(3, 4))
    assert feature_maps_of(flat, torch.rand(1, 3, 8, 8)).names == []
