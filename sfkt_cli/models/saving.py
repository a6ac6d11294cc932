"""Models on disk: model.safetensors beside model.json, which says all that is needed to use them.

The card, model.json, carries its own checksum, and the weights carry a digest of the fields that
say how stored images are used, so neither file can change alone. Nothing here runs code from a
file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from sfkt_cli.data.images import Encoding
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.data.store import Store
from sfkt_cli.errors import DataError
from sfkt_cli.files import read_bytes, read_record, sha256_json, write_bytes, write_record
from sfkt_cli.machine import full_memory
from sfkt_cli.models.classifier import Classifier, Mixture
from sfkt_cli.models.translators import Front, make_translator
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage, versions

WEIGHTS = "model.safetensors"
CARD = "model.json"
WARM = "warm start"  # name of that input in done.json
USE = ("kind", "architecture", "classes", "encoding", "temperature", "images")
"""What decides predictions; its digest is kept with the weights."""


class Card(BaseModel):
    """The content of model.json; the last four fields are those of a student."""

    # Infinity stays what it is, and is refused when the file is written; null would be read as 0.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    kind: Literal["classifier", "translator"]
    architecture: dict[str, Any]  # arguments of the class
    classes: list[str]  # names in the order of the outputs; empty for a translator
    normalisation: dict[Literal["mean", "std"], tuple[float, float, float]]
    encoding: Encoding | None  # of its target images; None for an RGB model
    inputs: dict[str, str]  # digests of what it was made from
    seed: int
    versions: dict[str, str]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the weights
    pretrained: bool = False  # whether a source model was trained elsewhere, wholly or at first
    method: str | None = None
    sensor: Sensor | None = None  # how new images are read
    temperature: float = Field(1.0, gt=0)  # by which the logits are divided
    images: dict[str, str | tuple[float, float]] | None = None  # what is usual in those of training

    @field_validator("encoding")
    @classmethod
    def _has_a_window(cls, encoding: Encoding | None) -> Encoding | None:
        if encoding is not None and not (encoding.low < encoding.high and encoding.channels > 0):
            raise ValueError("low must be smaller than high, and channels at least 1")
        return encoding

    def as_json(self) -> dict[str, Any]:
        """The entries of the file."""
        values = self.model_dump(mode="json", exclude_unset=True)
        if values.get("encoding") and values["encoding"]["revision"] == 1:
            del values["encoding"]["revision"]  # as cards were before there were revisions
        return values


@dataclass(frozen=True)
class Saved:
    """A model read back."""

    module: nn.Module  # in inference mode, on the device asked for
    card: Card

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return self.card.sha256

    @property
    def classifier(self) -> Classifier:
        """The module as a classifier; raises DataError if it is a translator."""
        if not isinstance(self.module, Classifier):
            raise DataError("a classifier was expected, the file holds a translator")
        return self.module

    def encoding_of(self, stage: str) -> Encoding:
        """The encoding of a model that takes target images; raises DataError without one."""
        if self.card.encoding is None:
            command = stage.partition("/")[0]
            raise DataError(f"the model in {stage}/ has no encoding: run `sfkt {command} --force`")
        return self.card.encoding


def save_model(
    stage: Stage,
    module: nn.Module,
    *,
    kind: str,
    architecture: Mapping[str, Any],
    classes: list[str],
    encoding: Encoding | None,
    **more: Any,
) -> None:
    """Write a stage's model; the other arguments are entries of model.json, see :class:`Card`."""
    card = Card(
        kind=kind,
        architecture=dict(architecture),
        classes=classes,
        normalisation={k: architecture[k] for k in ("mean", "std") if k in architecture},
        encoding=encoding,
        inputs=dict(stage.inputs),
        seed=stage.config.seed,
        versions=versions(),
        sha256="0" * 64,
        **more,
    )
    write_model(stage.folder, module, card)


def write_model(folder: Path, module: nn.Module, card: Card) -> None:
    """Write weights into a folder, then their card with the digest of these; each appears whole."""
    values = card.as_json()
    # Copies, because some networks use a tensor at two places, which safetensors refuses.
    state = {
        n: value.detach().cpu().contiguous().clone() for n, value in module.state_dict().items()
    }
    content = to_bytes(state, {"used_as": _use_of(values)})
    write_bytes(folder / WEIGHTS, content)
    write_record(folder / CARD, {**values, "sha256": hashlib.sha256(content).hexdigest()})


