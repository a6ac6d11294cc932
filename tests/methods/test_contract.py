"""What every transfer method promises, over the whole table of methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from sfkt_cli.data.images import encode
from sfkt_cli.methods import METHODS, find_method
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.translators import Front, PointwiseTranslator
from sfkt_cli.settings.config import Config, MethodName, OptimiserConfig, build, method_settings
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.loop import Batch, Training
from sfkt_cli.training.recipes import classifier_optimizer, cosine, start_student
from sfkt_cli.training.runtime import Runtime
from tests.methods.made import ENCODING, Made

COUNT, CLASSES, SIDE = 12, 3, 16
EPOCHS, STEPS, BATCH = 2, 2, 4
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 16),
    "no norm": nn.Identity,
}
"""Of models brought along, which have no BatchNorm anywhere."""

KINDS = ("batch norm", *NORMS)


def make_source(kind: str = "batch norm") -> Classifier:
    torch.manual_seed(0)
    brought = kind in NORMS
    model = Classifier(
        backbone="small", classes=CLASSES, width=4, bottleneck=0 if brought else 8,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    if brought:
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), NORMS[kind](), nn.ReLU(), *pool)
    return freeze(model)


def make_objective(method: str, source: Classifier) -> Any:
    """The objective on images that are the same in every call."""
    torch.manual_seed(1)
    targets, rgb = stored_images(), torch.rand(COUNT, 3, SIDE, SIDE)
    translator = PointwiseTranslator(1, 4)
    kind = find_method(method)
    student = start_student(source)
    if kind.translated:
        student.front = Front(translator, 1)
    freeze(translator)

    with torch.no_grad():
        ti_features, _ = source(rgb)
        _, bridged_logits = source(translator(encode(targets, ENCODING)))
    outputs = Made(
        source, targets, ti_features if kind.needs_ti else None,
        bridged_logits if kind.needs_bridge else None,
    )  # fmt: skip
    return kind(student, outputs, settings())


def settings() -> Config:
    return build({"transfer": {"epochs": EPOCHS}, "tgkt": {"self_from": 0}})


def stored_images() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 1000, (COUNT, SIDE, SIDE), generator=generator)


def batches(epoch: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    rows, ti_rows = (torch.randperm(COUNT, generator=generator)[:BATCH] for _ in range(2))
    images = stored_images()
    return {
        "tr_target": images[rows], "tr_target_2": images[rows].flip(2), "tr_rows": rows,
        "ti_target": images[ti_rows], "ti_rows": ti_rows,
    }  # fmt: skip


def asked_for(objective: Any, batch: Batch) -> Batch:
    """What of a batch `sfkt transfer` would hand to this objective."""
    kinds = {f"{name[:2]}_rows" for name in objective.needs_images}
    return {name: batch[name] for name in objective.needs_images | kinds}


def train(method: str, objective: Any, folder: Path, batches: Callable[[int, int], Batch]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rates = method_settings(settings(), method).rates(pretrained=False, bottleneck=True)
    config = build({"runtime": {"checkpoint_seconds": 0.0}})
    Training(
        method, Stage(method, folder, config, {}), objective,
        lambda epoch, step: asked_for(objective, batches(epoch, step)),
        classifier_optimizer(objective.student, *rates, 1e-3), RUNTIME,
        epochs=EPOCHS, steps=STEPS, schedule=cosine, keep=objective.student,
    ).fit()  # fmt: skip


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_every_method_can_be_chosen() -> None:
    assert get_args(MethodName) == (*METHODS,)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_section_of_settings(method: str) -> None:
    assert isinstance(method_settings(Config(), method), OptimiserConfig)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_terms_are_finite_scalars_that_all_have_a_weight(method: str, kind: str) -> None:
    objective = make_objective(method, make_source(kind))
    for epoch in range(EPOCHS):
        objective.begin_epoch(epoch)
    terms = objective.train()(asked_for(objective, batches(0, 0)))
    assert terms
    assert set(terms) <= set(objective.weights)
    assert all(term.shape == () and torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_student_learns_and_the_source_model_stays(
    method: str, kind: str, tmp_path: Path
) -> None:
    source = make_source(kind)
    before = state_of(source)
    objective = make_objective(method, source)
    start = state_of(objective.student)
    train(method, objective, tmp_path, batches)
    assert not differing(before, source.state_dict())
    changed = differing(start, objective.student.state_dict())
    assert any(name.startswith("backbone") for name in changed)
    assert not any(name.startswith("front") for name in changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    method: str, kind: str, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def until(epoch: int, step: int) -> Batch:
        if (epoch, step) == (1, 1):
            raise Stop
        return batches(epoch, step)

    whole, begun = (make_objective(method, make_source(kind)) for _ in range(2))
    train(method, whole, tmp_path / "whole", batches)
    with pytest.raises(Stop):
        train(method, begun, tmp_path / "parts", until)
    resumed = make_objective(method, make_source(kind))
    train(method, resumed, tmp_path / "parts", batches)
    assert not differing(whole.state_dict(), resumed.state_dict())
