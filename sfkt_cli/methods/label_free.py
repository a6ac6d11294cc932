"""Scores that need no labels: they choose checkpoints, weigh teachers and warn of failures.

Bridge and transfer write the classes predicted after each epoch to ``epochs.npy``. Only
``evaluate`` compares them with labels, afterwards.

Logits are (N, K) and features (N, D) of N images. On TI pairs, ``logits`` and ``features`` are
those of a model on the (translated) target images, ``partner_logits`` and ``partner_features``
those of the source model on the RGB images.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.console import warn
from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.files import write_bytes
from sfkt_cli.scores import soft_neighbourhood_density
from sfkt_cli.settings.config import Config, LabelFree
from sfkt_cli.training.batches import divide_pairs
from sfkt_cli.training.predicting import View, predict_rows

SELECTORS: tuple[str, ...] = get_args(LabelFree)
EPOCHS_FILE = "epochs.npy"  # in the folder of a stage: the classes predicted after each epoch
STRANGERS_AMONG = 10_000  # the share of strangers is estimated on at most so many target images


def agreement(logits: Tensor, partner_logits: Tensor) -> float:
    """TI agreement: share of pairs for which both models name the same class."""
    return float((logits.argmax(dim=1) == partner_logits.argmax(dim=1)).float().mean())


def kappa(logits: Tensor, partner_logits: Tensor) -> float:
    """TI agreement beyond chance (Cohen's kappa): 0 is chance, 1 is full agreement.

    A model that names one class for all images agrees with the source model as often as that class
    is frequent; its kappa is 0.
    """
    first, second = (
        torch.bincount(part.argmax(dim=1), minlength=part.shape[1]).float() / len(part)
        for part in (logits, partner_logits)
    )
    chance = float(first @ second)
    return (agreement(logits, partner_logits) - chance) / max(1.0 - chance, 1e-6)


def partner_rank(features: Tensor, partner_features: Tensor) -> Tensor:
    """How well each target image finds its RGB partner among all of them, in [0, 1] (ours).

        rank_i = share of the j != i with cos(f_i, g_j) < cos(f_i, g_i), features less their mean

    0.5 is chance; 1: the partner is the nearest of all. Kappa only looks at the named class, which
    is mostly one of a few for task-irrelevant pairs. This looks at all that the source model sees,
    so a few dozen pairs tell two models apart. A single pair gets 0.5.

    Returns:
        (N,) ranks.
    """
    first, second = (
        torch.nn.functional.normalize(part.float() - part.float().mean(dim=0), dim=1)
        for part in (features, partner_features)
    )
    likeness = first @ second.T
    if len(likeness) < 2:
        return torch.full((len(likeness),), 0.5)
    return (likeness < likeness.diagonal()[:, None]).float().sum(dim=1) / (len(likeness) - 1)


def bridge_lead(
    bridged: Tensor, other: Tensor, partner_features: Tensor, groups: Sequence[str]
) -> float:
    """By how many standard errors the bridge sees better than another model (ours).

        lead = mean_i (rank_i(bridge) - rank_i(other)) / standard error

    The other model is the student. Above 0, target images find their RGB partners better behind the
    bridge than in the other model (:func:`partner_rank`). Pairs of one group, such as the frames of
    a recording, are alike, so the standard error is taken over groups. The lead is 0 for fewer than
    two groups.

    Args:
        bridged: (N, D) features of translated images of TI pairs that T was not trained on.
        other: (N, D) the other model's features of the same target images.
        partner_features: (N, D) the source model's features of their RGB partners.
        groups: (N,) names of the pairs' groups.
    """
    names, of_group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return 0.0
    before = partner_rank(other, partner_features)
    gains = (partner_rank(bridged, partner_features) - before).double()
    sums = torch.zeros(len(names), dtype=torch.double)
    sums.index_add_(0, torch.from_numpy(of_group), gains - gains.mean())
    error = math.sqrt(float(sums.square().sum()) * len(names) / (len(names) - 1)) / len(gains)
    return float(gains.mean()) / max(error, math.pow(len(gains), -1.5))


def stranger_share(features: Tensor, ti_features: Tensor) -> float | None:
    """About how many of the target images show none of the classes, in [0, 1]: a rough estimate.

        share = min_t P(s(x^TR) >= t) / P(s(x^TI) >= t), over t that a tenth of the TI images reach

    s is a ridge regression that tells TI from target images, on images that it was not fitted to
    (five folds). If strangers score as the TI images do, their share is at most this ratio at every
    t; but the smallest of many noisy ratios is mostly too small: with a true share of 0.2 the mean
    is 0.13 to 0.15 in a simulation. What looks unlike any TI image is not found. Where the source
    model hardly tells TI from target images, the estimate is too large (0.38 on the demo, without
    strangers).

    Source: Garg et al., NeurIPS 2021 (mixture proportion estimation), without the confidence term.

    Args:
        features: (N, D) features of the source model on target images; at most STRANGERS_AMONG of
            them are looked at.
        ti_features: (M, D) its features on the target images of TI pairs.

    Returns:
        The estimate; None for fewer than 50 images of either kind.
    """
    if min(len(features), len(ti_features)) < 50:
        return None
    features = features[spread(len(features), STRANGERS_AMONG)]
    both = torch.cat([features, ti_features]).double().cpu()
    both = (both - both.mean(dim=0)) / both.std(dim=0).clamp_min(1e-6)
    both = torch.cat([both, torch.ones(len(both), 1, dtype=torch.double)], dim=1)
    is_ti = (torch.arange(len(both)) >= len(features)).double()
    weights = torch.where(is_ti > 0, 0.5 / len(ti_features), 0.5 / len(features))
    penalty = 0.1 * torch.eye(both.shape[1], dtype=torch.double)
    inputs = torch.cat([both, is_ti[:, None]], dim=1)
    folds = [slice(fold, None, 5) for fold in range(5)]
    products = [(both[fold] * weights[fold, None]).T @ inputs[fold] for fold in folds]
    total, scores = torch.stack(products).sum(dim=0), torch.zeros(len(both), dtype=torch.double)
    for fold, own in zip(folds, products, strict=True):
        others = total - own
        scores[fold] = both[fold] @ torch.linalg.solve(others[:, :-1] + penalty, others[:, -1])
    target, ti = (part.sort().values for part in (scores[: len(features)], scores[len(features) :]))
    reached = ti[: len(ti) - len(ti) // 10]
    shares = [1 - torch.searchsorted(part, reached).double() / len(part) for part in (target, ti)]
    return min(1.0, float((shares[0] / shares[1]).min()))


def feature_distance(features: Tensor, partner_features: Tensor) -> float:
    """TI feature distance: mean squared difference, as a share of the partners' variance.

    0: the same features; 1: no better than the mean; 2: unrelated.
    """
    variance = partner_features.var(dim=0, correction=0).mean().clamp_min(1e-12)
    return float((features - partner_features).square().mean() / variance)


def information(logits: Tensor) -> float:
    """Mutual information of image and prediction, in nats: 0 .. log K, higher is better."""
    return -float(losses.information_maximisation(logits))


@dataclass(frozen=True)
class ScoringPairs:
    """The M TI pairs that score, and the source model's outputs on their RGB images."""

    rows: NDArray[np.int64]  # (M,) in transfer.h5
    target: NDArray[Any]  # (M, H, W[, C]) target images, as stored
    features: Tensor  # (M, D) of the RGB images
    logits: Tensor  # (M, K) of the RGB images
    groups: list[str]  # (M,) names of the pairs' groups
    unseen: bool  # whether this run trained nothing on them; there may be too few pairs for that

    def scores(self, features: Tensor, logits: Tensor) -> dict[str, float]:
        """The scores of a model by name, from its outputs on ``target``; larger is better."""
        return {
            "ti_agreement": agreement(logits, self.logits),
            "ti_kappa": kappa(logits, self.logits),
            "ti_rank": float(partner_rank(features, self.features).mean()),
            "ti_closeness": -feature_distance(features, self.features),
        }


def scoring_pairs(store: Store, source: View) -> ScoringPairs | None:
    """The held-out pairs of transfer.h5, as the source model sees them; None without pairs."""
    trained, rows = divide_pairs(store)
    if not len(rows):
        return None
    features, logits = predict_rows(store["ti/rgb"][rows], source)
    unseen = not np.isin(rows, trained).any()
    groups = np.array(store.strings("ti/group"))[rows].tolist()
    return ScoringPairs(rows, store["ti/target"][rows], features, logits, groups, unseen)


def target_scores(logits: Tensor, mirrored_logits: Tensor | None = None) -> dict[str, float]:
    """The scores on TR target images by name; larger is better.

    ``tr_mirror`` is the :func:`kappa` of images and their mirror images, if these are given (ours).
    A model that sees the class names it for both; a model that names one class for all images has
    0. A single image has no ``tr_density``.
    """
    values = {"tr_information": information(logits)}
    sample = logits[spread(len(logits))].softmax(dim=1).numpy()
    if len(sample) > 1:
        values["tr_density"] = soft_neighbourhood_density(sample)
    if mirrored_logits is not None:
        values["tr_mirror"] = kappa(logits, mirrored_logits)
    return values


def epoch_scorer(
    store: Store, pairs: ScoringPairs | None, view: View, folder: Path
) -> Callable[[int], dict[str, float]]:
    """A function that scores a model after an epoch, by target images and by held-out TI pairs.

    It also writes the epoch's predictions into the folder of the stage.
    """
    tr_target = store["target/target"][spread(store.count("target"))]

    def scores(epoch: int) -> dict[str, float]:
        _, logits = predict_rows(tr_target, view)
        _, mirrored = predict_rows(tr_target[:, :, ::-1], view)
        if view.runtime.main:
            write_epoch(folder, epoch, logits)
        values = target_scores(logits, mirrored)
        if pairs is not None:
            values |= pairs.scores(*predict_rows(pairs.target, view))
        return values

    return scores


def selector(config: Config, *, ti: bool, auto: str | None = None) -> str | None:
    """The score that chooses the epoch; None: the last epoch is kept.

    ``auto`` is the score for the setting ``auto``; ``ti`` says whether there are scores on TI
    pairs. Warns of settings that have no effect.
    """
    wanted, patience = config.training.select, config.training.patience
    chosen = auto if wanted == "auto" else wanted
    if chosen is not None and chosen.startswith("ti_") and not ti:
        warn(
            f"training.select={chosen}: there are no TI pairs to score on, so the last epoch is "
            "kept"
        )
        chosen = "last"
    if chosen not in (None, "last"):
        return chosen
    if patience:
        warn(
            f"training.patience={patience} stops nothing, because no score chooses the epoch: set "
            "training.select, such as tr_mirror, or leave it out"
        )
    return None


def write_epoch(folder: Path, epoch: int, logits: Tensor) -> None:
    """Write the classes predicted after an epoch as row ``epoch``, from 0; drop later rows.

    ``logits`` are (R, K) on the rows ``spread(N)`` of the target images.
    """
    predicted = logits.argmax(dim=1).numpy().astype(np.int16)[None]
    before = load_epochs(folder)[:epoch]
    alike = before.shape[1:] == predicted.shape[1:]
    rows = np.concatenate([before, predicted]) if alike else predicted
    written = io.BytesIO()
    np.save(written, rows)
    content = written.getvalue()
    write_bytes(folder / EPOCHS_FILE, content + hashlib.sha256(content).digest())


def load_epochs(folder: Path) -> NDArray[np.int16]:
    """Classes (E, R) predicted after each epoch of a stage; (0, 0) if there is no file."""
    path = folder / EPOCHS_FILE
    if not path.is_file():
        return np.zeros((0, 0), np.int16)
    content = path.read_bytes()
    file = io.BytesIO(content)
    try:
        predicted = np.asarray(np.load(file, allow_pickle=False), np.int16)
        expected = hashlib.sha256(content[: file.tell()]).digest()
        intact = predicted.ndim == 2 and file.read() == expected
    except Exception:  # damaged headers raise almost anything, such as tokenize.TokenError
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged: delete it; the report then lacks a table")
    return predicted
