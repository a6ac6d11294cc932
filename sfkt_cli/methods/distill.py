"""Distillation alone: the student follows the source model on translated images (L_KL only)."""

from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.methods.objective import TeacherOutputs, TransferObjective
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch


class Distill(TransferObjective):
    """The objective of ``sfkt transfer --method distill``."""

    needs_bridge = True
    follows_bridge = True

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        self._teacher = outputs.bridged_logits.softmax(dim=1)
        self.weights = {"kl": 1.0}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """L_KL of ``tr_target`` and ``tr_rows``."""
        _, logits = self.student(self.encoded(batch["tr_target"]))
        return {"kl": losses.distillation(logits, self._teacher[batch["tr_rows"]])}
