"""The optimisers of classifiers: as the plain form of SGD, also where gradients begin late."""

from __future__ import annotations

from typing import Any

import torch

from sfkt_cli.models.classifier import Classifier
from sfkt_cli.training.recipes import classifier_optimizer


def test_parameters_whose_gradients_begin_late_are_trained_as_by_plain_sgd() -> None:
    torch.manual_seed(0)
    model = Classifier(
        backbone="small", classes=3, width=4, bottleneck=8, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters()), "lr": 0.01},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("backbone.")]},
    ]
    plain = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    begun = {name: value.detach().clone() for name, value in model.named_parameters()}
    images = [torch.rand(4, 3, 16, 16) for _ in range(4)]

    def train(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(begun[name])
        for step, batch in enumerate(images):
            optimizer.zero_grad(set_to_none=True)
            features, logits = model(batch)
            loss = features.square().mean() + (logits.square().mean() if step > 1 else 0.0)
            loss.backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    expected, found = train(plain), train(classifier_optimizer(model, 0.1, 0.1, 1e-3))
    assert any(not torch.equal(expected[name], begun[name]) for name in expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
