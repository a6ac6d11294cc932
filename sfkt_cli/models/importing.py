"""A source model that the user brings: an architecture by name, and a file with its weights.

Features are what enters the last linear layer, which becomes the head. Nothing is loaded that
could run code; see :mod:`sfkt_cli.models.weights_files`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfkt_cli.config import Config
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import sha256_file
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import CARD, WEIGHTS, load_model
from sfkt_cli.models.weights_files import read_weights

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Classifiers on the side of googlenet and inception_v3, which only their training uses."""
COLLAPSED_SHARE = 0.9
"""So many images in one class are a sign of wrong preprocessing."""
NEARLY_UNIFORM = 0.97
"""So is a mean entropy above this share of its maximum."""


@dataclass(frozen=True)
class Imported:
    """A source model that was brought along.

    Attributes:
        model: Its outputs are in the order of ``classes``.
        architecture: Keyword arguments of :class:`Classifier` that build it again.
        classes: The data's class names; the checkpoint's where the data has none.
        digest: SHA-256 of the weights' file.
    """

    model: Classifier
    architecture: dict[str, Any]
    classes: list[str]
    digest: str


@dataclass(frozen=True)
class Predictions:
    """How sure and how varied predictions are.

    Attributes:
        entropy: Mean over the images, in nats.
        largest_entropy: log K, that of a uniform prediction.
        histogram: Share of the images in each class, (K,).
    """

    entropy: float
    largest_entropy: float
    histogram: list[float]


def import_source(config: Config, classes: Sequence[str]) -> Imported:
    """Load the model of ``source.checkpoint``.

    Args:
        config: ``source.backbone`` names the architecture, ``source.classes`` the outputs.
        classes: Of the data, in the order of its labels; empty where the data has none.

    Raises:
        ConfigError: Architecture, checkpoint and classes do not fit each other.
        DataError: The file is missing, damaged or could run code.
    """
    path = config.source.checkpoint
    if path is None:
        raise ConfigError("source.checkpoint is not set")
    own = path if path.is_dir() else path.parent
    if path.is_dir() or (path.name == WEIGHTS and (own / CARD).is_file()):
        return _own_model(config, own, classes)
    state = _without_auxiliary(read_weights(path))
    if any(name.startswith("backbone.") for name in state) and "head.bias" in state:
        raise DataError(f"{path} was written by sfkt, but its {CARD} is not beside it: copy it too")
    settings = config.source
    architecture: dict[str, Any] = {
        "backbone": settings.backbone,
        "classes": 0,
        "width": settings.width,
        "bottleneck": 0,
        "mean": settings.mean,
        "std": settings.std,
    }
    model = Classifier(**architecture | {"classes": 1})
    head = _find_head(path, state, model, settings.backbone)
    names = _outputs(config, path, len(state[f"{head}.weight"]), classes)
    architecture["classes"] = len(names)
    _fill(path, model, state, head, settings.backbone)
    kept = list(classes) or names
    _reorder(model, [names.index(name) for name in kept])
    return Imported(model.eval(), architecture, kept, sha256_file(path))


def describe_predictions(logits: Tensor) -> Predictions:
    """Mean entropy and class histogram of logits (N, K)."""
    log_shares = torch.log_softmax(logits.float(), 1)
    entropy = -(log_shares.exp() * log_shares).sum(1).mean()
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    histogram = (counts / max(len(logits), 1)).tolist()
    return Predictions(float(entropy), math.log(logits.shape[1]), histogram)


def collapse_warning(predictions: Predictions, classes: Sequence[str]) -> str | None:
    """What is suspicious about a source model's predictions on TI RGB images, if anything is."""
    top = max(predictions.histogram)
    advice = "are source.mean and source.std those that the model was trained with?"
    if len(classes) > 1 and top > COLLAPSED_SHARE:
        name = classes[predictions.histogram.index(top)]
        return f"the source model calls {100 * top:.0f} % of the TI RGB images {name!r}: {advice}"
    if predictions.entropy > NEARLY_UNIFORM * predictions.largest_entropy:
        return (
            f"the source model is unsure of the TI RGB images (mean entropy "
            f"{predictions.entropy:.2f} nats of {predictions.largest_entropy:.2f}): {advice}"
        )
    return None


