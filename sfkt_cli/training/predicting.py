"""Run a model over the rows of a store, in batches, in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.data.images import Encoding, as_rgb, encode, rgb_to_float
from sfkt_cli.training.runtime import Runtime

Loader = Callable[[NDArray[Any]], Tensor]


def rgb_loader(runtime: Runtime) -> Loader:
    """Stored RGB (B, H, W, 3) to model input (B, 3, H, W) on the device."""
    return lambda rgb: rgb_to_float(runtime.tensor(rgb))


def target_loader(runtime: Runtime, encoding: Encoding) -> Loader:
    """Stored target images to encoded ones (B, C, H, W) on the device."""
    return lambda stored: encode(runtime.tensor(stored), encoding)


def student_loader(runtime: Runtime, encoding: Encoding) -> Loader:
    """Stored target images to what an RGB-shaped classifier takes (B, 3, H, W)."""
    return lambda stored: as_rgb(encode(runtime.tensor(stored), encoding))


def predict_rows(
    images: NDArray[Any],
    load: Loader,
    model: Callable[[Tensor], tuple[Tensor, Tensor]],
    runtime: Runtime,
    *,
    flips: bool = False,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of all rows, float32, on the CPU.

    Several processes take turns batch by batch, and all of them get everything; they must all ask.

    Args:
        images: (N, H, W[, C]) stored images, such as a memory map.
        load: Stored to model input.
        model: Model input to features and logits.
        runtime: Device and precision.
        flips: Average over each image and its mirror image; the stored image is mirrored, since
            some encodings (surface normals) look different behind a mirror.
        batch_size: Rows at a time.
    """
    features, logits = [], []
    firsts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for first in firsts[runtime.rank :: runtime.world]:
            stored = np.asarray(images[first : first + batch_size])
            views = [stored, stored[:, :, ::-1]] if flips else [stored]
            with runtime.autocast():
                seen = [model(load(view)) for view in views]
            features.append(torch.stack([f.float() for f, _ in seen]).mean(0).cpu())
            logits.append(torch.stack([z.float() for _, z in seen]).mean(0).cpu())
    if runtime.world == 1:
        return torch.cat(features), torch.cat(logits)
    whole = _Whole(len(images), batch_size, runtime)
    return whole.gather(features), whole.gather(logits)


@dataclass(frozen=True)
class _Whole:
    """Puts the batches of all processes together; each row is seen by exactly one of them."""

    count: int
    batch_size: int
    runtime: Runtime

    def gather(self, parts: list[Tensor]) -> Tensor:
        width = max(self.runtime.gather(parts[0].shape[1] if parts else 0))
        rows = torch.zeros(self.count, width)
        firsts = range(0, self.count, self.batch_size)[self.runtime.rank :: self.runtime.world]
        for first, part in zip(firsts, parts, strict=True):
            rows[first : first + len(part)] = part
        return self.runtime.sum(rows)


def through(translator: nn.Module, source: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The source model on translated images."""

    def model(encoded: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = source(translator(encoded))
        return features, logits

    return model
