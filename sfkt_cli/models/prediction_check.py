"""Do predictions look like those of a model whose images are prepared as it expects them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLLAPSED_SHARE = 0.9
"""So many images in one class are a sign of wrong preprocessing."""
NEARLY_UNIFORM = 0.97
"""So is a mean entropy above this share of its maximum."""


@dataclass(frozen=True)
class Predictions:
    """How sure and how varied predictions are.

    Attributes:
        entropy: Mean over the images, in nats.
        largest_entropy: log K, that of a uniform prediction.
        histogram: Share of the images in each class, (K,).
    """

    entropy: float
    largest_entropy: float
    histogram: list[float]


def describe_predictions(logits: Tensor) -> Predictions:
    """Mean entropy and class histogram of logits (N, K)."""
    log_shares = torch.log_softmax(logits.float(), 1)
    entropy = -(log_shares.exp() * log_shares).sum(1).mean()
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    histogram = (counts / max(len(logits), 1)).tolist()
    return Predictions(float(entropy), math.log(logits.shape[1]), histogram)


def collapse_warning(predictions: Predictions, classes: Sequence[str]) -> str | None:
    """What is suspicious about a source model's predictions on TI RGB images, if anything is."""
    top = max(predictions.histogram)
    advice = "are source.mean and source.std those that the model was trained with?"
    if len(classes) > 1 and top > COLLAPSED_SHARE:
        name = classes[predictions.histogram.index(top)]
        return f"the source model calls {100 * top:.0f} % of the TI RGB images {name!r}: {advice}"
    if predictions.entropy > NEARLY_UNIFORM * predictions.largest_entropy:
        return (
            f"the source model is unsure of the TI RGB images (mean entropy "
            f"{predictions.entropy:.2f} nats of {predictions.largest_entropy:.2f}): {advice}"
        )
    return None
