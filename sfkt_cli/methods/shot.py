"""SHOT: source hypothesis transfer (Liang et al., ICML 2020), on target images alone.

L = beta_self L_self + beta_im L_IM,  head frozen, pseudo-labels refreshed each epoch
"""

import torch
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.methods.objective import TeacherOutputs, TransferObjective, cluster_labels
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config, ShotConfig
from sfkt_cli.training.loop import Batch


class Shot(TransferObjective):
    """The objective of ``sfkt transfer --method shot``."""

    section = "shot"
    pseudo_labels: Tensor

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        self.student.head.requires_grad_(False)
        nothing_yet = torch.zeros(outputs.targets, dtype=torch.long)
        self.register_buffer("pseudo_labels", nothing_yet)
        settings: ShotConfig = getattr(config, self.section)
        self.weights = {"self": settings.beta_self, "im": settings.beta_im}

    def begin_epoch(self, epoch: int) -> None:
        """Cluster the student's features: new pseudo-labels."""
        features, logits = self.outputs.predict_all(self.student)
        self.pseudo_labels.copy_(cluster_labels(features, logits, rounds=1)[0])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``tr_target`` and ``tr_rows``."""
        _, logits = self.student(self.encoded(batch["tr_target"]))
        labels = self.pseudo_labels[batch["tr_rows"]]
        return {
            "self": losses.pseudo_label_cross_entropy(logits, labels),
            "im": losses.information_maximisation(logits),
        }
