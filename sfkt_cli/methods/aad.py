"""AaD: attracting and dispersing (Yang et al., NeurIPS 2022), on target images alone.

    L = L_attract + weight (1 + 10 p)^-beta L_disperse,  p = progress in [0, 1)

    L_attract   predictions follow those of the k nearest neighbours in a feature bank
    L_disperse  predictions differ from those of the other images of the batch

Here the weight decays from epoch to epoch, in the released code from step to step. The head is
trained, as in the released code.
"""

import torch
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.methods.objective import Bank, TeacherOutputs, TransferObjective
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch


class Aad(TransferObjective):
    """The objective of ``sfkt transfer --method aad``."""

    decay: Tensor

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        self.bank = Bank(*outputs.predict_all(student))
        self.register_buffer("decay", torch.ones(()))
        self._settings = config.aad
        self._epochs = config.transfer.epochs
        self.weights = {"attract": 1.0, "disperse": config.aad.weight}

    def begin_epoch(self, epoch: int) -> None:
        """Lower the weight of the dispersion."""
        self.decay.fill_((1.0 + 10.0 * epoch / self._epochs) ** -self._settings.beta)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``tr_target`` and ``tr_rows``."""
        rows = batch["tr_rows"]
        features, logits = self.student(self.encoded(batch["tr_target"]))
        self.bank.remember(rows, features, logits)
        near = self.bank.neighbours(rows, self._settings.neighbours)
        return {
            "attract": losses.attraction(logits, self.bank.probabilities[near]),
            "disperse": self.decay * losses.dispersion(logits),
        }
