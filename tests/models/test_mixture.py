import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sfkt_cli.errors import ConfigError
from sfkt_cli.methods.objective import cluster_labels
from sfkt_cli.models.classifier import Mixture
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import transfer
from sfkt_cli.training.recipes import classifier_optimizer
from tests.stages.evaluation_runs import ARCHITECTURE, CLASSES, make_run, save_classifier

MEMBERS: list[dict[str, Any]] = [ARCHITECTURE, {**ARCHITECTURE, "width": 8, "bottleneck": 6}]
IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_prediction_is_the_weighted_mean_of_probabilities() -> None:
    model = Mixture(MEMBERS).eval()
    with torch.no_grad():
        model.mixing.copy_(torch.tensor([0.0, 1.0]))
        features, logits = model(IMAGES)
        seen = [member(IMAGES) for member in model.members]
    weights = [1 / (1 + torch.e), torch.e / (1 + torch.e)]
    expected = sum(w * z.softmax(dim=1) for w, (_, z) in zip(weights, seen, strict=True))
    torch.testing.assert_close(logits.softmax(dim=1), expected)
    torch.testing.assert_close(features, torch.cat([f for f, _ in seen], dim=1))
    assert features.shape[1] == model.feature_size == 14
    labels, _ = cluster_labels(features, logits, rounds=1)
    assert labels.shape == (5,)


def test_the_weights_are_learned_at_the_heads_rate() -> None:
    model = Mixture(MEMBERS)
    model.head.requires_grad_(False)
    assert not any(p.requires_grad for p in model.head.parameters())
    groups = classifier_optimizer(model, 0.1, 0.5, 0.0).param_groups
    assert [group["lr"] for group in groups] == [0.05, 0.1]
    assert any(parameter is model.mixing for parameter in groups[1]["params"])
    counted = sum(len(group["params"]) for group in groups)
    assert counted == sum(p.requires_grad for p in model.parameters())


def test_two_source_models_make_one_student(tmp_path: Path) -> None:
    run, folders = make_run(tmp_path / "run"), [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        save_classifier(Run(folder), "source", seed, None)
    for stage in ("source", "bridge", "transfer"):
        shutil.rmtree(run.path(stage), ignore_errors=True)
    config = build(
        {
            "image_size": 16,
            "source": {"mixture": [str(folders[0]), str(folders[1] / "source")]},
            "bridge": {"epochs": 1, "width": 4},
            "transfer": {"epochs": 1},
            "training": {"min_steps": 2},
            "runtime": {"gpus": 0, "batch_size": 8, "threads": 1},
        }
    )
    run = Run(run.folder, force=True)
    source(config, run)
    bridge(config, run)
    for method in ("tgkt", "socket"):
        transfer(build(config.model_dump(mode="json"), {"transfer": {"method": method}}), run)
        student = load_model(run.path("transfer", method))
        assert isinstance(student.module, Mixture)
        assert not torch.equal(student.module.mixing, torch.zeros(2))


@pytest.mark.parametrize(
    ("classes", "message"),
    [(CLASSES[::-1], "all models of a mixture name the same"), (CLASSES, "is a mixture itself")],
)
def test_models_of_other_classes_and_mixtures_do_not_mix(
    tmp_path: Path, classes: list[str], message: str
) -> None:
    run = make_run(tmp_path / "run")
    save_model(
        Stage("test", tmp_path / "a", Config(), {}), Mixture([ARCHITECTURE]), kind="classifier",
        architecture={"members": [ARCHITECTURE]}, classes=classes, encoding=None,
    )  # fmt: skip
    config = build({"image_size": 16, "source": {"mixture": [str(tmp_path / "a")]}})
    with pytest.raises(ConfigError, match=message):
        source(config, Run(run.folder, force=True))


def test_a_mixture_and_a_checkpoint_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"mixture and checkpoint"):
        build({"source": {"mixture": ["a"], "checkpoint": "b.pth"}})
