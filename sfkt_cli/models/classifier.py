"""The classifier of every stage: backbone, bottleneck, weight-normalised head.

The same set-up as SHOT and SOCKET: backbone -> Linear to D + BatchNorm1d -> weight-normalised
Linear. Source model, student, oracle and all peers use it.

A mixture puts several source models side by side: p(x) = sum_k w_k p_k(x), w = softmax(mixing).
DECISION (Ahmed et al., CVPR 2021) and SOCKET (Ahmed et al., ECCV 2022) learn one weight for each
source model along with the networks, and so does every student that starts from a mixture.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sfkt_cli.models.backbones import make_backbone
from sfkt_cli.models.onnx_network import OnnxNetwork

Model = TypeVar("Model", bound=nn.Module)


class Classifier(nn.Module):
    """Images in [0, 1] to features and logits; the normalisation travels inside.

    ``front`` maps the images before all else; see :class:`sfkt_cli.models.translators.Front`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: str,  # name; see :func:`sfkt_cli.models.backbones.make_backbone`
        classes: int,  # number of classes K
        width: int,  # channels of the built-in backbone's first stage
        # Size D of the features; 0: no bottleneck, features are the backbone's output and the head
        # is a plain linear layer (models brought along).
        bottleneck: int,
        mean: tuple[float, float, float],  # mean of RGB in [0, 1], taken off
        std: tuple[float, float, float],  # standard deviation of RGB in [0, 1], divided by
        # ``bgr``: the backbone wants the normalised channels the other way round.
        channel_order: str = "rgb",
        # Keyword arguments of an :class:`OnnxNetwork` that is the backbone.
        graph: Mapping[str, Any] | None = None,
        # Name of the linear layer at whose input features are taken; empty: the last one.
        layer: str = "",
        pretrained: bool = False,  # start the backbone from published ImageNet weights
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.front: nn.Module = nn.Identity()
        self._flipped = channel_order == "bgr"
        self.backbone: nn.Module
        if graph is not None:
            self.backbone = OnnxNetwork(**graph)
            size = self.backbone.features
        else:
            self.backbone, size = make_backbone(
                backbone, width=width, pretrained=pretrained, layer=layer
            )
        self.bottleneck: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Linear(bottleneck or size, classes)
        if bottleneck:
            self.bottleneck = nn.Sequential(nn.Linear(size, bottleneck), nn.BatchNorm1d(bottleneck))
            self.head = weight_norm(self.head)

    @property
    def feature_size(self) -> int:
        """Size D of the features."""
        return int(self.head.in_features)  # type: ignore[arg-type]

    @property
    def has_bottleneck(self) -> bool:
        """Whether a layer lies between backbone and head; other people's models have none."""
        return any(True for _ in self.bottleneck.parameters())

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W) in [0, 1]."""
        normalised = (self.front(images) - self.mean) / self.std
        pooled: Tensor = self.backbone(normalised.flip(1) if self._flipped else normalised)
        features: Tensor = self.bottleneck(pooled)
        return features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        features = self.features(images)
        return features, self.head(features)


def freeze(model: Model) -> Model:
    """Put a model into inference mode without gradients of its own; its inputs still get theirs."""
    model.eval()
    return model.requires_grad_(False)


def _of_members(part: str) -> Any:
    """A property of a mixture: this part of all its members."""
    return property(lambda self: nn.ModuleList([getattr(one, part) for one in self.members]))


class Mixture(Classifier):
    """Source models, built from ``members``, side by side; each brings its own normalisation."""

    members: Any
    backbone = _of_members("backbone")
    bottleneck = _of_members("bottleneck")
    head = _of_members("head")

    def __init__(self, members: Sequence[Mapping[str, Any]]) -> None:
        nn.Module.__init__(self)
        self.front = nn.Identity()
        self.members = nn.ModuleList([Classifier(**member) for member in members])
        self.mixing = nn.Parameter(torch.zeros(len(members)))

    @property
    def feature_size(self) -> int:
        """Sizes of the members' features, together."""
        return sum(member.feature_size for member in self.members)

    def features(self, images: Tensor) -> Tensor:
        """Features of all models side by side, (B, D_1 + ... + D_K)."""
        images = self.front(images)
        return torch.cat([member.features(images) for member in self.members], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features as above, and log p(x) as logits (B, classes)."""
        images = self.front(images)
        features, logits = zip(*(member(images) for member in self.members), strict=True)
        log_probabilities = torch.stack([own.float().log_softmax(dim=1) for own in logits])
        weights = self.mixing.float().log_softmax(dim=0).view(-1, 1, 1)
        return torch.cat(features, dim=1), torch.logsumexp(log_probabilities + weights, dim=0)
