"""Source models that people bring: what is taken, and what is refused with what message."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.importing import import_source
from sfkt_cli.models.saving import save_model
from sfkt_cli.settings.config import Config, build
from sfkt_cli.stages.source import check_image_size
from sfkt_cli.training.predicting import (
    collapse_warning,
    describe_predictions,
    warn_of_collapse,
)

CLASSES = ["box", "cone", "sphere"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = models.mobilenet_v3_small(num_classes=3)
    return network.eval()


def settings(path: Path, **source: Any) -> Config:
    return build({"source": {"checkpoint": str(path), "backbone": "mobilenet_v3_small", **source}})


def normalised(images: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (images - mean) / std


@pytest.mark.parametrize(
    "wrapping", ["plain", "capitals", "ddp", "compiled", "trainer", "lightning", "safetensors"]
)
def test_a_state_dict_gives_the_logits_of_the_network_it_came_from(
    tmp_path: Path, network: nn.Module, wrapping: str
) -> None:
    state = network.state_dict()
    names = {"safetensors": "model.safetensors", "capitals": "MODEL.PTH"}
    path = tmp_path / names.get(wrapping, "model.pth")
    if wrapping == "safetensors":
        save_file(state, path)
    elif wrapping == "trainer":
        torch.save({"epoch": 3, "model": state, "optimizer": {"state": {}}}, path)
    elif wrapping == "lightning":
        inside = {f"net.model.{name}": value for name, value in state.items()}
        torch.save({"state_dict": inside, "hyper_parameters": {"lr": 0.1}}, path)
    else:
        prefix = {"plain": "", "capitals": "", "ddp": "module.", "compiled": "_orig_mod.module."}[
            wrapping
        ]
        torch.save({prefix + name: value for name, value in state.items()}, path)
    brought = import_source(settings(path), CLASSES)
    assert ("net.model." in brought.remarks[0]) == (wrapping == "lightning")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, logits = brought.model(images)
        torch.testing.assert_close(logits, network(normalised(images)))
        torch.testing.assert_close(brought.model.head(features), logits)
    again = Classifier(**brought.architecture)
    again.load_state_dict(brought.model.state_dict())
    assert brought.classes == CLASSES


def test_outputs_in_another_order_are_brought_into_that_of_the_data(
    tmp_path: Path, network: nn.Module
) -> None:
    path = tmp_path / "model.pth"
    torch.save(network.state_dict(), path)
    images = torch.rand(2, 3, 64, 64)
    in_order = import_source(settings(path), CLASSES).model(images)[1]
    other = import_source(settings(path, classes=["sphere", "box", "cone"]), CLASSES)
    assert other.classes == CLASSES
    torch.testing.assert_close(other.model(images)[1], in_order[:, [1, 2, 0]])


def test_a_model_of_sfkt_needs_no_architecture(tmp_path: Path) -> None:
    architecture: dict[str, Any] = {
        "backbone": "small", "classes": 3, "width": 4, "bottleneck": 8,
        "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
    }  # fmt: skip
    torch.manual_seed(1)
    model = Classifier(**architecture).eval()
    save_model(
        tmp_path, model, kind="classifier", architecture=architecture,
        classes=["cone", "sphere", "box"], encoding=None, inputs={}, seed=0,
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)[1][:, [2, 0, 1]]
    for path in (tmp_path, tmp_path / "model.safetensors"):
        brought = import_source(settings(path), CLASSES)
        torch.testing.assert_close(brought.model(images)[1], expected)
        assert not brought.pretrained


def test_the_number_of_classes_must_fit(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "model.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ConfigError, match=r"the checkpoint has 3 classes, the data 4"):
        import_source(settings(path), [*CLASSES, "torus"])
    told = (
        r"only in the data: sphere; only in the model: ball.* prepare the data anew .*classes\.tr"
    )
    with pytest.raises(ConfigError, match=told):
        import_source(settings(path, classes=["box", "cone", "ball"]), CLASSES)
    with pytest.raises(ConfigError, match=r"has 3 outputs, source\.classes names 2"):
        import_source(settings(path, classes=["box", "cone"]), CLASSES)


def test_what_a_checkpoint_holds_besides_the_network_is_left_out_and_named(
    tmp_path: Path, network: nn.Module
) -> None:
    state = dict(network.state_dict())
    path = tmp_path / "model.pth"
    images = torch.rand(2, 3, 64, 64)
    for extra in ({"criterion.weight": torch.ones(3)}, {"arcface.weight": torch.ones(3, 1024)}):
        torch.save(state | extra, path)
        brought = import_source(settings(path), CLASSES)
        assert any(
            "left out" in remark and next(iter(extra)) in remark for remark in brought.remarks
        )
        torch.testing.assert_close(brought.model(images)[1], network(normalised(images)))
    averaged = {f"ema.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save(averaged | state, path)
    with pytest.raises(ConfigError, match=r"classifier\.3; say which with source\.features"):
        import_source(settings(path), CLASSES)
    brought = import_source(settings(path, features="classifier.3"), CLASSES)
    torch.testing.assert_close(brought.model(images)[1], network(normalised(images)))


def test_a_foreign_backbone_with_a_head_is_not_taken_for_a_model_of_sfkt(
    tmp_path: Path, network: nn.Module
) -> None:
    own = {f"classifier.3.{name}": f"head.{name}" for name in ("weight", "bias")}
    state = {own.get(k, f"backbone.{k}"): value for k, value in network.state_dict().items()}
    torch.save(state, tmp_path / "model.pth")
    brought = import_source(settings(tmp_path / "model.pth"), CLASSES)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(brought.model(images)[1], network(normalised(images)))
    torch.save(state | {"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"written by sfkt, but its model\.json"):
        import_source(settings(tmp_path / "model.pth"), CLASSES)


def test_a_timm_network_of_a_fixed_size_says_which_size() -> None:
    pytest.importorskip("timm")
    name = "timm:vit_tiny_patch16_384"
    model = Classifier(
        backbone=name, classes=3, width=0, bottleneck=0, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    with pytest.raises(ConfigError, match=r"64 x 64 pixels .*--set image_size=384"):
        check_image_size(model, name, 64)


@pytest.mark.parametrize("what", ["linear", "norm in front", "norm of features", "second head"])
def test_what_takes_part_in_the_predictions_is_not_left_out(tmp_path: Path, what: str) -> None:
    state = dict(models.resnet18(num_classes=64 if what == "linear" else 3).state_dict())
    backbone, layer = "resnet18", "fc.1"
    if what == "linear":
        state |= {"fc.2.weight": torch.zeros(3, 64), "fc.2.bias": torch.zeros(3)}
        layer = "fc.0"
    elif what == "norm in front":
        norm = nn.Sequential(nn.BatchNorm1d(512)).state_dict()
        state |= {f"fc.{name}": value for name, value in norm.items()}
    elif what == "norm of features":
        state |= {f"neck.{name}": value for name, value in nn.LayerNorm(512).state_dict().items()}
        layer = "fc"
    else:
        timm = pytest.importorskip("timm")
        backbone, layer = "deit_tiny_distilled_patch16_224", "head"
        state = dict(timm.create_model(backbone, num_classes=3).state_dict())
        backbone = f"timm:{backbone}"
    if layer.startswith("fc."):
        state |= {f"{layer}.weight": state.pop("fc.weight"), f"{layer}.bias": state.pop("fc.bias")}
    torch.save(state, tmp_path / "deep.pth")
    for features in ("", layer) if backbone.startswith("timm") else ("",):
        with pytest.raises(ConfigError, match=r"as ONNX"):
            import_source(
                settings(tmp_path / "deep.pth", backbone=backbone, features=features), CLASSES
            )


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "small"])
def test_another_architecture_is_refused(tmp_path: Path, network: nn.Module, backbone: str) -> None:
    path = tmp_path / "model.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ConfigError, match=f"does not fit source.backbone = '{backbone}'"):
        import_source(settings(path, backbone=backbone), CLASSES)


def test_a_checkpoint_with_other_shapes_names_them(tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    state["features.0.0.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(ConfigError, match=r"features\.0\.0\.weight has shape \(16, 1, 3, 3\)"):
        import_source(settings(tmp_path / "grey.pth"), CLASSES)


def test_damaged_and_foreign_files_are_errors_that_name_the_file(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "model.h5").write_bytes(b"")
    (tmp_path / "model.onnx").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save({"weight": torch.tensor([float("nan")])}, tmp_path / "nan.pth")
    names = ["cut.pth", "text.safetensors", "model.h5", "model.onnx", "empty.pth", "nan.pth"]
    for name in [*names, "absent.pth"]:
        with pytest.raises(DataError, match=name):
            import_source(settings(tmp_path / name), CLASSES)


def test_a_dict_of_a_training_script_is_told_how_to_give_its_weights(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(lr=0.1), "state_dict": network.state_dict()}, "run.pth")
    with pytest.raises(DataError, match="more than tensors in it") as refused:
        import_source(settings(Path("run.pth")), CLASSES)
    exec(str(refused.value).splitlines()[-1].partition(": ")[2], {"torch": torch})
    brought = import_source(settings(Path("weights.pth")), CLASSES)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(brought.model(images)[1], network(normalised(images)))


def test_collapsed_predictions_are_noticed() -> None:
    torch.manual_seed(0)
    varied = 5 * torch.randn(300, 3)
    entropy, shares = describe_predictions(varied)
    assert sum(shares) == pytest.approx(1)
    assert collapse_warning(entropy, shares, CLASSES) is None
    one_class = describe_predictions(varied + torch.tensor([0.0, 60.0, 0.0]))
    assert "'cone'" in (collapse_warning(*one_class, CLASSES) or "")
    unsure = describe_predictions(0.01 * varied)
    assert "nats of 1.10" in (collapse_warning(*unsure, CLASSES) or "")


@pytest.mark.parametrize(("images", "warned"), [(300, True), (10, False)])
def test_a_model_that_says_one_class_is_warned_of(
    images: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = torch.randn(images, 3) + torch.tensor([0.0, 60.0, 0.0])
    warn_of_collapse(logits, CLASSES, "the student", "transfer")
    said = capsys.readouterr().err
    assert ("the student calls 100 % of the TR target images 'cone'" in said) is warned
