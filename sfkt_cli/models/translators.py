"""Translators T: encoded target images to source-like RGB images in [0, 1].

TRANSLATORS maps the names of the configuration to the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.images import as_rgb
from sfkt_cli.errors import ConfigError
from sfkt_cli.models.vqgan import VqganTranslator


class PointwiseTranslator(nn.Module):
    """The paper's T: a pointwise (fully connected) layer, batch norm and a convolution.

    Source: arXiv:2401.05014, TGMB. The sizes are ours.

    Args:
        channels: Number of channels of the encoded target image.
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


class IdentityTranslator(nn.Module):
    """The encoded image as it is: what is kept where a trained T makes things worse (ours).

    Args:
        channels: Number of channels of the encoded target image.
        width: Not used.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        del channels, width

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]."""
        return as_rgb(encoded)


class UNetTranslator(nn.Module):
    """The paper's pointwise T for detail, and a U-Net from half resolution down for context.

    Pixels are folded two by two into channels, three scales below add context, and the result is
    interpolated, which leaves no checkerboard, and added to a pointwise layer at full resolution.
    Source: arXiv:2401.05014, TGMB, for the pointwise layer and the convolution behind it;
    Ronneberger et al., 2015, for the shape of the rest, with added skips (ours).

    Args:
        channels: Number of channels of the encoded target image.
        width: Channels w at full and half resolution; 2w and 4w below.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.detail = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.enter = _convolutions(4 * channels, width)
        self.down1 = _convolutions(width, 2 * width)
        self.down2 = _convolutions(2 * width, 4 * width)
        self.narrow1 = nn.Conv2d(4 * width, 2 * width, 1)
        self.up1 = _convolutions(2 * width, 2 * width, layers=1)
        self.narrow2 = nn.Conv2d(2 * width, width, 1)
        self.up2 = _convolutions(width, width, layers=1)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]; any H and W."""
        height, width = encoded.shape[-2:]
        padded = F.pad(encoded, (0, -width % 8, 0, -height % 8), mode="replicate")
        half = self.enter(F.pixel_unshuffle(padded, 2))
        quarter = self.down1(F.max_pool2d(half, 2))
        eighth = self.down2(F.max_pool2d(quarter, 2))
        quarter = self.up1(quarter + F.interpolate(self.narrow1(eighth), scale_factor=2.0))
        half = self.up2(half + F.interpolate(self.narrow2(quarter), scale_factor=2.0))
        full = F.interpolate(half, scale_factor=2.0, mode="bilinear")
        return torch.sigmoid(self.leave(full[..., :height, :width] + self.detail(encoded)))


class Front(nn.Module):
    """A frozen translator in front of an RGB classifier, for students that see translated images.

    Args:
        translator: T; stays in inference mode, whatever becomes of the classifier behind it.
        channels: Number of channels of the encoded image: 1 or 3, what ``as_rgb`` keeps whole.
    """

    def __init__(self, translator: nn.Module, channels: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ConfigError(
                f"target images of {channels} encoded channels cannot be translated in front of a "
                "student: choose an encoding of 1 or 3"
            )
        self.translator = translator.requires_grad_(False)
        self._channels = channels
        self.train(False)

    def train(self, mode: bool = True) -> Front:
        """Nothing wakes the translator's batch norms."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encoded target images as RGB (B, 3, H, W) to translated ones (B, 3, H, W)."""
        with torch.no_grad():
            bridged: Tensor = self.translator(images[:, : self._channels])
        return bridged


TRANSLATORS: dict[str, Callable[..., nn.Module]] = {
    "identity": IdentityTranslator,
    "pointwise": PointwiseTranslator,
    "unet": UNetTranslator,
    "vqgan": VqganTranslator,
}


def make_translator(name: str, *, channels: int, width: int, **more: int) -> nn.Module:
    """The translator of that name.

    Args:
        name: Key of TRANSLATORS.
        channels: Number of channels of the encoded target image.
        width: Width of its first layer.
        more: Sizes that this translator alone has.

    Raises:
        ConfigError: The name is not in TRANSLATORS.
    """
    if name not in TRANSLATORS:
        raise ConfigError(f"bridge.translator = {name!r}: choose one of {', '.join(TRANSLATORS)}")
    return TRANSLATORS[name](channels, width, **more)


def _convolutions(channels_in: int, channels: int, layers: int = 2) -> nn.Sequential:
    sizes = [channels_in] + [channels] * layers
    blocks: list[nn.Module] = []
    for size_in, size in pairwise(sizes):
        blocks += [nn.Conv2d(size_in, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)]
        blocks.append(nn.ReLU())
    return nn.Sequential(*blocks)
