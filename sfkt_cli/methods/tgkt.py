"""TGKT: distil the source model, seen through the bridge, into a student for the sensor.

    L_TGKT = beta_kl L_KL + beta_f L_f + beta_self L_self + beta_im L_IM

    L_KL    student on x_target^TR follows the teacher              arXiv:2401.05014
    L_f     student on x_target^TI follows F_s(x_rgb^TI)            arXiv:2401.05014
    L_self  cross-entropy with pseudo-labels, refreshed each epoch  arXiv:2401.05014, SHOT
    L_IM    certain and diverse predictions on x_target^TR          ours, from SHOT

The paper's teacher is the source model on translated images. Ours starts as that; after a warm-up
it is the geometric mean of that view and the student's own, which err on different images,
refreshed each epoch. ``tgkt.balance`` moves its class frequencies towards equal ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.errors import ConfigError
from sfkt_cli.methods.teacher_outputs import Knowledge, balance, cluster_labels, reliability
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch


class Tgkt(nn.Module):
    """The objective of ``sfkt transfer --method tgkt``.

    Raises:
        ConfigError: No term is left in some epoch.
    """

    needs_bridge = True
    needs_ti = True
    teacher: Tensor
    pseudo_labels: Tensor
    trust: Tensor

    def __init__(self, student: Classifier, knowledge: Knowledge, config: Config) -> None:
        super().__init__()
        if knowledge.bridged_logits is None or knowledge.ti_features is None:
            raise ValueError("tgkt needs a bridge and TI pairs")
        self.student = student
        self._knowledge = knowledge
        self._settings = config.tgkt
        self._warmup = round(config.tgkt.warmup * config.transfer.epochs)
        later = config.tgkt.beta_self or config.tgkt.beta_im
        if not (config.tgkt.beta_kl or config.tgkt.beta_f) and (self._warmup or not later):
            raise ConfigError(
                "tgkt.beta_kl and tgkt.beta_f are both 0: nothing trains the student before the "
                "warm-up is over; set one of them, or tgkt.warmup=0 with beta_im or beta_self"
            )
        bridged = knowledge.bridged_logits
        self._bridged = balance(bridged.softmax(dim=1), strength=config.tgkt.balance)
        self._ti_features = knowledge.ti_features
        self.register_buffer("teacher", self._bridged.clone())
        self.register_buffer("pseudo_labels", bridged.argmax(dim=1))
        self.register_buffer("trust", self._reliability(None))
        self._warm = False
        self.weights = {
            "kl": config.tgkt.beta_kl,
            "f": config.tgkt.beta_f,
            "self": config.tgkt.beta_self,
            "im": config.tgkt.beta_im,
        }
        self.skips_parameters = not config.tgkt.beta_kl

    def begin_epoch(self, epoch: int) -> None:
        """Refresh the teacher and the pseudo-labels, once the warm-up is over."""
        if epoch < self._warmup:
            return
        self._warm = True
        features, logits = self._knowledge.look(self.student)
        share = self._settings.student_share
        mean = share * logits.log_softmax(dim=1) + (1 - share) * self._bridged.log()
        self.teacher.copy_(balance(mean.softmax(dim=1), strength=self._settings.balance))
        self.trust.copy_(self._reliability(logits.softmax(dim=1)))
        if self.weights["self"]:
            self.pseudo_labels.copy_(cluster_labels(features, self.teacher.log(), rounds=0)[0])

    def get_extra_state(self) -> Tensor:
        """Whether the warm-up is over, for a resumed run; as a buffer it would be on the GPU."""
        return torch.tensor(self._warm)

    def set_extra_state(self, state: Tensor) -> None:
        """What :meth:`get_extra_state` gave."""
        self._warm = bool(state)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``tr_target``, ``tr_rows``, ``ti_target`` and ``ti_rows``, as stored."""
        knowledge, weights = self._knowledge, self.weights
        rows = batch["tr_rows"]
        trust = self.trust[rows] if self._settings.reliability else None
        _, logits = self.student(as_rgb(encode(batch["tr_target"], knowledge.encoding)))
        terms = (
            {"kl": losses.distillation(logits, self.teacher[rows], weights=trust)}
            if weights["kl"]
            else {}
        )
        if weights["self"] and self._warm:
            terms["self"] = losses.pseudo_label_cross_entropy(
                logits, self.pseudo_labels[rows], weights=trust
            )
        if weights["im"] and self._warm:
            terms["im"] = losses.information_maximisation(logits)
        if weights["f"]:
            seen = self.student.features(as_rgb(encode(batch["ti_target"], knowledge.encoding)))
            terms["f"] = losses.feature_matching(seen, self._ti_features[batch["ti_rows"]])
        return terms

    def _reliability(self, student: Tensor | None) -> Tensor:
        views = None if student is None else (self._bridged, student)
        names = self._settings.reliability
        return reliability(names, self.teacher, views, self._knowledge.valid)
