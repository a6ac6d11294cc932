"""A feature bank: the student's last features and predictions of every target image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.distributed import from_all_processes


class Bank(nn.Module):
    """Unit features and predictions of all N target images, as buffers: a resumed run has them.

    Source: NRC (Yang et al., NeurIPS 2021) and AaD (Yang et al., NeurIPS 2022).

    Args:
        features: (N, D), from the student before its training.
        logits: (N, K), from the student before its training.
    """

    features: Tensor
    probabilities: Tensor

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(features.float()))
        self.register_buffer("probabilities", logits.float().softmax(dim=1))

    @torch.no_grad()
    def remember(self, rows: Tensor, features: Tensor, logits: Tensor) -> None:
        """Replace the entries of a batch, over all processes.

        Args:
            rows: (B,) row numbers of the images.
            features: (B, D).
            logits: (B, K).
        """
        rows = from_all_processes(rows)
        self.features[rows] = F.normalize(from_all_processes(features.float()))
        self.probabilities[rows] = from_all_processes(logits.float()).softmax(dim=1)

    @torch.no_grad()
    def neighbours(self, rows: Tensor, count: int) -> Tensor:
        """Row numbers of the nearest other images in cosine, the nearest first.

        Args:
            rows: (...,) row numbers of the images that ask.
            count: How many; fewer where the bank is smaller.

        Returns:
            (..., count).
        """
        with torch.autocast(self.features.device.type, enabled=False):
            similarity = self.features[rows] @ self.features.T
        similarity.scatter_(-1, rows.unsqueeze(-1), -torch.inf)
        return similarity.topk(min(count, len(self.features) - 1), dim=-1).indices
