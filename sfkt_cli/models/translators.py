"""Translators T: encoded target images to source-like RGB images in [0, 1].

TRANSLATORS maps the names of the configuration to the classes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.errors import ConfigError


class PointwiseTranslator(nn.Module):
    """The paper's T: a pointwise (fully connected) layer, batch norm and a convolution.

    Source: arXiv:2401.05014, TGMB. The sizes are ours.

    Args:
        channels: Of the encoded target image.
        width: Channels between the two layers.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]."""
        return torch.sigmoid(self.conv(torch.relu(self.norm(self.pointwise(encoded)))))


class UNetTranslator(nn.Module):
    """A U-Net that works from half resolution down: context at the price of a small classifier.

    Pixels are folded two by two into channels, three scales below add context, and the result is
    interpolated, which leaves no checkerboard. Source: Ronneberger et al., 2015, for the shape, with added skips; in place of
    the paper's pointwise T (ours).

    Args:
        channels: Of the encoded target image.
        width: Channels w at half resolution; 2w and 4w below.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = _convolutions(4 * channels, width)
        self.down1 = _convolutions(width, 2 * width)
        self.down2 = _convolutions(2 * width, 4 * width)
        self.narrow1 = nn.Conv2d(4 * width, 2 * width, 1)
        self.up1 = _convolutions(2 * width, 2 * width, layers=1)
        self.narrow2 = nn.Conv2d(2 * width, width, 1)
        self.up2 = _convolutions(width, width, layers=1)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]; edges are repeated to a multiple of 8."""
        height, width = encoded.shape[-2:]
        padded = F.pad(encoded, (0, -width % 8, 0, -height % 8), mode="replicate")
        half = self.enter(F.pixel_unshuffle(padded, 2))
        quarter = self.down1(F.max_pool2d(half, 2))
        eighth = self.down2(F.max_pool2d(quarter, 2))
        quarter = self.up1(quarter + F.interpolate(self.narrow1(eighth), scale_factor=2.0))
        half = self.up2(half + F.interpolate(self.narrow2(quarter), scale_factor=2.0))
        full = F.interpolate(half, scale_factor=2.0, mode="bilinear")
        return torch.sigmoid(self.leave(full)[..., :height, :width])


TRANSLATORS: dict[str, type[PointwiseTranslator] | type[UNetTranslator]] = {
    "pointwise": PointwiseTranslator,
    "unet": UNetTranslator,
}


def make_translator(name: str, *, channels: int, width: int) -> nn.Module:
    """The translator of that name.

    Raises:
        ConfigError: The name is not in TRANSLATORS.
    """
    if name not in TRANSLATORS:
        raise ConfigError(f"bridge.translator = {name!r}: choose one of {', '.join(TRANSLATORS)}")
    return TRANSLATORS[name](channels, width)


def _convolutions(channels_in: int, channels: int, layers: int = 2) -> nn.Sequential:
    sizes = [channels_in] + [channels] * layers
    blocks: list[nn.Module] = []
    for size_in, size in pairwise(sizes):
        blocks += [nn.Conv2d(size_in, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)]
        blocks.append(nn.ReLU())
    return nn.Sequential(*blocks)
