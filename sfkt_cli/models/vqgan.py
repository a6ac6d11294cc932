"""Translator ``vqgan``: a small vector-quantised autoencoder.

Source: VQGAN (Esser et al., CVPR 2021), whose reconstructions the paper shows beside its own; the
sizes, without attention and perceptual loss, are ours. The quantiser is written out because that
of vector-quantize-pytorch cannot be exported (its start depends on data).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli import losses
from sfkt_cli.distributed import from_all_processes


class Quantiser(nn.Module):
    """Replaces each vector by the nearest entry of a codebook; the gradient passes straight on.

    The codebook follows the vectors by moving means (VQ-VAE, van den Oord et al., NeurIPS 2017,
    Appendix A); entries that nothing uses start anew at vectors of the batch.

    Args:
        codes: Entries.
        size: Size of each code.
        decay: Decay of the moving means in a step.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, size: int, decay: float = 0.95) -> None:
        super().__init__()
        start = torch.randn(codes, size)
        self.register_buffer("codebook", start)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", start.clone())
        self._decay = decay

    def forward(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) to quantised (B, D, H, W) and the commitment term."""
        vectors = encoded.float().permute(0, 2, 3, 1)
        flat = vectors.reshape(-1, vectors.shape[-1])
        with torch.autocast(flat.device.type, enabled=False):
            # Squared distance less the part that all entries share; cdist cannot be exported.
            nearness = flat.detach() @ self.codebook.T - 0.5 * self.codebook.square().sum(dim=1)
            nearest = nearness.argmax(dim=1)
        codes = self.codebook[nearest].view(vectors.shape)
        if self.training:
            self._follow(flat.detach(), nearest)
        commitment = losses.commitment(vectors, codes)
        passed = vectors + (codes - vectors).detach()
        return passed.permute(0, 3, 1, 2), commitment

    @torch.no_grad()
    def _follow(self, vectors: Tensor, nearest: Tensor) -> None:
        vectors, nearest = from_all_processes(vectors), from_all_processes(nearest)
        # By index_add, not bincount: that asks for the largest index and waits for the GPU.
        ones = torch.ones_like(nearest, dtype=vectors.dtype)
        used = torch.zeros_like(self.counts).index_add_(0, nearest, ones)
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, vectors)
        self.counts.lerp_(used, 1 - self._decay)
        self.sums.lerp_(sums, 1 - self._decay)
        # Drawn on the CPU, so that a seed means the same on every device.
        drawn = vectors[torch.randint(len(vectors), (len(self.counts),)).to(vectors.device)]
        dead = self.counts < 0.1
        self.counts.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead.unsqueeze(1), drawn, self.sums))
        self.codebook.copy_(self.sums / self.counts.unsqueeze(1))


class VqganTranslator(nn.Module):
    """Encoder to a quarter of the resolution, quantiser, decoder without skips.

    Args:
        channels: Number of channels of the encoded target image.
        width: Channels w at half resolution; 2w below.
        codes: Entries of the codebook.
    """

    def __init__(self, channels: int, width: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_block(4 * channels, width, 1),
            *_block(width, 2 * width, 2),
            *_block(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, width, 1),
        )
        self.quantiser = Quantiser(codes, width)
        self.decoder = nn.Sequential(
            *_block(width, 2 * width, 1),
            *_block(2 * width, 2 * width, 1),
            nn.Upsample(scale_factor=2.0),
            *_block(2 * width, width, 1),
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


def _block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
