"""What a method looks at, made for tests: a few stored images, and a student's view of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.methods.objective import TeacherOutputs
from sfkt_cli.models.classifier import Classifier

ENCODING = Encoding("window", 0.0, 1000.0, 1, True)


def make_outputs(
    source: Classifier,
    targets: Tensor,  # stored target images (N, H, W)
    ti_features: Tensor | None,
    bridged_logits: Tensor | None,
    lead: Callable[[Classifier], float] = lambda student: 3.0,
) -> TeacherOutputs:
    """What ``transfer`` would hand to a method."""

    @torch.inference_mode()
    def predict_all(student: Classifier) -> tuple[Tensor, Tensor]:
        training = student.training
        features, logits = student.eval()(as_rgb(encode(targets, ENCODING)))
        student.train(training)
        return features, logits

    return TeacherOutputs(
        source=source, encoding=ENCODING, targets=len(targets), bridged_logits=bridged_logits,
        adapt=lambda student: None, bridge_lead=lead, ti_features=ti_features,
        predict_all=predict_all,
    )  # fmt: skip
