"""Scores that need no labels: they choose checkpoints and warn of collapse."""

from __future__ import annotations

from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.scores import soft_neighbourhood_density


def agreement(logits: Tensor, partner_logits: Tensor) -> float:
    """TI agreement: share of pairs of which the model names the same class on both images.

    Args:
        logits: (N, K) on (translated) target images of TI pairs.
        partner_logits: (N, K) of the source model on their RGB partners.
    """
    return float((logits.argmax(dim=1) == partner_logits.argmax(dim=1)).float().mean())


def feature_distance(features: Tensor, partner_features: Tensor) -> float:
    """TI feature distance: mean squared difference, as a share of the partners' variance.

    0: the same features; 1: no better than always saying the mean; 2: unrelated.

    Args:
        features: (N, D) on (translated) target images of TI pairs.
        partner_features: (N, D) of the source model on their RGB partners.
    """
    variance = partner_features.var(dim=0, correction=0).mean().clamp_min(1e-12)
    return float((features - partner_features).square().mean() / variance)


def information(logits: Tensor) -> float:
    """Mutual information of image and prediction, in nats: 0 .. log K, higher is better.

    Args:
        logits: (N, K) on TR target images.
    """
    return -float(losses.information_maximisation(logits))


def density(logits: Tensor) -> float:
    """Soft neighbourhood density of the predictions, in nats, higher is better.

    Source: Saito et al., ICCV 2021.

    Args:
        logits: (N, K) on TR target images, N > 1.
    """
    return soft_neighbourhood_density(logits.softmax(dim=1).numpy())
