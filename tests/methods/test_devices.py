"""A training step elsewhere than on the CPU, tried on the device that has shapes and no values.

On it a tensor that was left on the CPU is an error, and so is asking for a value, for which a GPU
would have to be waited for in every step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkt_cli.methods import METHODS, find_method
from sfkt_cli.methods.tgmb import REC_LOSSES, Tgmb
from sfkt_cli.models.classifier import freeze
from sfkt_cli.models.translators import TRANSLATORS, Front, make_translator
from sfkt_cli.settings.config import build
from sfkt_cli.training.recipes import start_student
from tests.methods.made import ENCODING, Made
from tests.methods.test_contract import (
    BATCH,
    CLASSES,
    COUNT,
    EPOCHS,
    KINDS,
    SIDE,
    make_source,
)

NOWHERE = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """This device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=NOWHERE)


def check(terms: dict[str, Tensor], weights: dict[str, float]) -> None:
    assert {term.device for term in terms.values()} == {NOWHERE}
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_transfer_stays_on_its_device_and_asks_it_nothing(method: str, kind: str) -> None:
    source = make_source(kind).to(NOWHERE)
    student = start_student(source)
    objective_class = find_method(method)
    if objective_class.translated:
        student.front = Front(make_translator("pointwise", channels=1, width=4).to(NOWHERE), 1)

    targets = blank(COUNT, SIDE, SIDE, dtype=torch.int32)
    ti_features, bridged = blank(COUNT, source.feature_size), blank(COUNT, CLASSES)
    outputs = Made(source, targets, ti_features, bridged)
    all_terms = {"self_from": 0}
    config = build({"transfer": {"epochs": EPOCHS}, "tgkt": all_terms})
    objective = objective_class(student, outputs, config).to(NOWHERE)
    for epoch in range(EPOCHS):
        objective.begin_epoch(epoch)
    stored, rows = blank(BATCH, SIDE, SIDE, dtype=torch.int32), blank(BATCH, dtype=torch.int64)
    batch = {
        "tr_target": stored, "tr_target_2": stored, "tr_rows": rows,
        "ti_target": stored, "ti_rows": rows,
    }  # fmt: skip
    check(objective.train()(batch), objective.weights)


@pytest.mark.parametrize("rec_loss", REC_LOSSES)
@pytest.mark.parametrize("d_on", ["feature", "image"])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_step_of_the_bridge_stays_on_its_device_and_asks_it_nothing(
    name: str, d_on: str, rec_loss: str
) -> None:
    weights: dict[str, Any] = {"rec": 1.0, "d": 0.1, "im": 0.1, "f": 0.3}
    sizes = {"codes": 8} if name == "vqgan" else {}
    weights |= {"commit": 0.25, "patch": 0.02} if name == "vqgan" else {}
    source = freeze(make_source().to(NOWHERE))
    objective = Tgmb(
        make_translator(name, channels=1, width=4, **sizes), source, ENCODING, weights=weights,
        rec_loss=rec_loss, d_on=d_on,
    ).to(NOWHERE)  # fmt: skip
    stored, rgb = blank(BATCH, SIDE, SIDE, dtype=torch.int32), (BATCH, SIDE, SIDE, 3)
    batch = {"ti_target": stored, "tr_target": stored, "ti_rgb": blank(*rgb, dtype=torch.uint8)}
    check(objective.train()(batch), weights)
