"""Folded batch norms: the same outputs and gradients without them, or the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkt_cli.models.classifier import Classifier, Mixture, freeze
from sfkt_cli.models.frozen import fold_batch_norms

SIZES: dict[str, Any] = {
    "classes": 3, "width": 4, "bottleneck": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2),
}  # fmt: skip
SIDE = 64


def stirred(model: nn.Module) -> nn.Module:
    """Batch norms as if trained: nothing at its default."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return freeze(model)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Written(nn.Module):
    """Features and logits of a network of one's own."""

    def __init__(self, network: Callable[[Tensor, Any], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(layers)
        self._network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self._network(images, self.parts).mean(dim=(2, 3))
        return features, features


def conv(channels_in: int = 3) -> nn.Module:
    return nn.Conv2d(channels_in, 5, 3, padding=1)


@pytest.mark.parametrize(
    ("backbone", "left"),
    [("small", 0), ("resnet18", 0), ("mobilenet_v3_small", 0), ("densenet121", 62), ("vgg11", 0)],
)
def test_a_folded_model_says_the_same_and_sends_the_same_gradient_back(
    backbone: str, left: int
) -> None:
    torch.manual_seed(0)
    model = stirred(Classifier(backbone=backbone, **SIZES))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_batch_norms(model, SIDE)
    assert norms(folded) == left
    found = []
    for each in (model, folded):
        images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        features, logits = each(images.requires_grad_())
        (features.square().mean() + logits.square().mean()).backward()
        assert images.grad is not None
        found.append((features, logits, images.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        # Rounding turns the sign of an activation near 0 now and then, and with it a gradient.
        assert (ours - theirs).norm() < 3e-3 * theirs.norm()
    assert all(not parameter.requires_grad for parameter in folded.parameters())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_mixture_is_folded_member_by_member() -> None:
    both = stirred(Mixture([{"backbone": "small", **SIZES}, {"backbone": "resnet18", **SIZES}]))
    assert norms(both) == 29
    assert norms(fold_batch_norms(both, SIDE)) == 0


def test_what_changes_the_output_in_between_keeps_the_norm() -> None:
    model = Written(
        lambda images, parts: parts["late"](parts["second"](parts["norm"](
            torch.relu_(parts["first"](images))
        ))),
        first=conv(), norm=nn.BatchNorm2d(5), second=conv(5), late=nn.BatchNorm2d(5),
    )  # fmt: skip
    folded = fold_batch_norms(stirred(model), SIDE)
    assert isinstance(folded.get_submodule("parts.norm"), nn.BatchNorm2d)
    assert isinstance(folded.get_submodule("parts.late"), nn.Identity)


def test_a_convolution_that_others_look_at_leaves_the_model_as_it_is() -> None:
    def network(images: Tensor, parts: Any) -> Tensor:
        seen = parts["conv"](images)
        return parts["norm"](seen) + seen  # type: ignore[no-any-return]

    model = stirred(Written(network, conv=conv(), norm=nn.BatchNorm2d(5)))
    assert fold_batch_norms(model, SIDE) is model


def test_of_two_norms_behind_one_convolution_neither_is_folded() -> None:
    model = Written(
        lambda images, parts: parts["first"](seen := parts["conv"](images))
        + parts["second"](seen) + parts["late"](parts["other"](images)),
        conv=conv(), first=nn.BatchNorm2d(5), second=nn.BatchNorm2d(5),
        other=conv(), late=nn.BatchNorm2d(5),
    )  # fmt: skip
    assert norms(fold_batch_norms(stirred(model), SIDE)) == 2


def test_a_norm_that_takes_its_input_by_name_is_left_alone() -> None:
    model = Written(
        lambda images, parts: parts["norm"](input=parts["conv"](images)),
        conv=conv(), norm=nn.BatchNorm2d(5),
    )  # fmt: skip
    assert fold_batch_norms(stirred(model), SIDE) is model


def test_a_convolution_used_twice_and_statistics_of_the_batch_are_left_alone() -> None:
    def twice(images: Tensor, parts: Any) -> Tensor:
        return parts["norm"](parts["conv"](images)) + parts["conv"](images)  # type: ignore[no-any-return]

    model = stirred(Written(twice, conv=conv(), norm=nn.BatchNorm2d(5)))
    assert fold_batch_norms(model, SIDE) is model
    own = nn.BatchNorm2d(5, track_running_stats=False)
    model = stirred(
        Written(lambda x, parts: parts["norm"](parts["conv"](x)), conv=conv(), norm=own)
    )
    assert fold_batch_norms(model, SIDE) is model
