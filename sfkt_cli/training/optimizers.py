"""Optimisers and schedules: SGD for classifiers as in SHOT and SOCKET, Adam for translators.

Fused: one pass over all parameters, half the time of the usual form on CPUs, too.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from sfkt_cli.models.classifier import Classifier


def classifier_optimizer(
    model: Classifier,
    learning_rate: float,
    backbone_rate: float,
    weight_decay: float,
    more: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9; the backbone learns at a share of the rate.

    Source: SHOT and SOCKET (rate 1e-2, backbone x 0.1, weight decay 1e-3). Parameters without
    ``requires_grad`` are left out, so that a frozen head stays as it is. ``more``: parameters of
    the objective, at the full rate.
    """
    backbone = list(model.backbone.parameters())
    in_backbone = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
    rest += more
    groups = [
        {"params": [p for p in backbone if p.requires_grad], "lr": learning_rate * backbone_rate},
        {"params": [p for p in rest if p.requires_grad], "lr": learning_rate},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        momentum=0.9,
        nesterov=True,
        weight_decay=weight_decay,
        fused=True,
    )
    # The fused form wants all momenta or none, and a term that starts late brings parameters late.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def translator_optimizer(
    modules: Iterable[nn.Module], learning_rate: float
) -> torch.optim.Optimizer:
    """Adam over a translator and what is trained with it."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99), fused=True)


def cosine(progress: float) -> float:
    """Linear warm-up over the first 10 %, then half a cosine down to 0."""
    if progress < 0.1:
        return progress / 0.1 * 0.95 + 0.05
    return 0.5 * (1.0 + math.cos(math.pi * (progress - 0.1) / 0.9))


def inverse_decay(progress: float) -> float:
    """(1 + 10 p)^-0.75, the schedule of SHOT and SOCKET."""
    return float((1.0 + 10.0 * progress) ** -0.75)


SCHEDULES = {"cosine": cosine, "inverse": inverse_decay}
"""Progress in [0, 1) to the factor of the learning rate, by name."""
