"""NRC: neighbourhood reciprocity clustering (Yang et al., NeurIPS 2021), on target images alone.

    L = L_near + L_wider + L_self - diversity

    L_near   predictions follow those of the k nearest neighbours in a feature bank; weight 1 where
             the two are among each other's nearest, else r
    L_wider  predictions follow those of the m nearest neighbours of each neighbour, with weight r
    L_self   predictions follow the bank's entry of the image itself

As in the released code, the head is trained. An image among the neighbours of its neighbours is
left out of L_wider, because L_self stands for it.
"""

import torch
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.methods.objective import Bank, TeacherOutputs, TransferObjective
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch


class Nrc(TransferObjective):
    """The objective of ``sfkt transfer --method nrc``."""

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        self.bank = Bank(*outputs.predict_all(student))
        self._settings = config.nrc
        self.weights = {"near": 1.0, "wider": 1.0, "self": 1.0, "diversity": -1.0}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``tr_target`` and ``tr_rows``."""
        rows, settings = batch["tr_rows"], self._settings
        features, logits = self.student(self.encoded(batch["tr_target"]))
        self.bank.remember(rows, features, logits)
        near = self.bank.neighbours(rows, settings.neighbours)
        wider = self.bank.neighbours(near, settings.wider)
        affinity, wider_affinity = affinities(rows, wider, settings.affinity)
        stored = self.bank.probabilities
        return {
            "near": losses.attraction(logits, stored[near], affinity),
            "wider": losses.attraction(logits, stored[wider.flatten(1)], wider_affinity),
            "self": losses.attraction(logits, stored[rows].unsqueeze(1)),
            "diversity": losses.diversity(logits),
        }


def affinities(rows: Tensor, wider: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Weights of the neighbours, and of their neighbours.

    Args:
        rows: (B,) row numbers of the images.
        wider: (B, k, m) neighbours of each of their k neighbours.
        least: r, affinity of neighbours that are not reciprocal.

    Returns:
        (B, k): 1 if the image is among its neighbour's neighbours, else r. (B, k m): 0 if the
        neighbour's neighbour is the image itself, else r.
    """
    itself = wider == rows.view(-1, 1, 1)
    reciprocal = itself.any(dim=2)
    near = torch.where(reciprocal, 1.0, least)
    return near, torch.where(itself, 0.0, least).flatten(1)
