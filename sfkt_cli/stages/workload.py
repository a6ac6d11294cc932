"""One training step of each stage on made-up images: what `doctor --cost` counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.config import Config
from sfkt_cli.data.images import Encoding, encode, rgb_to_float
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.folding import fold_batch_norms
from sfkt_cli.models.levels import Levels
from sfkt_cli.models.translators import make_translator
from sfkt_cli.training.optimizers import classifier_optimizer, translator_optimizer
from sfkt_cli.training.runtime import Runtime

COUNTED = (4, 8)
"""Samples in the batches whose operations are counted."""
CLASSES = 10


class Workload:
    """The networks of a configuration, untrained, and one step of each stage.

    Args:
        config: Settings; ``image_size`` as prepared.
        runtime: Device and precision.
        most: Samples that a step may take.
    """

    def __init__(self, config: Config, runtime: Runtime, most: int = COUNTED[-1]) -> None:
        self._runtime = runtime
        self._with_tr = bool(config.bridge.alpha_d or config.bridge.alpha_im)
        self.encoding = Encoding("normals", 500.0, 4000.0, channels=1, missing=True)
        source = config.source
        sizes: dict[str, Any] = {
            "backbone": source.backbone, "classes": CLASSES, "width": source.width,
            "bottleneck": source.bottleneck, "mean": (0.5,) * 3, "std": (0.2,) * 3,
        }  # fmt: skip
        self.model = self._place(Classifier(**sizes)).train()
        frozen = fold_batch_norms(freeze(Classifier(**sizes)), config.image_size)
        self.frozen = self._place(frozen)
        more = {"codes": config.vqgan.codes} if config.bridge.translator == "vqgan" else {}
        pretrained = source.brought or source.published
        translator = make_translator(
            config.bridge.translator,
            channels=3,
            width=config.bridge.channels(pretrained=pretrained),
            **more,
        )
        self.translator = self._place(translator).train()
        side = (most, config.image_size, config.image_size)
        self._rgb = torch.randint(0, 255, (*side, 3), device=runtime.device).byte()
        self._target = torch.randint(1, 4000, side, device=runtime.device).to(torch.int32)
        self._levels = Levels(
            [self.frozen.backbone] if config.bridge.alpha_p else [],
            self.frozen.features,
            rgb_to_float(self._rgb),
        )
        runtime.cast_frozen(self.frozen, self.translator)
        self._of_model = classifier_optimizer(self.model, 1e-9, 1.0, 0.0)
        self._of_translator = translator_optimizer([self.translator], 1e-9)

    def source_step(self, rows: int) -> None:
        """A step of the source model."""
        with self._runtime.autocast(self.model):
            _, logits = self.model(rgb_to_float(self._rgb[:rows]))
        _descend(_norm(logits), self._of_model)

    def source_look(self, rows: int) -> None:
        """A look at images through a classifier that is trained between looks."""
        self.model.eval()
        with torch.inference_mode(), self._runtime.autocast():
            self.model(rgb_to_float(self._rgb[:rows]))
        self.model.train()

    def bridge_step(self, rows: int) -> None:
        """A step of the translator, through the frozen source model."""
        rgb = rgb_to_float(self._rgb[:rows])
        encoded = self._encoded(rows)
        if self._with_tr:
            encoded = torch.cat([encoded, self._encoded(rows)])
        with self._runtime.autocast(self.translator):
            bridged = self.translator(encoded)
            with torch.no_grad(), self._levels.noted() as told:
                partners = self.frozen.features(rgb)
            with self._levels.noted() as seen:
                features, logits = self.frozen(bridged)
        pairs = len(rgb)
        loss = _norm(features[:pairs] - partners) + _norm(bridged[:pairs] - rgb) + _norm(logits)
        if told:
            loss = loss + losses.perceptual(seen, told, self._levels.variances)
        _descend(loss, self._of_translator)

    def bridge_look(self, rows: int) -> None:
        """A look at target images through the translator and the source model."""
        with torch.inference_mode(), self._runtime.autocast():
            self.frozen(self.translator(self._encoded(rows)))

    def transfer_step(self, rows: int) -> None:
        """A step of the student on TR and TI images."""
        with self._runtime.autocast(self.model):
            _, logits = self.model(self._encoded(rows))
            features = self.model.features(self._encoded(rows))
        _descend(_norm(logits) + _norm(features), self._of_model)

    def _encoded(self, rows: int) -> Tensor:
        return encode(self._target[:rows], self.encoding)

    def _place(self, module: Any) -> Any:
        return self._runtime.place(module)


def _norm(values: Tensor) -> Tensor:
    return values.float().square().mean()


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
