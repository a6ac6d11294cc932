"""TGKT: turn the source model into a student for the sensor, with the bridge as its first teacher.

    L_TGKT = beta_kl c(t) L_KL + beta_f L_f + beta_self L_self + beta_im L_IM

    L_KL    student on x_target^TR follows the source model on T(x_target^TR)  arXiv:2401.05014
    L_f     student on x_target^TI follows F_s(x_rgb^TI)                       arXiv:2401.05014
    L_self  cross-entropy with pseudo-labels, renewed each epoch               arXiv:2401.05014
    L_IM    certain and diverse predictions on x_target^TR                     ours, from SHOT
            (towards class frequencies halfway between the student's own and equal ones)
    c(t)    trust in the bridge, from 0 to 1                                   ours

In the paper c(t) = 1. Ours follows the bridge's lead z(t): by how many standard errors the target
images of held-out TI pairs find their RGB partners better behind the bridge than in the student
(``label_free.bridge_lead``):

    c(0) = 1 if z(0) >= 1, else 0                      the bridge has to be better beyond noise
    c(t) = min(c(0), clip(z(t) + 1, 0, 1), 1 - t / T)  before epoch t of T, until the student is

The student begins as the source model with the batch statistics of target images (AdaBN, Li et al.,
2016). A few steps turn it into this model anyway, so this is the fair rival of the bridge. Two
models that see equally well in different ways still learn from each other. Once the student sees
better than the bridge, and towards the end, it learns by itself: the bridge is a start, not a
ceiling.

TR and TI images of a step pass through the student together, with one set of batch statistics, so
what it learns about one holds for the other. The head stays that of the source model, as in SHOT
(ours), because a free head follows the student's clusters wherever they go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.console import warn
from sfkt_cli.errors import ConfigError
from sfkt_cli.methods.objective import TeacherOutputs, TransferObjective, cluster_labels
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch

PROVEN, OVERTAKEN = 1.0, -1.0
"""Leads of the bridge, in standard errors, at which the trust begins and at which it ends."""
EQUAL_SHARE = 0.5
"""Share of equal frequencies in the prior, because the student may be wrong about its own."""


class Tgkt(TransferObjective):
    """The objective of ``sfkt transfer --method tgkt``.

    Raises:
        ConfigError: No term trains the student.
    """

    needs_bridge = True
    needs_ti = True
    bridge_weight: Tensor
    pseudo_labels: Tensor
    prior: Tensor

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        settings = config.tgkt
        measured = settings.trust == "measured"
        if not (
            settings.beta_im
            or settings.beta_f
            or (settings.beta_self and not settings.self_from)
            or (settings.beta_kl and not measured)
        ):
            raise ConfigError(
                "nothing is sure to train the student: tgkt.beta_im and tgkt.beta_f are 0, "
                "pseudo-labels come late or never, and the bridge may get no trust; set one of "
                "them, tgkt.beta_self with tgkt.self_from=0, or tgkt.trust=full"
            )
        self.follows_bridge = not measured and bool(settings.beta_kl)
        self.keep_untouched = settings.keep_untouched
        outputs.adapt(student)
        self.trust = float(not measured or outputs.bridge_lead(student) >= PROVEN)
        self._compared = len(set(outputs.groups))
        if measured and settings.beta_kl and self._compared < 2:
            warn(
                "the bridge gets no trust, because nothing can prove that it is the better model: "
                "there are fewer than 50 TI pairs, or they come from too few groups (places, "
                "recordings); name more groups, record pairs in ten places or more, or set "
                "tgkt.trust=full"
            )
        self.student.head.requires_grad_(settings.train_head)
        self._settings = settings
        self._epochs = config.transfer.epochs
        self._teacher = outputs.bridged_logits.softmax(dim=1)
        self._ti_features = outputs.ti_features
        self.needs_ti = bool(settings.beta_f)  # no pairs where none are followed
        self._measures = measured and bool(settings.beta_kl) and self.trust > 0
        self.register_buffer("bridge_weight", torch.tensor(self.trust))
        classes = self._teacher.shape[1]
        self.register_buffer("prior", self._teacher.new_full((classes,), 1.0 / classes))
        self.register_buffer("pseudo_labels", torch.full((outputs.targets,), -1))
        self._labelled = False
        self.weights = {
            "kl": settings.beta_kl,
            "f": settings.beta_f,
            "self": settings.beta_self,
            "im": settings.beta_im,
        }
        self.skips_parameters = not settings.beta_im

    def _trust_left(self) -> float:
        if not self.trust:
            return 0.0  # nothing to measure
        return min(max(self.outputs.bridge_lead(self.student) - OVERTAKEN, 0.0), 1.0)

    def facts(self) -> dict[str, float]:
        """c(0), c with the finished student, and the number of groups of compared pairs."""
        left = self._trust_left()
        return {
            "bridge_trust": round(self.trust, 3),
            "bridge_trust_left": round(left, 3),
            "groups_compared": self._compared,
        }

    def begin_epoch(self, epoch: int) -> None:
        """Compare the bridge with the student; renew pseudo-labels and class frequencies."""
        share = epoch / self._epochs
        if self._measures and epoch:
            self.bridge_weight.fill_(min(self._trust_left(), 1.0 - share))
        own_prior = self._settings.prior == "measured" and bool(self.weights["im"])
        if share < self._settings.self_from or not (self.weights["self"] or own_prior):
            return
        features, logits = self.outputs.predict_all(self.student)
        if self.weights["self"]:
            self.pseudo_labels.copy_(cluster_labels(features, logits, rounds=1)[0])
            self._labelled = True
        if own_prior:
            predicted = logits.float().softmax(dim=1).mean(dim=0)
            self.prior.copy_((1.0 - EQUAL_SHARE) * predicted + EQUAL_SHARE / len(predicted))

    def get_extra_state(self) -> Tensor:
        """Whether there are pseudo-labels, for a resumed run; a buffer would be on the GPU."""
        return torch.tensor(self._labelled)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._labelled = bool(state)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of stored ``tr_target`` and ``ti_target`` and their row numbers."""
        weights, rows = self.weights, batch["tr_rows"]
        images, count = batch["tr_target"], len(batch["tr_target"])
        if self.needs_ti:
            images = torch.cat([images, batch["ti_target"]])
        features, logits = self.student(self.encoded(images))
        features, logits = features[count:], logits[:count]
        terms = {}
        if weights["kl"]:
            terms["kl"] = self.bridge_weight * losses.distillation(logits, self._teacher[rows])
        if weights["self"] and self._labelled:
            labels = self.pseudo_labels[rows]
            terms["self"] = losses.pseudo_label_cross_entropy(logits, labels)
        if weights["im"]:
            terms["im"] = losses.information_maximisation(logits, self.prior)
        if self.needs_ti:
            partners = self._ti_features[batch["ti_rows"]]
            terms["f"] = losses.feature_matching(features, partners)
        return terms
