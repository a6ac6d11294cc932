"""What every transfer method has, and what it may look at: unlabelled images through frozen models.

CONTRIBUTING.md says how to add a method. Several methods share two ways to learn from the target
images alone: clusters, and a bank of neighbours.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.data.store import Store
from sfkt_cli.distributed import from_all_processes
from sfkt_cli.methods import label_free
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.frozen import fold_batch_norms
from sfkt_cli.models.saving import Saved
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Objective
from sfkt_cli.training.predicting import View, adapt_batch_norms, predict_rows
from sfkt_cli.training.runtime import Runtime


class TeacherOutputs:
    """Frozen models, their outputs on the unlabelled images, and ways to look at a student.

    There are N target images (TR) and M TI pairs, in the order of transfer.h5. Outputs are means
    over an image and its mirror image, and lie on the device.

    Args:
        store: The prepared transfer.h5.
        source: The frozen source model.
        translator: The bridge's translator; None: no bridge.
        encoding: Encoding of target images for the student.
        runtime: Device and precision.
        pairs: The TI pairs that score; None without pairs.
        ti: Whether the pairs are looked at.
    """

    ti_features: Tensor  # (M, D), source model on RGB partners; only with ``ti``
    bridged_logits: Tensor  # (N, K), source model on translated TR images; only with a bridge

    def __init__(
        self,
        store: Store,
        source: Classifier,
        translator: Saved | None,
        encoding: Encoding,
        runtime: Runtime,
        pairs: label_free.ScoringPairs | None,
        *,
        ti: bool,
    ) -> None:
        self.source = source
        self.encoding = encoding
        self.targets = store.count("target")  # N
        self.groups: list[str] = []  # groups of the held-out pairs that can judge the bridge
        self._store, self._runtime = store, runtime
        # Pairs that can prove something of the bridge, and features (H, D) of them, translated.
        self._proof: tuple[label_free.ScoringPairs, Tensor] | None = None
        targets = store["target/target"]
        quick = fold_batch_norms(source, targets.shape[1])
        if ti:
            rgb = store["ti/rgb"]
            partners, _ = predict_rows(rgb, View(runtime, quick), flips=True)
            self.ti_features = partners.to(runtime.device)
        if translator is not None:
            its_own = translator.encoding_of("bridge")
            view = View(runtime, quick, its_own, freeze(translator.module))
            _, bridged = predict_rows(targets, view, flips=True)
            self.bridged_logits = bridged.to(runtime.device)
            if ti and pairs is not None and pairs.unseen:
                self.groups = pairs.groups
                self._proof = pairs, predict_rows(pairs.target, view, flips=True)[0]

    def predict(self, images: NDArray[Any], student: Classifier) -> tuple[Tensor, Tensor]:
        """A student's features and logits of stored target images (n, H, W[, C]), on the CPU."""
        training = student.training
        view = View(self._runtime, student.eval(), self.encoding)
        outputs = predict_rows(images, view, flips=True)
        student.train(training)
        return outputs

    def predict_all(self, student: Classifier) -> tuple[Tensor, Tensor]:
        """A student's features (N, D) and logits (N, K) of all TR target images."""
        features, logits = self.predict(self._store["target/target"], student)
        return features.to(self._runtime.device), logits.to(self._runtime.device)

    def adapt(self, student: Classifier) -> None:
        """Give a student's batch norms the statistics of the target images, in place."""
        view = View(self._runtime, student, self.encoding)
        adapt_batch_norms(self._store["target/target"], view)

    def bridge_lead(self, student: Classifier) -> float:
        """By how many standard errors the bridge sees better than a student; 0 if nothing can tell.

        See :func:`sfkt_cli.methods.label_free.bridge_lead`.
        """
        if self._proof is None:
            return 0.0
        pairs, bridged = self._proof
        features, _ = self.predict(pairs.target, student)
        partners = self.ti_features.cpu()[pairs.rows]
        return label_free.bridge_lead(bridged, features, partners, self.groups)


