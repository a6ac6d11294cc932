"""Figures of merit, in numpy alone: of predictions, of translated pictures, of features.

Shapes: N samples, K classes, D features, H and W pixels. ``labels`` and ``predicted`` are class
indices (N,), ``probabilities`` are (N, K) with rows that sum to 1. Accuracies are fractions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[Any]
TINY = 1e-12
BINS = 15  # of confidence, in reliability diagrams and the calibration error
MANY = 60  # degrees of freedom from which on Student's t is taken for the same


def softmax(logits: Numbers) -> Floats:
    """Probabilities (N, K) of logits (N, K)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def confusion_matrix(predicted: Numbers, labels: Numbers, classes: int) -> NDArray[np.int64]:
    """Counts (K, K): true class down, predicted class across."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def class_recall(confusion: Numbers) -> Floats:
    """Share of each class that was recognised (K,); NaN for classes without a sample."""
    count = confusion.sum(axis=1)
    recall: Floats = np.where(count > 0, np.diag(confusion) / np.maximum(count, 1), np.nan)
    return recall


def accuracy(confusion: Numbers) -> float:
    """Share of right predictions."""
    return float(np.trace(confusion) / max(int(confusion.sum()), 1))


def balanced_accuracy(confusion: Numbers) -> float:
    """Mean recall over the classes that have samples: each class counts the same."""
    recall = class_recall(confusion)
    return float(recall[~np.isnan(recall)].mean())


def macro_f1(confusion: Numbers) -> float:
    """Mean F1 = 2 hits / (true + predicted) over the classes that occur as either."""
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    occurs = either > 0
    return float((2 * np.diag(confusion)[occurs] / either[occurs]).mean())


def reliability(
    probabilities: Numbers, labels: Numbers
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Confidence against accuracy in bins of equal width over (0, 1].

    Returns:
        Samples, mean confidence and accuracy of each bin (BINS,); empty bins hold 0.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    divisor = np.maximum(count, 1)
    mean_confidence: Floats = np.bincount(place, confidence, BINS) / divisor
    share_right: Floats = np.bincount(place, right.astype(np.float64), BINS) / divisor
    return count, mean_confidence, share_right


def fit_temperature(logits: Numbers, labels: Numbers, weights: Numbers) -> float:
    """The temperature by which logits (N, K) are divided so that probabilities mean most.

        T = argmin sum_i w_i (-log softmax(z_i / T)[y_i])

    In 0.03 .. 30, to 6 %; labels (N,) are class indices, weights (N,) how much each counts.
    Source: Guo et al., ICML 2017. Large: the model is surer than right. 1: nothing to mend.
    """
    temperatures = np.geomspace(1 / 30, 30, 121)
    rows = np.arange(len(labels))
    losses = [-weights @ np.log(softmax(logits / t)[rows, labels] + TINY) for t in temperatures]
    return round(float(temperatures[int(np.argmin(losses))]), 3)


def calibration_error(probabilities: Numbers, labels: Numbers) -> float:
    """Expected calibration error (ECE): mean gap of confidence and accuracy, weighted by bin.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017. 0: of predictions made with 80 %
    confidence 80 % are right; 1 - 1/K and more: certain and wrong.
    """
    count, confidence, right = reliability(probabilities, labels)
    return float((count * np.abs(confidence - right)).sum() / max(int(count.sum()), 1))


def share_interval(right: Numbers, groups: Numbers) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, with an effective number n of samples and Student's t.

        (p + t^2/2n -+ sqrt(t^2 p (1 - p) / n + (t^2/2n)^2)) / (1 + t^2/n),  n = p (1 - p) / V

    V is the cluster-robust variance of p, and at least that of independent samples: groups that
    happen to agree are no surer than their samples. t has G - 1 degrees of freedom. For p = 0 and
    p = 1, n is G. A single group says nothing about others: 0 .. 1.
    Source: Wilson, JASA 1927; Korn and Graubard, Survey Methodology 1998.

    Args:
        right: (N,) 1 for right and 0 for wrong.
        groups: (N,) integers, the same for samples of one of G groups, such as a scene.
    """
    share, count = float(right.mean()), len(np.unique(groups))
    if count < 2:
        return 0.0, 1.0
    variance, t = _variance((right - share) / len(right), groups)
    ratio = t**2 / (share * (1 - share) / variance if variance else count)
    reach = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4)
    low, high = ((share + (ratio / 2 + end)) / (1 + ratio) for end in (-reach, reach))
    return low, high


def difference_interval(gains: Numbers, groups: Numbers) -> tuple[float, float]:
    """95 % t interval of a mean paired difference, m -+ t sqrt(V); see :func:`share_interval`.

    ``gains`` (N,) are right (1) or wrong (0) of one method minus that of the other. The interval is
    cut at -1 and 1. A single group gives -1 .. 1.
    """
    if len(np.unique(groups)) < 2:
        return -1.0, 1.0
    mean = float(gains.mean())
    variance, t = _variance((gains - mean) / len(gains), groups)
    return _around(mean, t * math.sqrt(variance))


def _around(mean: float, reach: float) -> tuple[float, float]:
    """The interval mean -+ reach of a difference of shares, which lies in -1 .. 1."""
    return max(mean - reach, -1.0), min(mean + reach, 1.0)


def _variance(parts: Numbers, groups: Numbers) -> tuple[float, float]:
    """As :func:`_clustered`, but never below the variance of independent parts."""
    clustered, t = _clustered(parts, groups)
    return max(clustered, float((parts**2).sum())), t


