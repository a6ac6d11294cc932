"""A module of the user's own becomes the source model; what failed leaves no settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

import sfkt_cli
from sfkt_cli.errors import ConfigError, DataError, RunError
from sfkt_cli.models.backbones import IMAGENET
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import load_model
from sfkt_cli.settings.config import build
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import resolve
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.source import source


@pytest.fixture
def run(untrained_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(untrained_run.path("prepare"), tmp_path / "run/prepare")
    return Run(tmp_path / "run")


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(6, outputs),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_module_becomes_the_source_model(run: Run) -> None:
    pytest.importorskip("onnxscript")
    classes = run.record("prepare")["classes"]
    module = network(len(classes)).train()
    shown = list(reversed(classes))
    sfkt_cli.import_model(
        module, run=run.folder, classes=np.array(shown), image_size=16,
        mean=np.full(3, 0.5), std=torch.full((1, 3, 1, 1), 0.25),
    )  # fmt: skip
    assert module.training
    saved = load_model(run.path("source"))
    assert isinstance(saved.module, Classifier)
    images = torch.rand(4, 3, 16, 16)
    expected = module.eval()((images - 0.5) / 0.25).flip(1)
    torch.testing.assert_close(saved.module(images)[1], expected, atol=1e-5, rtol=1e-4)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in saved.module.modules())
    assert run.finished("source")
    with pytest.raises(RunError, match="force=True"):
        sfkt_cli.import_model(network(len(classes) + 1), run=run.folder)
    assert resolve(Options(run=run.folder), "bridge").config.source.mean == (0.5, 0.5, 0.5)
    kept = run.path("source.onnx").read_bytes()
    with pytest.raises(ConfigError, match="divide both by 255"):
        sfkt_cli.import_model(
            network(len(classes)), run=run.folder, mean=[124] * 3, std=[58] * 3, force=True
        )
    assert run.path("source.onnx").read_bytes() == kept
    again: Any = torch.compile(nn.DataParallel(network(len(classes)).eval()))
    returned = sfkt_cli.import_model(again, run=run.folder, force=True)
    assert returned == run, "what the first import was given says nothing of the second"
    found = load_model(run.path("source")).module(images)[1]
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in IMAGENET)
    expected = network(len(classes)).eval()((images - mean) / std)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Placed(nn.Module):
    """Resizes a table of places, as vision transformers do."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 3, 5, 5))
        self.rest = network(outputs)

    def forward(self, images: Tensor) -> Tensor:
        places = functional.interpolate(self.table, images.shape[2:], mode="bilinear")
        logits: Tensor = self.rest(images + places)
        return logits


@pytest.mark.filterwarnings("ignore")
def test_what_is_unknown_but_depends_on_no_image_is_worked_out(run: Run) -> None:
    pytest.importorskip("onnxscript")
    module = Placed(len(run.record("prepare")["classes"])).eval()
    sfkt_cli.import_model(module, run=run.folder, mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(4, 3, 16, 16)
    _, logits = load_model(run.path("source")).module(images)
    torch.testing.assert_close(logits, module(images), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_imported_is_said(run: Run, tmp_path: Path) -> None:
    module = network(4)
    with pytest.raises(RunError, match="sfkt prepare"):
        sfkt_cli.import_model(module, run=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"image_size is 32.* prepared with 16"):
        sfkt_cli.import_model(module, run=run.folder, image_size=32)
    for mean in ([0.5], 0.5, ["a", "b", "c"]):
        wrong: Any = mean
        with pytest.raises(ConfigError, match="mean"):
            sfkt_cli.import_model(module, run=run.folder, mean=wrong)
    function: Any = torch.relu
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        sfkt_cli.import_model(function, run=run.folder)
    with pytest.raises(ConfigError, match="has 99 classes"):
        sfkt_cli.import_model(network(99), run=run.folder)
    assert not run.path("source.onnx").exists()
    with pytest.raises(DataError, match=r"cannot be exported to ONNX: .* same reduction dim"):
        sfkt_cli.import_model(nn.Linear(5, 2), run=run.folder)
    assert not run.path("source").exists()


def test_a_failed_import_leaves_no_settings(run: Run, tmp_path: Path) -> None:
    """The weights fit, but the network does not take images as small as these."""
    model = models.densenet121(num_classes=len(run.record("prepare")["classes"]))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    chosen = {"checkpoint": str(tmp_path / "w.pth"), "backbone": "densenet121",
              "mean": [0.1] * 3, "std": [0.2] * 3}  # fmt: skip
    with pytest.raises(ConfigError, match="does not take images of 16 x 16"):
        source(build({"source": chosen, "runtime": {"gpus": 0}}), run)
    kept = resolve(Options(run=run.folder), "bridge").config.source
    assert (kept.checkpoint, kept.backbone, kept.mean) == (None, "small", None)
