"""How classifiers are trained: SGD and its schedules, and the training of those that have labels.

The source model has labels of RGB images, the oracle of target images.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sfkt_cli.machine import prefer_large_pages
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.loop import Batch, Objective, Progress, Training
from sfkt_cli.training.runtime import Runtime
from sfkt_cli.training.trial import settle_batch_size

Load = Callable[[Tensor], Tensor]
BATCH_NORM_MOMENTUM = 0.1
"""Smallest share of a batch in the student's running statistics; torch's default."""


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
        fused=True,  # one pass over all parameters: half the time on CPUs, too
    )
    # The fused form wants all momenta or none, and a term that starts late brings parameters late.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(progress: float) -> float:
    """Linear warm-up over the first 10 %, then half a cosine down to 0."""
    if progress < 0.1:
        return progress / 0.1 * 0.95 + 0.05
    return 0.5 * (1.0 + math.cos(math.pi * (progress - 0.1) / 0.9))


def inverse_decay(progress: float) -> float:
    """(1 + 10 p)^-0.75, the schedule of SHOT and SOCKET."""
    return float((1.0 + 10.0 * progress) ** -0.75)


def start_student(source: Classifier) -> Classifier:
    """A copy of the frozen source model that may be trained.

    Its running statistics follow the target images within an epoch. Some published networks keep
    99 % of the old statistics in each step, so after a few hundred steps a student would still
    predict with those of the source images.
    """
    student = copy.deepcopy(source)
    for module in student.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, BATCH_NORM_MOMENTUM)
    student.requires_grad_(True)
    return student.train()


SCHEDULES = {"cosine": cosine, "inverse": inverse_decay}
"""Progress in [0, 1) to the factor of the learning rate, by name."""


class Supervised(Objective):
    """Cross-entropy with label smoothing, of a classifier behind ``load``."""

    def __init__(self, model: Classifier, load: Load, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.weights = {"cross_entropy": 1.0}
        self._load = load
        self._label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss term of ``images`` (B, H, W[, C]) as stored and ``labels`` (B,)."""
        _, logits = self.model(self._load(batch["images"]))
        smoothing = self._label_smoothing
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)
        return {"cross_entropy": loss}


def fit_labels(
    title: str,  # shown in front of messages; tells streams of one seed apart
    stage: Stage,  # where its states go, and the settings
    model: Classifier,  # in training mode, on its device
    images: NDArray[Any],  # (N, H, W[, C]) as stored
    labels: NDArray[Any],  # (N,) class indices
    load: Load,  # stored images on the device to what the model takes
    runtime: Runtime,  # device and processes
    *,
    epochs: int,  # number of epochs
    rates: tuple[float, float],  # learning rate, and the backbone's share of it
    batch_size: int | Literal["auto"],  # over all processes, or ``auto``
) -> Progress:
    """Train a classifier on labels, with the settings of the source model."""
    config, training = stage.config, stage.config.training
    objective = Supervised(model, load, config.source.label_smoothing)

    def batches_of(size: int) -> Callable[[int, int], Batch]:
        stream = Stream(
            {"images": images}, name=title, seed=config.seed, batch_size=size,
            shift=training.shift, flip=training.flip, runtime=runtime,
        )  # fmt: skip

        def batches(epoch: int, step: int) -> Batch:
            batch, rows = stream.batch(epoch, step)
            return {**batch, "labels": runtime.tensor(labels[rows]), "rows": torch.from_numpy(rows)}

        return batches

    size = settle_batch_size(batch_size, len(images), stage.folder, runtime, objective, batches_of)
    prefer_large_pages([images])
    return Training(
        title, stage, objective, batches_of(size),
        classifier_optimizer(model, *rates, config.source.weight_decay), runtime,
        epochs=epochs, steps=max(len(images) // size, training.min_steps), images_per_step=size,
        schedule=cosine, keep=model,
    ).fit()  # fmt: skip
