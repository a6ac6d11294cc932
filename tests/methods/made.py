"""What a method looks at, made for tests: a few stored images, and a student's view of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.methods.objective import TeacherOutputs
from sfkt_cli.models.classifier import Classifier

ENCODING = Encoding("window", 0.0, 1000.0, 1, True)


class Made(TeacherOutputs):
    """What ``transfer`` would hand to a method, of stored target images (N, H, W)."""

    def __init__(
        self,
        source: Classifier,
        targets: Tensor,
        ti_features: Tensor | None,
        bridged_logits: Tensor | None,
        lead: Callable[[Classifier], float] = lambda student: 3.0,
    ) -> None:
        self.source, self.encoding, self.targets = source, ENCODING, len(targets)
        if ti_features is not None:
            self.ti_features = ti_features
        if bridged_logits is not None:
            self.bridged_logits = bridged_logits
        self._images, self._lead = targets, lead
        self.groups = ["hall", "yard"]

    @torch.inference_mode()
    def predict_all(self, student: Classifier) -> tuple[Tensor, Tensor]:
        training = student.training
        features, logits = student.eval()(as_rgb(encode(self._images, ENCODING)))
        student.train(training)
        return features, logits

    def adapt(self, student: Classifier) -> None:
        pass

    def bridge_lead(self, student: Classifier) -> float:
        return self._lead(student)
