"""Several source models as one: a classifier whose prediction is a weighted mixture.

    p(x) = sum_k w_k p_k(x),  w = softmax(mixing)

Source: DECISION (Ahmed et al., CVPR 2021) and SOCKET (Ahmed et al., ECCV 2022) learn one weight
for each source model along with the networks; so does every student that starts from a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.models.classifier import Classifier


class Mixture(Classifier):
    """Source models side by side; each brings its own normalisation.

    Args:
        members: Keyword arguments of :class:`Classifier`, one for each model; the classes agree.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]]) -> None:
        nn.Module.__init__(self)
        self.front = nn.Identity()
        self.members = nn.ModuleList([Classifier(**member) for member in members])
        self.mixing = nn.Parameter(torch.zeros(len(members)))

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """All backbones."""
        return self._parts("backbone")

    @property
    def bottleneck(self) -> nn.Module:  # type: ignore[override]
        """All bottlenecks."""
        return self._parts("bottleneck")

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """All heads."""
        return self._parts("head")

    @property
    def feature_size(self) -> int:
        """Sizes of the members' features, together."""
        return sum(member.feature_size for member in self._classifiers())

    def features(self, images: Tensor) -> Tensor:
        """Features of all models side by side, (B, D_1 + ... + D_K)."""
        images = self.front(images)
        return torch.cat([member.features(images) for member in self._classifiers()], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features as above, and log p(x) as logits (B, classes)."""
        images = self.front(images)
        seen = [member(images) for member in self._classifiers()]
        spoken = torch.stack([logits.float().log_softmax(dim=1) for _, logits in seen])
        weights = self.mixing.float().log_softmax(dim=0).view(-1, 1, 1)
        features = torch.cat([features for features, _ in seen], dim=1)
        return features, torch.logsumexp(spoken + weights, dim=0)

    def _classifiers(self) -> list[Classifier]:
        return list(self.members)  # type: ignore[arg-type]

    def _parts(self, name: str) -> nn.ModuleList:
        return nn.ModuleList([getattr(member, name) for member in self.members])
