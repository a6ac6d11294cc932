"""The normalisation that a source model expects, read from where it is written down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfkt_cli.models.backbones import INCEPTIONS
from sfkt_cli.settings.config import SourceConfig

Three = tuple[float, float, float]
IMAGENET: tuple[Three, Three] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Normalisation:
    """What is taken off RGB in [0, 1] and what it is divided by, and who says so."""

    mean: Three
    std: Three
    origin: str


def normalisation_of(settings: SourceConfig) -> Normalisation:
    """The settings' own, else that of the weights: a config.json beside them, timm, torchvision."""
    published = None
    if settings.mean is None or settings.std is None:
        published = _beside(settings.checkpoint) or _published(settings.backbone)
    mean, std, origin = published or (*IMAGENET, "the usual one, of ImageNet")
    if settings.mean is not None or settings.std is not None:
        origin = "source.mean and source.std"
    return Normalisation(settings.mean or mean, settings.std or std, origin)


def _beside(checkpoint: Path | None) -> tuple[Three, Three, str] | None:
    """From the config.json that timm and the Hugging Face hub put beside weights."""
    path = checkpoint.parent / "config.json" if checkpoint else None
    if path is None or not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    inner = card.get("pretrained_cfg", card) if isinstance(card, dict) else None
    return _three(inner, str(path))


def _published(backbone: str) -> tuple[Three, Three, str] | None:
    if backbone == "small":
        return None
    if backbone == "efficientnet_lite0":  # (x - 127) / 128 for x in 0..255
        return (127 / 255,) * 3, (128 / 255,) * 3, f"the weights of {backbone}"
    if backbone in INCEPTIONS:  # what torchvision turns ImageNet's into, inside of the network
        return (0.5,) * 3, (0.5,) * 3, f"the weights of {backbone}"
    if backbone.startswith("timm:"):
        try:
            import timm
        except ImportError:
            return None
        card: Any = timm.get_pretrained_cfg(backbone.removeprefix("timm:"))
        return _three(card.to_dict() if card else None, f"timm's weights of {backbone}")
    from torchvision import models

    try:
        transforms = models.get_model_weights(backbone).DEFAULT.transforms()
    except (ValueError, AttributeError):
        return None
    return _three(vars(transforms), f"torchvision's weights of {backbone}")


def _three(values: Any, origin: str) -> tuple[Three, Three, str] | None:
    if not isinstance(values, dict):
        return None
    try:
        (r, g, b), (x, y, z) = values["mean"], values["std"]
        return (float(r), float(g), float(b)), (float(x), float(y), float(z)), origin
    except (KeyError, TypeError, ValueError):
        return None