def _clustered(parts: Numbers, groups: Numbers) -> tuple[float, float]:
    """Cluster-robust variance of the sum of parts (N,) of groups (N,), and t of so many groups."""
    _, places = np.unique(groups, return_inverse=True)
    sums = np.bincount(places, parts)
    degrees = max(len(sums) - 1, 1)
    return float((sums**2).sum() * len(sums) / degrees), student_t_quantile(min(degrees, MANY))


def difference_over_seeds(
    differences: Sequence[Numbers], groups: Sequence[Numbers]
) -> tuple[float, tuple[float, float] | None, float | None]:
    """Mean paired difference of two methods over seeds, with its 95 % t interval and p-value.

    m = mean_s d_s, interval m -+ sqrt(t(S - 1)^2 V_seeds + t(G - 1)^2 max(V_groups - V_cells, 0)),
    and at least m -+ sqrt(V_groups): seeds that happen to agree are no surer than their images. The
    interval is cut at -1 and 1. A single group in all seeds says nothing of others: -1 .. 1, p 1.
    V_seeds = var(d_s) / S holds the scatter of training and of drawing images anew. V_groups and
    V_cells are cluster-robust variances within seeds, by group (G of them) and by group and seed:
    the second lies in V_seeds already, the first is larger where seeds share images. Source:
    Cameron, Gelbach and Miller, JBES 2011 (two-way clusters); the two t, each with the degrees of
    freedom of its part, are ours.

    Args:
        differences: One array (N_s,) a seed: right (1) or wrong (0) of one method minus that of
            the other, image by image.
        groups: (N_s,) integers, the same number for images of one scene in whatever seed.

    Returns:
        Mean of the seeds' means; interval and two-sided p-value (below 0.05 where the interval
        leaves 0 out), None for one seed: that says nothing of the scatter of training.
    """
    means = np.array([values.mean() for values in differences])
    count, mean = len(means), float(means.mean())
    if count < 2:
        return mean, None, None
    parts = np.concatenate(
        [(values - values.mean()) / (len(values) * count) for values in differences]
    )
    seeds = np.repeat(np.arange(count), [len(values) for values in differences])
    names, scenes = np.unique(np.concatenate(list(groups)), return_inverse=True)
    if len(names) < 2:
        return mean, (-1.0, 1.0), 1.0
    of_seeds, usual = float(means.var(ddof=1)) / count, student_t_quantile(count - 1)
    of_images, other = _clustered(parts, scenes)
    of_scenes = max(of_images - _clustered(parts, seeds * len(names) + scenes)[0], 0.0)
    reach = math.hypot(usual * math.sqrt(of_seeds), other * math.sqrt(of_scenes))
    reach = max(reach, math.sqrt(of_images))
    p_value = 1 - student_t_within(usual * abs(mean) / max(reach, TINY), count - 1)
    return mean, _around(mean, reach), p_value


def student_t_within(t: float, degrees: int) -> float:
    """Probability that Student's t with so many degrees of freedom lies within -t .. t.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def student_t_quantile(degrees: int) -> float:
    """The t at which :func:`student_t_within` is 0.95, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        too_low = student_t_within(middle, degrees) < 0.95
        low, high = (middle, high) if too_low else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all comparisons of one table together.

    Sorted p_(1) <= ... <= p_(m) become max_{j <= i} min((m - j + 1) p_(j), 1). Source: Holm,
    Scandinavian Journal of Statistics 1979.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = highest
    return adjusted


def soft_neighbourhood_density(probabilities: Numbers) -> float:
    """Mean entropy of each sample's soft neighbourhood among the others, in nats.

    Predictions (N, K), N > 1, are put on the unit sphere, S = softmax_{j != i}(x_i . x_j / 0.05),
    and the score is mean_i H(S_i). Source: Saito et al., ICCV 2021. Large: predictions form dense
    clusters; small: scattered. Time and memory grow with N^2: pass at most some thousand rows.
    """
    unit = probabilities / np.linalg.norm(probabilities, axis=1, keepdims=True)
    similarity = (unit @ unit.T).astype(np.float64) / 0.05
    np.fill_diagonal(similarity, -np.inf)
    share = softmax(similarity)
    return float(-(share * np.log(np.maximum(share, TINY))).sum(axis=1).mean())


def geometric_mean(views: list[Numbers]) -> Floats:
    """Geometric mean (N, K) of several predictions (N, K) of the same samples, rows sum to 1."""
    return softmax(np.mean([np.log(np.maximum(view, TINY)) for view in views], axis=0))


def rank_correlation(first: Numbers, second: Numbers) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one of both is constant."""
    ranks = []
    for values in (first, second):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def psnr(pictures: Numbers, references: Numbers) -> Floats:
    """Peak signal-to-noise ratio (N,) in dB of pictures (N, H, W, C) in [0, 1].

    10: unlike; 20: the same scene, coarsely; 30 and more: hard to tell apart. Capped at 120.
    """
    difference = pictures.astype(np.float64) - references.astype(np.float64)
    error: Floats = np.square(difference).mean(axis=(1, 2, 3))
    decibels: Floats = -10 * np.log10(np.maximum(error, TINY))
    return decibels


def frechet_distance(first: Numbers, second: Numbers) -> float:
    """Fréchet distance of two sets of features (N, D), N > 1, each taken as a Gaussian.

    |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), in squared feature units. Source: Heusel et
    al., NeurIPS 2017, there with Inception features. 0: the same mean and covariance. With few
    samples against D it is biased upwards; compare only sets of equal size.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    gap = a.mean(axis=0) - b.mean(axis=0)
    cov_a = np.atleast_2d(np.cov(a, rowvar=False))
    cov_b = np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(max(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))
