"""Translators T: encoded target images to source-like RGB images in [0, 1].

TRANSLATORS maps the names of the configuration to the classes.
"""

from __future__ import annotations

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
    """A U-Net of three scales: context to guess texture and light, skips to keep edges.

    Source: Ronneberger et al., 2015; in place of the paper's pointwise T (ours).

    Args:
        channels: Of the encoded target image.
        width: Channels w at full resolution; 2w and 4w below.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = _convolutions(channels, width)
        self.down1 = _convolutions(width, 2 * width)
        self.down2 = _convolutions(2 * width, 4 * width)
        self.up1 = _convolutions(4 * width + 2 * width, 2 * width)
        self.up2 = _convolutions(2 * width + width, width)
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]; any H and W from 4."""
        full = self.enter(encoded)
        half = self.down1(F.max_pool2d(full, 2))
        quarter = self.down2(F.max_pool2d(half, 2))
        half = self.up1(torch.cat([_resize_like(quarter, half), half], dim=1))
        full = self.up2(torch.cat([_resize_like(half, full), full], dim=1))
        return torch.sigmoid(self.leave(full))


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


def _convolutions(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _resize_like(activations: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(activations, size=other.shape[-2:], mode="nearest")
