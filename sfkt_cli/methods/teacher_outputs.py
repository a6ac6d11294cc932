"""What a transfer method may know: unlabelled images seen through frozen models. No labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfkt_cli.data.images import Encoding
from sfkt_cli.models.classifier import Classifier


@dataclass(frozen=True)
class Knowledge:
    """Frozen models and what they say, computed once.

    N target images (TR) and M TI pairs, in the order of transfer.h5, over an image and its mirror
    image; on the device.

    Attributes:
        source: The frozen source model.
        encoding: Of target images for the student.
        bridged_logits: (N, K), source model on translated TR images; None without a bridge.
        valid: (N,), share of valid pixels of each TR target image.
        ti_features: (M, D), source model on the RGB partners; None without TI pairs.
        ti_logits: (M, K), likewise.
        look: The student on all TR target images: features (N, D) and logits (N, K).
    """

    source: Classifier
    encoding: Encoding
    bridged_logits: Tensor | None
    valid: Tensor
    ti_features: Tensor | None
    ti_logits: Tensor | None
    look: Callable[[Classifier], tuple[Tensor, Tensor]]


def balance(probabilities: Tensor, *, strength: float, rounds: int = 20) -> Tensor:
    """Move predictions towards classes that are predicted too seldom.

    Rows and the mean over rows are scaled in turn (Sinkhorn) until the mean prediction is q^(1-s)
    normalised, q being the mean before: 0 leaves it as it is, 1 makes all classes alike frequent.

    Args:
        probabilities: (N, K), rows sum to 1.
        strength: s in [0, 1].
        rounds: Scalings.

    Returns:
        (N, K), rows sum to 1.
    """
    balanced = probabilities.clamp_min(1e-8)
    prior = balanced.mean(dim=0).pow(1.0 - strength)
    prior = prior / prior.sum()
    for _ in range(rounds):
        balanced = balanced * (prior / balanced.mean(dim=0))
        balanced = balanced / balanced.sum(dim=1, keepdim=True)
    return balanced


def reliability(
    names: Sequence[str], teacher: Tensor, views: tuple[Tensor, Tensor] | None, valid: Tensor
) -> Tensor:
    """How far each image's teacher is trusted: the product of some measures, mean 1 (ours).

    confidence  1 - H(teacher) / log K
    agreement   sum_k sqrt(p_k q_k) of the two views (Bhattacharyya); 1 where there is one view
    valid       share of target pixels with a reading

    Args:
        names: Of ``confidence``, ``agreement`` and ``valid``; none: every weight is 1.
        teacher: (N, K) probabilities.
        views: (N, K) probabilities of bridge and student.
        valid: (N,).

    Returns:
        (N,), not negative.
    """
    weights = torch.ones(len(teacher), device=teacher.device)
    if "confidence" in names:
        entropy = -torch.xlogy(teacher, teacher).sum(dim=1)
        weights = weights * (1.0 - entropy / math.log(max(teacher.shape[1], 2))).clamp_min(0.0)
    if "agreement" in names and views is not None:
        weights = weights * (views[0] * views[1]).sqrt().sum(dim=1)
    if "valid" in names:
        weights = weights * valid
    return weights / weights.mean().clamp_min(1e-8)


def cluster_labels(
    features: Tensor, logits: Tensor, *, rounds: int, euclidean: bool = False
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels from the clusters of the student's features.

    Features get a 1 appended and unit length; centroids start as means weighted by the predicted
    probabilities; each image takes the class of the nearest centroid in cosine. Further rounds take
    means of the hard assignments; then a class that nobody predicts, or without images, has no
    centroid from the first round on.

    Source: rounds = 1 is SHOT as released (Liang et al., ICML 2020, Eq. 5 and 6); rounds = 0 with
    ``euclidean`` is SOCKET as released.

    Args:
        features: (N, D).
        logits: (N, K).
        rounds: Repetitions with hard assignments.
        euclidean: The nearest centroid in Euclidean distance, centroids of whatever length.

    Returns:
        Labels (N,), and (N, K) cosine similarities or negative distances.
    """
    ones = torch.ones(len(features), 1, device=features.device)
    units = torch.nn.functional.normalize(torch.cat([features.float(), ones], dim=1))
    weights = logits.float().softmax(dim=1)
    if euclidean:
        means = weights.T @ units / weights.sum(dim=0).clamp_min(1e-8).unsqueeze(1)
        similarity = -torch.cdist(units, means)
        return similarity.argmax(dim=1), similarity
    similarity = units @ _centroids(units, weights).T
    unused = _hard(logits).sum(dim=0) == 0
    for _ in range(rounds):
        assigned = _hard(similarity.masked_fill(unused, -1.0))
        unused = unused | (assigned.sum(dim=0) == 0)
        similarity = (units @ _centroids(units, assigned).T).masked_fill(unused, -1.0)
    return similarity.argmax(dim=1), similarity


def _hard(scores: Tensor) -> Tensor:
    """Assignments (N, K), 1 at the largest of each row of scores (N, K)."""
    return torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).float()


def _centroids(units: Tensor, weights: Tensor) -> Tensor:
    """Centroids (K, D + 1) of unit length of units (N, D + 1) under weights (N, K)."""
    return torch.nn.functional.normalize(weights.T @ units)
