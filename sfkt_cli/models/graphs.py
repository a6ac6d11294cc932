"""Models as one graph, from the raw images of the sensor to class probabilities, for export."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.data.resample import Fit, areas, kept_box


class FitTarget(nn.Module):
    """Crop and area resampling as matrix products: :func:`sfkt_cli.data.resample.fit_target`.

    Its results are those of that function, to the last digit: float32 holds the sums of bytes
    exactly, in any order, and the division is one of whole numbers.

    Args:
        height: Of the sensor's images.
        width: Of the sensor's images.
        size: Side of the result in pixels.
        fit: crop or squash.
        missing: Whether 0 means "no reading".
    """

    down: Tensor
    across: Tensor
    count: Tensor

    def __init__(self, height: int, width: int, size: int, fit: Fit, *, missing: bool) -> None:
        super().__init__()
        left, upper, right, lower = kept_box(width, height, fit)
        self._box = (left, upper, right, lower)
        self._missing = missing
        self.register_buffer("down", _area_matrix(lower - upper, size))
        self.register_buffer("across", _area_matrix(right - left, size))
        self.register_buffer("count", torch.outer(self.down.sum(1), self.across.sum(1)).long())

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, H, W, C) to float32 (B, S, S) or (B, S, S, C), whole numbers."""
        left, upper, right, lower = self._box
        kept = images.to(torch.float32)[:, upper:lower, left:right]
        planes = kept.unsqueeze(1) if kept.ndim == 3 else kept.permute(0, 3, 1, 2)
        high = torch.floor(planes / 256)
        sums = 256 * self._sums(high) + self._sums(planes - 256 * high)
        readings = self._sums((planes > 0).to(torch.float32)) if self._missing else self.count
        whole = readings.clamp_min(1)
        mean = torch.div(2 * sums + whole, 2 * whole, rounding_mode="floor")
        mean = (mean * (2 * readings >= self.count)).to(torch.float32)
        return mean.squeeze(1) if kept.ndim == 3 else mean.permute(0, 2, 3, 1)

    def _sums(self, planes: Tensor) -> Tensor:
        across = F.linear(planes, self.across).transpose(2, 3)
        return F.linear(across, self.down).transpose(2, 3).to(torch.int64)


class StudentGraph(nn.Module):
    """Raw target images to logits and probabilities of the student.

    Logits are divided by the temperature in the probabilities only, as `sfkt predict` does it.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: Encoding,
        fit: nn.Module | None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.fit = fit or nn.Identity()
        self.model = model
        self._encoding = encoding
        self._temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) or (B, H, W, C) as the sensor gives them to twice (B, K)."""
        _, logits = self.model(as_rgb(encode(self.fit(images), self._encoding)))
        return logits, torch.softmax(logits / self._temperature, dim=1)


class BridgedSourceGraph(nn.Module):
    """Raw target images through the translator to the untouched RGB model's output."""

    def __init__(
        self, translator: nn.Module, source: nn.Module, encoding: Encoding, fit: nn.Module | None
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


class Half(nn.Module):
    """A copy of a network that reckons in float16, between float32 images and results."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives, in float32."""
        outputs = self.network(images.half())
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(each.float() for each in outputs)


def for_export(graph: nn.Module) -> nn.Module:
    """On the CPU, in inference mode, plain memory order, without gradients."""
    graph.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return graph.eval().requires_grad_(False)


def _area_matrix(length: int, size: int) -> Tensor:
    """(size, length): 1 where a pixel belongs to an area."""
    first, count = (torch.from_numpy(each).unsqueeze(1) for each in areas(length, size))
    pixels = torch.arange(length)
    return ((pixels >= first) & (pixels < first + count)).to(torch.float32)
