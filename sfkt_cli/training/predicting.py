"""Run a model over the rows of a store, in batches, in inference mode."""

from __future__ import annotations

from collections.abc import Callable
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
    with torch.inference_mode():
        for first in range(0, len(images), batch_size):
            stored = np.asarray(images[first : first + batch_size])
            views = [stored, stored[:, :, ::-1]] if flips else [stored]
            with runtime.autocast():
                seen = [model(load(view)) for view in views]
            features.append(torch.stack([f.float() for f, _ in seen]).mean(0).cpu())
            logits.append(torch.stack([z.float() for _, z in seen]).mean(0).cpu())
    return torch.cat(features), torch.cat(logits)


def through(translator: nn.Module, source: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The source model on translated images."""

    def model(encoded: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = source(translator(encoded))
        return features, logits

    return model