def _own_model(config: Config, folder: Path, classes: Sequence[str]) -> Imported:
    """A model of ``sfkt source``; its card says all."""
    saved = load_model(folder)
    if not isinstance(saved.module, Classifier) or saved.encoding is not None:
        raise ConfigError(f"source.checkpoint: {folder} holds no RGB classifier")
    names = _outputs(config, folder, len(saved.classes), classes, saved.classes)
    kept = list(classes) or names
    _reorder(saved.module, [names.index(name) for name in kept])
    return Imported(saved.module, dict(saved.card["architecture"]), kept, saved.digest)


def _without_auxiliary(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(AUXILIARY)}


def _find_head(path: Path, state: Mapping[str, Tensor], model: Classifier, backbone: str) -> str:
    """Name of the checkpoint's linear layer that takes the backbone's output."""
    features = int(model.head.weight.shape[1])  # type: ignore[index]
    known = model.backbone.state_dict()
    found = [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name not in known and name.endswith(".weight") and value.shape[1:] == (features,)
    ]
    if len(found) != 1:
        heads = ", ".join(found) or "none"
        raise ConfigError(
            f"{path} does not fit source.backbone = {backbone!r}: its last layer should be linear "
            f"with {features} inputs, found {heads}"
        )
    return found[0]


def _outputs(
    config: Config,
    path: Path,
    count: int,
    classes: Sequence[str],
    own: Sequence[str] = (),
) -> list[str]:
    """Class names in the order of the checkpoint's outputs."""
    named = list(config.source.classes or own)
    if named and len(named) != count:
        raise ConfigError(
            f"{path} has {count} outputs, source.classes names {len(named)} classes: name all"
        )
    names = named or list(classes) or [f"class-{index}" for index in range(count)]
    if len(set(names)) != len(names):
        raise ConfigError("source.classes names a class twice")
    if len(names) != count or (classes and set(names) != set(classes)):
        missing = [name for name in classes if name not in names]
        extra = [name for name in names if name not in classes]
        detail = "".join(
            f"; {what}: {', '.join(some[:8])}"
            for what, some in (("only in the data", missing), ("only in the model", extra))
            if some
        )
        raise ConfigError(
            f"{path}: the checkpoint has {count} classes, the data {len(classes)}{detail}. "
            "Choose the data's classes with classes.tr, and name the model's with source.classes"
        )
    return names


def _fill(
    path: Path, model: Classifier, state: Mapping[str, Tensor], head: str, backbone: str
) -> None:
    """Put a checkpoint's tensors into a model, all of them or none."""
    weight = state[f"{head}.weight"]
    model.head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    renamed = {"mean": model.mean, "std": model.std, "head.bias": torch.zeros(weight.shape[0])}
    for name, value in state.items():
        is_head = name.rpartition(".")[0] == head
        renamed[f"head.{name.rpartition('.')[2]}" if is_head else f"backbone.{name}"] = value
    wanted = model.state_dict()
    wrong = [
        f"{name} has shape {tuple(renamed[name].shape)} and not {tuple(wanted[name].shape)}"
        for name in renamed.keys() & wanted.keys()
        if renamed[name].shape != wanted[name].shape
    ]
    wrong += [f"{name} is missing" for name in wanted.keys() - renamed.keys()
              if not name.endswith("num_batches_tracked")]  # fmt: skip
    wrong += [f"{name} is unknown" for name in renamed.keys() - wanted.keys()]
    if wrong:
        shown = "; ".join(sorted(name.removeprefix("backbone.") for name in wrong)[:4])
        raise ConfigError(
            f"{path} does not fit source.backbone = {backbone!r} in {len(wrong)} tensors: {shown}. "
            "Which architecture is it?"
        )
    model.load_state_dict(renamed)


def _reorder(model: Classifier, order: list[int]) -> None:
    """Bring the head's outputs into another order."""
    if order == list(range(len(order))):
        return
    for name, value in model.head.state_dict().items():
        if value.shape[:1] == (len(order),):
            value.copy_(value[order].clone())
        elif value.numel() > 1:
            raise DataError(f"head.{name} of shape {tuple(value.shape)} cannot be reordered")
