"""Models as one graph, from the raw images of the sensor to class probabilities, for export."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.data.resample import VALID_SHARE, Fit, kept_box
from sfkt_cli.models.classifier import Classifier


class FitTarget(nn.Module):
    """Crop and area resampling as matrix products: :func:`sfkt_cli.data.resample.fit_target`.

    Args:
        height: Of the sensor's images.
        width: Of the sensor's images.
        size: Side of the result in pixels.
        fit: crop or squash.
        missing: Whether 0 means "no reading".
    """

    down: Tensor
    across: Tensor

    def __init__(self, height: int, width: int, size: int, fit: Fit, *, missing: bool) -> None:
        super().__init__()
        left, upper, right, lower = kept_box(width, height, fit)
        self._box = (left, upper, right, lower)
        self._missing = missing
        self.register_buffer("down", _area_matrix(lower - upper, size))
        self.register_buffer("across", _area_matrix(right - left, size))

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, H, W, C) to float32 (B, S, S) or (B, S, S, C), whole numbers."""
        left, upper, right, lower = self._box
        kept = images.to(torch.float32)[:, upper:lower, left:right]
        planes = kept.unsqueeze(1) if kept.ndim == 3 else kept.permute(0, 3, 1, 2)
        mean = self._mean(planes)
        if self._missing:
            share = self._mean((planes > 0).to(torch.float32))
            enough = (share >= VALID_SHARE - 1e-4).to(torch.float32)
            mean = enough * mean / share.clamp_min(1e-6)
        mean = torch.round(mean)
        return mean.squeeze(1) if kept.ndim == 3 else mean.permute(0, 2, 3, 1)

    def _mean(self, planes: Tensor) -> Tensor:
        across = F.linear(planes, self.across).transpose(2, 3)
        return F.linear(across, self.down).transpose(2, 3)


class StudentGraph(nn.Module):
    """Raw target images to logits and probabilities of the student."""

    def __init__(self, model: Classifier, encoding: Encoding, fit: nn.Module | None) -> None:
        super().__init__()
        self.fit = fit or nn.Identity()
        self.model = model
        self._encoding = encoding

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) or (B, H, W, C) as the sensor gives them to twice (B, K)."""
        _, logits = self.model(as_rgb(encode(self.fit(images), self._encoding)))
        return logits, torch.softmax(logits, dim=1)


class BridgedSourceGraph(nn.Module):
    """Raw target images through the translator to the untouched RGB model's output."""

    def __init__(
        self, translator: nn.Module, source: Classifier, encoding: Encoding, fit: nn.Module | None
    ) -> None:
        super().__init__()
        self.fit = fit or nn.Identity()
        self.translator = translator
        self.source = source
        self._encoding = encoding

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) or (B, H, W, C) as the sensor gives them to twice (B, K)."""
        _, logits = self.source(self.translator(encode(self.fit(images), self._encoding)))
        return logits, torch.softmax(logits, dim=1)


def for_export(graph: nn.Module) -> nn.Module:
    """On the CPU, in inference mode, plain memory order, without gradients."""
    graph.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return graph.eval().requires_grad_(False)


def _area_matrix(length: int, size: int) -> Tensor:
    """(size, length) weights of Pillow's box filter, taken from Pillow itself."""
    unit: Any = Image.fromarray(np.eye(length, dtype=np.float32))
    resized = unit.resize((length, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(resized, dtype=np.float32))