class TransferObjective(Objective):
    """A student and its training objective: a batch in, named loss terms out.

    A method sets ``weights``, writes :meth:`forward`, and overrides what else differs, such as
    :meth:`begin_epoch` and :meth:`after_step`; see :class:`sfkt_cli.training.loop.Objective`. If
    some steps give a trained parameter no gradient, such as those of the head, the method sets
    ``skips_parameters``, which several processes need to know.

    Batches hold TR target images as they are stored, shifted and mirrored at random
    (``tr_target``), and their row numbers among all target images (``tr_rows``). With ``needs_ti``
    they also hold ``ti_target`` and ``ti_rows``, the same of TI pairs.
    """

    needs_bridge = False  # whether it uses the outputs of a bridge
    # Whether the bridge teaches the student to the end, so that it cannot judge the student.
    follows_bridge = False
    keep_untouched = False  # whether the untouched source model replaces a student judged worse
    needs_ti = False  # whether it looks at TI pairs
    # Whether batches hold ``tr_target_2``: the images of ``tr_target``, shifted and mirrored anew.
    needs_second_view = False
    # Whether the student sees translated images: the frozen translator stands in front of it.
    translated = False

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__()
        self.student = student
        self.outputs = outputs

    @property
    def needs_images(self) -> set[str]:
        """The images that batches hold; see :class:`sfkt_cli.training.batches.TransferBatches`."""
        pairs = {"ti_target"} if self.needs_ti else set()
        return pairs | {"tr_target"} | ({"tr_target_2"} if self.needs_second_view else set())

    def facts(self) -> dict[str, float]:
        """Figures for done.json; called after the training."""
        return {}

    def encoded(self, images: Tensor) -> Tensor:
        """The input of the student (B, 3, H, W) for stored target images."""
        return as_rgb(encode(images, self.outputs.encoding))


def cluster_labels(
    features: Tensor, logits: Tensor, *, rounds: int, euclidean: bool = False
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels from the clusters of the student's features.

    A 1 is appended to the features, and they are scaled to unit length. Centroids start as means
    weighted by the predicted probabilities. Each image takes the class of the nearest centroid in
    cosine. In each further round, centroids are means over the hard assignments. A class that is
    predicted for no image, or assigned to none, then has no centroid.

    Source: rounds = 1 is SHOT as released (Liang et al., ICML 2020, Eq. 4 to 6); rounds = 0 with
    ``euclidean`` is SOCKET as released.

    Args:
        features: (N, D) features of the target images.
        logits: (N, K) logits of the target images.
        rounds: Number of repetitions with hard assignments.
        euclidean: Take the nearest centroid in Euclidean distance; centroids keep their length.

    Returns:
        Labels (N,), and (N, K) cosine similarities or negative distances.
    """
    ones = torch.ones(len(features), 1, device=features.device)
    units = normalize(torch.cat([features.float(), ones], dim=1))
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
    return normalize(weights.T @ units)


def _whole_batch(values: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in the order of the batch that they share."""
    shares = torch.split(from_all_processes(values), len(values))
    return torch.stack(shares, dim=1).flatten(0, 1)


class Bank(nn.Module):
    """Unit features and predictions of all N target images, kept as buffers for a resumed run.

    Source: NRC (Yang et al., NeurIPS 2021) and AaD (Yang et al., NeurIPS 2022).

    Args:
        features: (N, D) features of the student before its training.
        logits: (N, K) logits of the student before its training.
    """

    features: Tensor
    probabilities: Tensor

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", normalize(features.float()))
        self.register_buffer("probabilities", logits.float().softmax(dim=1))

    @torch.no_grad()
    def remember(self, rows: Tensor, features: Tensor, logits: Tensor) -> None:
        """Replace the entries of a batch, over all processes.

        A batch in which one pass over the images ends and the next begins may hold an image twice.
        Its last place counts; otherwise chance would decide between the two writes.

        Args:
            rows: (B,) row numbers of the images.
            features: (B, D) features of the images.
            logits: (B, K) logits of the images.
        """
        rows = _whole_batch(rows)
        places = torch.arange(len(rows), device=rows.device)
        last = rows.new_zeros(len(self.features)).scatter_reduce_(0, rows, places, "amax")[rows]
        self.features[rows] = normalize(_whole_batch(features.float()))[last]
        self.probabilities[rows] = _whole_batch(logits.float()).softmax(dim=1)[last]

    @torch.no_grad()
    def neighbours(self, rows: Tensor, count: int) -> Tensor:
        """Row numbers of the nearest other images in cosine, the nearest first.

        Args:
            rows: (...,) row numbers of the images whose neighbours are wanted.
            count: Number of neighbours; a smaller bank gives fewer.

        Returns:
            (..., count).
        """
        with torch.autocast(self.features.device.type, enabled=False):
            similarity = self.features[rows] @ self.features.T
        similarity.scatter_(-1, rows.unsqueeze(-1), -torch.inf)
        return similarity.topk(min(count, len(self.features) - 1), dim=-1).indices
