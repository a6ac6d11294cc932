"""Do predictions look like those of a model that works, on images prepared as it expects them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfkt_cli.console import warn

COLLAPSED_SHARE = 0.9
"""A larger share of images in one class is a sign of wrong preprocessing."""
NEARLY_UNIFORM = 0.97
"""A mean entropy above this share of its maximum is one, too."""
FEWEST = 20
"""Of fewer images nothing can be said."""


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


def collapse_warning(
    predictions: Predictions,
    classes: Sequence[str],
    model: str = "the source model",
    images: str = "TI RGB images",
    advice: str = "are source.mean and source.std those that the model was trained with?",
) -> str | None:
    """What is suspicious about a model's predictions, if anything is.

    Args:
        predictions: Predictions of the model.
        classes: Their names.
        model: What the message calls the model.
        images: What it calls the images.
        advice: What to do.
    """
    top = max(predictions.histogram)
    if len(classes) > 1 and top > COLLAPSED_SHARE:
        name = classes[predictions.histogram.index(top)]
        return f"{model} calls {100 * top:.0f} % of the {images} {name!r}: {advice}"
    if predictions.entropy > NEARLY_UNIFORM * predictions.largest_entropy:
        return (
            f"{model} is unsure of the {images} (mean entropy "
            f"{predictions.entropy:.2f} nats of {predictions.largest_entropy:.2f}): {advice}"
        )
    return None


COLLAPSED = {
    "bridge": "if your images are more varied, no student can learn from it: record more TI pairs, "
    "or such that look more like your target images, or train longer (bridge.epochs)",
    "transfer": "if your images are more varied, it has collapsed: do not ship it; record more TI "
    "pairs, train the bridge longer or try another --method",
    "evaluate": "if your images are more varied, it has collapsed: do not ship it",
    "predict": "if they are more varied, the student has collapsed, or these images are unlike "
    "those that it was trained on: look at the report of `sfkt evaluate`",
}
"""What to do, by stage, where one class takes nearly all."""


def warn_of_collapse(
    logits: Tensor, classes: Sequence[str], model: str, images: str, stage: str
) -> None:
    """Warn where logits (N, K) of enough images say nearly always the same, or nothing at all."""
    if len(logits) >= FEWEST:
        predictions = describe_predictions(logits)
        message = collapse_warning(predictions, classes, model, images, COLLAPSED[stage])
        if message:
            warn(message)
