"""SOCKET (Ahmed et al., ECCV 2022), as its paper describes it.

L = beta_self L_self + beta_im L_IM + beta_bn L_BN + beta_f L_TI,  head frozen

L_BN  the batch statistics in each BatchNorm layer match those of the source images
L_TI  Frobenius norm of F_s(x_rgb^TI) - F_t(x_target^TI)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.methods.objective import TeacherOutputs, cluster_labels
from sfkt_cli.methods.shot import Shot
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config, SocketConfig
from sfkt_cli.training.loop import Batch


class Socket(Shot):
    """The objective of ``sfkt transfer --method socket``: SHOT's, and two terms more."""

    needs_ti = True
    section = "socket"

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__(student, outputs, config)
        self._ti_features = outputs.ti_features
        settings: SocketConfig = getattr(config, self.section)
        self.weights |= {"bn": settings.beta_bn, "f": settings.beta_f}
        self.gate = nn.Parameter(torch.ones(()), requires_grad=settings.bn_gate)
        frozen = dict(outputs.source.named_modules())
        self._seen: list[tuple[Tensor, nn.BatchNorm2d]] = []
        for name, layer in student.named_modules():
            stored = frozen.get(name)
            if isinstance(stored, nn.BatchNorm2d):  # the student's own may be a SyncBatchNorm
                layer.register_forward_pre_hook(self._note(stored))

    def begin_epoch(self, epoch: int) -> None:
        """Cluster the student's features: new pseudo-labels."""
        features, logits = self.outputs.predict_all(self.student)
        self.pseudo_labels.copy_(cluster_labels(features, logits, rounds=0, euclidean=True)[0])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``tr_target``, ``tr_rows``, ``ti_target`` and ``ti_rows``."""
        self._seen.clear()
        terms = super().forward(batch)
        matched = losses.batch_norm_matching(self._seen).to(terms["im"].device)
        if self.gate.requires_grad:
            matched = self.gate.sigmoid() * matched
        ti_features = self.student.features(self.encoded(batch["ti_target"]))
        self._seen.clear()
        partners = self._ti_features[batch["ti_rows"]]
        return {**terms, "bn": matched, "f": losses.feature_matching_norm(ti_features, partners)}

    def _note(self, stored: nn.BatchNorm2d) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer.training:
                self._seen.append((inputs[0], stored))

        return note


class SocketBridge(Socket):
    """The objective of ``sfkt transfer --method socket+bridge``.

    SOCKET with a student that sees translated images, a comparison that the paper lacks. The frozen
    translator stands in front of the student and is saved with it.
    """

    needs_bridge = True
    follows_bridge = True  # it starts as the bridge
    translated = True
    section = "socket_bridge"
