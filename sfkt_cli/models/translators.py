"""Translators T: encoded target images to source-like RGB images in [0, 1].

TRANSLATORS maps the names of the configuration to the classes. Each takes the number of channels of
the encoded target image, and the width w of its first layer.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli import losses
from sfkt_cli.data.images import as_rgb
from sfkt_cli.distributed import from_all_processes
from sfkt_cli.errors import ConfigError

DECAY = 0.95  # of a codebook's moving means, in each step


class PointwiseTranslator(nn.Module):
    """The paper's T: a pointwise (fully connected) layer, batch norm and a convolution.

    Source: arXiv:2401.05014, TGMB. The sizes are ours.
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
    """The encoded image as it is: what is kept where a trained T makes things worse (ours)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        del channels, width

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]."""
        return as_rgb(encoded)


class UNetTranslator(nn.Module):
    """The paper's pointwise T for detail, and a U-Net from half resolution down for context.

    It has w channels at full and half resolution, 2w and 4w below. Pixels are folded two by two
    into channels, three scales below add context, and the result is interpolated, which leaves no
    checkerboard, and added to a pointwise layer at full resolution.
    Source: arXiv:2401.05014, TGMB, for the pointwise layer and the convolution behind it;
    Ronneberger et al., 2015, for the shape of the rest, with added skips (ours).
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


class Quantiser(nn.Module):
    """Replaces each vector by the nearest entry of a codebook; the gradient passes straight on.

    The codebook follows the vectors by moving means (VQ-VAE, van den Oord et al., NeurIPS 2017,
    Appendix A); entries that nothing uses start anew at vectors of the batch. It is written out
    because that of vector-quantize-pytorch cannot be exported (its start depends on data).
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        start = torch.randn(codes, size)
        self.register_buffer("codebook", start)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", start.clone())

    def forward(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) to quantised (B, D, H, W) and the commitment term."""
        vectors = encoded.float().permute(0, 2, 3, 1)
        flat = vectors.reshape(-1, vectors.shape[-1])
        codebook = self.codebook.float()
        with torch.autocast(flat.device.type, enabled=False):
            # Squared distance less the part that all entries share; cdist cannot be exported.
            nearness = flat.detach() @ codebook.T - 0.5 * codebook.square().sum(dim=1)
            nearest = nearness.argmax(dim=1)
        codes = codebook[nearest].view(vectors.shape)
        if self.training:
            self._follow(flat.detach(), nearest)
        commitment = losses.commitment(vectors, codes)
        passed = vectors + (codes - vectors).detach()
        return passed.permute(0, 3, 1, 2).to(self.codebook.dtype), commitment

    @torch.no_grad()
    def _follow(self, vectors: Tensor, nearest: Tensor) -> None:
        vectors, nearest = from_all_processes(vectors), from_all_processes(nearest)
        # By index_add, not bincount: that asks for the largest index and waits for the GPU.
        ones = torch.ones_like(nearest, dtype=vectors.dtype)
        used = torch.zeros_like(self.counts).index_add_(0, nearest, ones)
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, vectors)
        self.counts.lerp_(used, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        # Drawn on the CPU, so that a seed means the same on every device.
        drawn = vectors[torch.randint(len(vectors), (len(self.counts),)).to(vectors.device)]
        dead = self.counts < 0.1
        self.counts.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead.unsqueeze(1), drawn, self.sums))
        self.codebook.copy_(self.sums / self.counts.unsqueeze(1))


class VqganTranslator(nn.Module):
    """A small vector-quantised autoencoder: to a quarter of the resolution and back, without skips.

    Source: VQGAN (Esser et al., CVPR 2021), whose reconstructions the paper shows beside its own;
    the sizes, w channels at half resolution and 2w below, without attention and perceptual loss,
    are ours.
    """

    def __init__(self, channels: int, width: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_block(4 * channels, width),
            *_block(width, 2 * width, 2),
            *_block(2 * width, 2 * width),
            nn.Conv2d(2 * width, width, 1),
        )
        self.quantiser = Quantiser(codes, width)
        self.decoder = nn.Sequential(
            *_block(width, 2 * width),
            *_block(2 * width, 2 * width),
            nn.Upsample(scale_factor=2.0),
            *_block(2 * width, width),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]; edges are repeated to fit."""
        return self.translate(encoded)[0]

    def translate(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """The translation (B, 3, H, W), and the commitment term."""
        height, width = encoded.shape[-2:]
        padded = F.pad(encoded, (0, -width % 4, 0, -height % 4), mode="replicate")
        quantised, commitment = self.quantiser(self.encoder(padded))
        bridged = torch.sigmoid(self.decoder(quantised)[..., :height, :width])
        return bridged, commitment


def patch_discriminator(width: int = 32) -> nn.Sequential:
    """Tells real from translated by overlapping patches of 22 pixels: (B, 3, H, W) to (B, 1, h, w).

    Source: pix2pix (Isola et al., CVPR 2017), smaller (ours). No batch norm: the two kinds of
    pictures come in batches of their own.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 4, 1, 1),
    )


class Front(nn.Module):
    """A frozen translator in front of an RGB classifier, for students that see translated images.

    Whatever becomes of the classifier, the translator stays in inference mode. It takes the first
    ``channels`` of the encoded image: 1 or 3, what ``as_rgb`` keeps whole.
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

    def train(self, mode: bool = True) -> Self:
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
    """The translator of that name; ``more`` are sizes that it alone has.

    Raises ConfigError if the name is not in TRANSLATORS.
    """
    if name not in TRANSLATORS:
        raise ConfigError(f"bridge.translator = {name!r}: choose one of {', '.join(TRANSLATORS)}")
    return TRANSLATORS[name](channels, width, **more)


def _convolutions(channels_in: int, channels: int, layers: int = 2) -> nn.Sequential:
    sizes = [channels_in] + [channels] * layers
    return nn.Sequential(*(part for pair in pairwise(sizes) for part in _block(*pair)))


def _block(channels_in: int, channels: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