def load_model(folder: Path, device: torch.device | None = None) -> Saved:
    """Read a model that :func:`save_model` wrote, in inference mode.

    Raises:
        DataError: A file is missing or damaged, or the weights do not belong to the card.
        OSError: The file system refuses a file.
    """
    card = read_card(folder / CARD)
    weights = folder / WEIGHTS
    content = read_bytes(weights)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.sha256:
        raise DataError(
            f"{weights} is damaged: sha256 {digest[:12]}..., {CARD} says {card.sha256[:12]}...; "
            "run its stage again with --force"
        )
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header.get("__metadata__", {}).get("used_as") not in _uses_of(card.as_json()):
            raise ValueError("the weights were saved for another use")
        module = _build(card.kind, dict(card.architecture))
        module.load_state_dict(from_bytes(content))
    except DataError:  # an encoding or operation of another version says so itself
        raise
    except Exception as error:  # what does not belong together may end in anything
        if isinstance(error, OSError) or full_memory(type(error).__name__, str(error)):
            raise
        raise DataError(f"{folder / CARD} does not describe {weights}: {error}") from None
    if card.encoding is not None and (card.encoding.kind, card.encoding.revision) == ("shading", 1):
        raise DataError(
            f"{folder} was trained on an earlier `shading`, where missing depth was black: "
            "use that version, or run `sfkt bridge --force` and `sfkt transfer --force`"
        )
    module.eval()
    module.to(device or torch.device("cpu"), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Saved(module, card)


def load_earlier(
    start: Path | None, run: Run, stage: str, device: torch.device | None = None
) -> tuple[Saved | None, Mapping[str, str]]:
    """The model of a stage of the run ``training.warm_start``, and its digest as an input.

    Nothing where it is not set. It may be gone once the stage of ``run`` is finished: then the
    recorded digest counts. Raises RunError, which names the command, if that run has not finished
    the stage.
    """
    if start is None:
        return None, {}
    if not start.exists() and run.keeps(stage):
        return None, {WARM: run.record(stage)["inputs"].get(WARM, "")}
    earlier = load_model(Run(start).require(stage), device)
    return earlier, {WARM: earlier.digest}


def warm_start(
    earlier: Saved, module: nn.Module, architecture: Mapping[str, Any], source: Saved
) -> None:
    """Give a new module, of this architecture, the weights of one of an earlier run.

    Raises DataError if that is another network, or was made from another source model.
    """
    if earlier.card.inputs.get("source") != source.digest:
        raise DataError(
            "training.warm_start: that run has another source model, and its translator and "
            "student are made for it: `sfkt source --warm-start RUN` takes it over"
        )
    there, here = earlier.card.architecture, json.loads(json.dumps(architecture))
    # A translator in front is that of the run's own bridge.
    differing = [n for n in {**here, **there} if n != "front" and there.get(n) != here.get(n)]
    if differing:
        values = (f"{n} {str(there.get(n))[:60]} (here {str(here.get(n))[:60]})" for n in differing)
        raise DataError(
            f"training.warm_start: the network of that run has {', '.join(values)}: give this run "
            "the same settings, or leave warm_start out"
        )
    before = earlier.module.state_dict()  # without its translator: the new one stays in front
    own = {name: value for name, value in before.items() if not name.startswith("front.")}
    module.load_state_dict({**module.state_dict(), **own})


def _build(kind: str, architecture: dict[str, Any]) -> nn.Module:
    if kind != "classifier":
        return make_translator(**architecture)
    front = architecture.pop("front", None)
    model = Mixture(**architecture) if "members" in architecture else Classifier(**architecture)
    if front is not None:
        model.front = Front(make_translator(**front), front["channels"])
    return model


def read_card(path: Path) -> Card:
    """Read a model.json; raises DataError if it is missing or damaged."""
    return read_record(path, Card)


def _use_of(card: Mapping[str, Any]) -> str:
    """Digest of what decides predictions."""
    return sha256_json({name: card.get(name) for name in USE})


def _uses_of(card: Mapping[str, Any]) -> list[str]:
    """The same, also of earlier versions, which called the encoding `standardised` `percentile`."""
    encoding = card["encoding"]
    if not encoding or encoding["kind"] != "standardised":
        return [_use_of(card)]
    return [_use_of(card), _use_of({**card, "encoding": {**encoding, "kind": "percentile"}})]


def check_classes(classes: list[str], store: Store) -> None:
    """Raise DataError if source model and data name other classes, or in another order.

    Data without any label may name none: the classes are those of the model.
    """
    if store.classes and classes != store.classes:
        raise DataError(
            f"the source model has the {len(classes)} classes {', '.join(classes)}, but "
            f"{store.path} has the {len(store.classes)} classes {', '.join(store.classes)}: "
            "run `sfkt source --force`, or set classes.tr or source.classes to agree"
        )
