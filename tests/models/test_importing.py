"""Source models that people bring: what is taken, and what is refused with what message."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models.backbones import IMAGENET
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.importing import Imported, digest_of, import_source, own_model
from sfkt_cli.models.saving import save_model
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.stage import Stage
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


def take(path: Path, state: Any, of_data: list[str] = CLASSES, **source: Any) -> Imported:
    """Save a state dict and import it."""
    torch.save(state, path)
    return import_source(settings(path, **source), of_data)


def assert_alike(brought: Imported, network: nn.Module) -> None:
    """Compare logits; the network wants its images normalised."""
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in IMAGENET)
    with torch.no_grad():
        features, logits = brought.model(images)
        torch.testing.assert_close(logits, network((images - mean) / std))
        torch.testing.assert_close(brought.model.head(features), logits)


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": dict,
    "ddp": partial(prefixed, "module."),
    "compiled": partial(prefixed, "_orig_mod.module."),
    "deepspeed": lambda state: {"module": state, "dp_world_size": 1},
    "another key": lambda state: {"network": state, "scheduler": {"last_epoch": 3}},
    "trainer": lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}}},
    "lightning": lambda state: {
        "state_dict": prefixed("net.model.", state), "hyper_parameters": {"lr": 0.1}
    },
}  # fmt: skip


@pytest.mark.parametrize("wrapping", [*WRAPPINGS, "capitals", "safetensors"])
def test_a_state_dict_gives_the_logits_of_the_network_it_came_from(
    tmp_path: Path, network: nn.Module, wrapping: str
) -> None:
    state = network.state_dict()
    if wrapping == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
        brought = import_source(settings(tmp_path / "model.safetensors"), CLASSES)
    else:
        path = tmp_path / ("MODEL.PTH" if wrapping == "capitals" else "model.pth")
        brought = take(path, WRAPPINGS.get(wrapping, dict)(state))
    assert ("net.model." in brought.remarks[0]) == (wrapping == "lightning")
    assert_alike(brought, network)
    Classifier(**brought.architecture).load_state_dict(brought.model.state_dict())
    assert brought.classes == CLASSES


def test_outputs_in_another_order_are_brought_into_that_of_the_data(
    tmp_path: Path, network: nn.Module
) -> None:
    path, images = tmp_path / "model.pth", torch.rand(2, 3, 64, 64)
    in_order = take(path, network.state_dict()).model(images)[1]
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
        Stage("test", tmp_path, Config(), {}), model, kind="classifier", architecture=architecture,
        classes=["cone", "sphere", "box"], encoding=None,
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)[1][:, [2, 0, 1]]
    run = tmp_path.parent / "run"
    shutil.copytree(tmp_path, run / "source")
    for path in (tmp_path, tmp_path / "model.safetensors", run):
        brought = import_source(settings(path, backbone="small"), CLASSES)
        torch.testing.assert_close(brought.model(images)[1], expected)
        assert not brought.pretrained
    assert digest_of(run) == digest_of(tmp_path)
    own = {"backbone": "small", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert import_source(settings(tmp_path, **own), CLASSES).architecture["width"] == 4
    refused = {"mean": (0.4,) * 3, "channel_order": "bgr", "backbone": "resnet18",
               "classes": CLASSES}  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=rf"source\.{name} = .*a model of sfkt"):
            import_source(settings(tmp_path, **{**own, name: value}), CLASSES)


def test_classes_that_data_without_labels_left_unnamed_may_get_names(tmp_path: Path) -> None:
    architecture: dict[str, Any] = {
        "backbone": "small", "classes": 3, "width": 4, "bottleneck": 0,
        "mean": (0.5,) * 3, "std": (0.2,) * 3,
    }  # fmt: skip
    model, images = Classifier(**architecture).eval(), torch.rand(2, 3, 32, 32)
    save_model(
        Stage("test", tmp_path, Config(), {}), model, kind="classifier", architecture=architecture,
        classes=["class-0", "class-1", "class-2"], encoding=None,
    )  # fmt: skip
    named = settings(tmp_path, backbone="small", classes=["sphere", "box", "cone"])
    brought = import_source(named, CLASSES)
    torch.testing.assert_close(brought.model(images)[1], model(images)[1][:, [1, 2, 0]])


def test_one_output_is_the_logit_of_the_second_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    binary = models.mobilenet_v3_small(num_classes=1).eval()
    path, images = tmp_path / "w.pth", torch.rand(4, 3, 64, 64)
    for of_data, names in (([], ["class-0", "class-1"]), (["no", "yes"], ["no", "yes"])):
        brought = take(path, binary.state_dict(), of_data, mean=(0.0,) * 3, std=(1.0,) * 3)
        assert brought.classes == names
        second = brought.model(images)[1].softmax(1)[:, 1:]
        torch.testing.assert_close(second, binary(images).sigmoid())
        Classifier(**brought.architecture).load_state_dict(brought.model.state_dict())
        assert any("one output" in remark for remark in brought.remarks)


@pytest.mark.parametrize(
    "beside",
    [{"classes": ["sphere", "box", "cone"]},
     {"meta": {"class_to_idx": {"box": 1, "cone": 2, "sphere": 0}}}],
    ids=["list", "indices"],
)  # fmt: skip
def test_class_names_beside_the_weights_say_what_the_outputs_are(
    beside: dict[str, Any], tmp_path: Path, network: nn.Module
) -> None:
    path, images = tmp_path / "w.pth", torch.rand(2, 3, 64, 64)
    in_order = take(path, network.state_dict()).model(images)[1]
    brought = take(path, {"model": network.state_dict(), **beside})
    torch.testing.assert_close(brought.model(images)[1], in_order[:, [1, 2, 0]])
    of_user = import_source(settings(path, classes=CLASSES), CLASSES)
    torch.testing.assert_close(of_user.model(images)[1], in_order)
    assert any("source.classes wins over the names" in remark for remark in of_user.remarks)
    renamed = import_source(settings(path, classes=["cup", "mug", "pan"]), ["cup", "mug", "pan"])
    torch.testing.assert_close(renamed.model(images)[1], in_order)


def test_a_card_of_timm_beside_the_weights_names_the_outputs_and_counts_as_an_input(
    tmp_path: Path, network: nn.Module
) -> None:
    path, images = tmp_path / "w.pth", torch.rand(2, 3, 64, 64)
    in_order = take(path, network.state_dict()).model(images)[1]
    digests = {digest_of(path)}
    for names in (["sphere", "box", "cone"], ["cone", "sphere", "box"]):
        path.with_name("config.json").write_text(json.dumps({"label_names": names}))
        brought = import_source(settings(path), CLASSES)
        order = [names.index(name) for name in CLASSES]
        torch.testing.assert_close(brought.model(images)[1], in_order[:, order])
        digests.add(digest_of(path))
    assert any("config.json names its outputs" in remark for remark in brought.remarks)
    of_user = import_source(settings(path, classes=CLASSES), CLASSES)
    torch.testing.assert_close(of_user.model(images)[1], in_order)
    assert len(digests) == 3
    path.with_name("config.json").write_text('{"label_names": ["mug"], "other": 1}')
    torch.testing.assert_close(import_source(settings(path), CLASSES).model(images)[1], in_order)


def test_a_folder_of_another_program_is_no_model_of_sfkt(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no model\.json.*give .* the file of weights itself"):
        import_source(settings(tmp_path), CLASSES)
    with pytest.raises(ConfigError, match=r"source\.mixture: .* holds no model of `sfkt source`"):
        own_model(tmp_path, "source.mixture")


@pytest.mark.parametrize(
    ("names", "of_data", "message"),
    [
        ([], [*CLASSES, "torus"], "the checkpoint has 3 classes, the data 4"),
        (["box", "cone", "ball"], CLASSES, "only in the data: sphere; only in the model: ball"),
        (["box", "cone", "ball"], CLASSES, r"prepare the data again .*classes\.tr"),
        (["box", "cone"], CLASSES, r"has 3 outputs, source\.classes names 2"),
        (["box", "cone", "box"], CLASSES, "names a class twice"),
    ],
)
def test_the_number_of_classes_must_fit(
    names: list[str], of_data: list[str], message: str, tmp_path: Path, network: nn.Module
) -> None:
    with pytest.raises(ConfigError, match=message):
        take(tmp_path / "model.pth", network.state_dict(), of_data, classes=names)


def test_what_hangs_at_the_head_is_named(tmp_path: Path) -> None:
    state = {**models.resnet18(num_classes=3).state_dict(), "fc.scale": torch.ones(())}
    with pytest.raises(ConfigError, match=r"beside fc it holds fc\.scale"):
        take(tmp_path / "deep.pth", state, backbone="resnet18")


def test_what_a_checkpoint_holds_besides_the_network_is_left_out_and_named(
    tmp_path: Path, network: nn.Module
) -> None:
    state = dict(network.state_dict())
    path = tmp_path / "model.pth"
    for name, value in (("criterion.weight", (3,)), ("arcface.weight", (3, 1024))):
        brought = take(path, {**state, name: torch.ones(value)})
        assert any("left out" in remark and name in remark for remark in brought.remarks)
        assert_alike(brought, network)
    averaged = {f"ema.{name}": torch.zeros_like(value) for name, value in state.items()}
    with pytest.raises(ConfigError, match=r"classifier\.3; say which with source\.features"):
        take(path, averaged | state)
    assert_alike(import_source(settings(path, features="classifier.3"), CLASSES), network)


def test_tensors_of_the_training_are_left_out_wherever_they_lie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = models.resnet18(num_classes=3).eval(), tmp_path / "w.pth"
    averaged = torch.optim.swa_utils.AveragedModel(network).state_dict()
    beside = {"temperature": torch.ones(1), "class_weights": torch.ones(3),
              "layer1.0.index": torch.zeros(4, dtype=torch.int64)}  # fmt: skip
    brought = take(path, {**averaged, **beside}, backbone="resnet18")
    assert_alike(brought, network)
    assert all(name in brought.remarks[0] for name in ("n_averaged", *beside))
    with pytest.raises(ConfigError, match=r"beside fc it holds neck_weight, which"):
        take(path, {**averaged, "neck_weight": torch.ones(512)}, backbone="resnet18")


@pytest.mark.parametrize("layer", ["", "normalizer.", "0."])
def test_a_normalisation_among_the_weights_is_not_replaced_by_another(
    layer: str, tmp_path: Path, network: nn.Module
) -> None:
    path, state = tmp_path / "w.pth", prefixed("1.", network.state_dict())
    own = {f"{layer}mean": torch.full((1, 3, 1, 1), 0.5), f"{layer}std": torch.full((3,), 0.25)}
    with pytest.raises(
        ConfigError, match=rf"{layer}mean = \[0\.5, .*std = \[0\.25, .*source\.mean"
    ):
        take(path, state | own)
    brought = import_source(settings(path, mean=(0.5,) * 3, std=(0.25,) * 3), CLASSES)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(brought.model(images)[1], network((images - 0.5) / 0.25))
    mean, std = map(torch.tensor, IMAGENET)
    assert_alike(take(path, {**state, f"{layer}mean": mean, f"{layer}std": std}), network)


@pytest.mark.parametrize("prefixes", [["ema.module.", "model."], ["module.", ""]], ids=str)
def test_of_several_copies_of_a_network_the_one_that_is_named_is_taken(
    prefixes: list[str], tmp_path: Path, network: nn.Module
) -> None:
    path = tmp_path / "w.pth"
    other = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    for own in prefixes:
        state: dict[str, Any] = {}
        for prefix in prefixes:
            state |= prefixed(prefix, network.state_dict() if prefix == own else other)
        with pytest.raises(ConfigError, match=r"source\.features"):
            take(path, state)
        named = import_source(settings(path, features=f"{own}classifier.3"), CLASSES)
        assert_alike(named, network)


def test_a_head_outside_of_the_network_of_its_name_is_not_mixed_up(
    tmp_path: Path, network: nn.Module
) -> None:
    state = prefixed("model.", network.state_dict())
    state |= {f"classifier.3.{name}": torch.zeros(3, *rest) for name, rest in
              (("weight", (1024,)), ("bias", ()))}  # fmt: skip
    with pytest.raises(ConfigError, match=r"'model\.' and without it"):
        take(tmp_path / "w.pth", state)


def test_a_head_without_a_bias_is_told(tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    del state["classifier.3.bias"]
    brought = take(tmp_path / "w.pth", state)
    assert any("classifier.3 has no bias" in remark for remark in brought.remarks)


def test_weights_for_another_image_size_are_told_of_onnx(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    state = timm.create_model(name, num_classes=3, img_size=64).state_dict()
    with pytest.raises(ConfigError, match=r"pos_embed has shape .* as ONNX"):
        take(tmp_path / "w.pth", state, backbone=f"timm:{name}")


def test_a_foreign_backbone_with_a_head_is_not_taken_for_a_model_of_sfkt(
    tmp_path: Path, network: nn.Module
) -> None:
    own = {f"classifier.3.{name}": f"head.{name}" for name in ("weight", "bias")}
    state = {own.get(k, f"backbone.{k}"): value for k, value in network.state_dict().items()}
    assert_alike(take(tmp_path / "model.pth", state), network)
    with pytest.raises(DataError, match=r"written by sfkt, but its model\.json"):
        take(tmp_path / "model.pth", {**state, "mean": torch.zeros(3), "std": torch.ones(3)})


def test_a_timm_network_of_a_fixed_size_says_which_size() -> None:
    pytest.importorskip("timm")
    name = "timm:vit_tiny_patch16_384"
    model = Classifier(
        backbone=name, classes=3, width=0, bottleneck=0, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    with pytest.raises(ConfigError, match=r"64 x 64 pixels .*--set image_size=384"):
        check_image_size(model, name, 64)


@pytest.mark.parametrize("what", ["linear", "norm in front", "norm of features", "second head",
                                  "second head of levit"])  # fmt: skip
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
        backbone = "levit_128s" if "levit" in what else "deit_tiny_distilled_patch16_224"
        layer = "head.linear" if "levit" in what else "head"
        state = dict(timm.create_model(backbone, num_classes=3).state_dict())
        backbone = f"timm:{backbone}"
    if layer.startswith("fc."):
        state |= {f"{layer}.weight": state.pop("fc.weight"), f"{layer}.bias": state.pop("fc.bias")}
    for features in ("", layer) if backbone.startswith("timm") else ("",):
        with pytest.raises(ConfigError, match="as ONNX") as refused:
            take(tmp_path / "deep.pth", state, backbone=backbone, features=features)
        assert "source.features" not in str(refused.value)


def test_a_network_without_a_linear_layer_may_come_as_onnx(tmp_path: Path) -> None:
    state = models.squeezenet1_1(num_classes=3).state_dict()
    with pytest.raises(ConfigError, match="as ONNX"):
        take(tmp_path / "w.pth", state, backbone="squeezenet1_1")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "small"])
def test_another_architecture_is_refused(tmp_path: Path, network: nn.Module, backbone: str) -> None:
    with pytest.raises(ConfigError, match=f"does not fit source.backbone = '{backbone}'"):
        take(tmp_path / "model.pth", network.state_dict(), backbone=backbone)


def test_a_checkpoint_with_other_shapes_names_them(tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    state["features.0.0.weight"] = torch.zeros(16, 1, 3, 3)
    with pytest.raises(ConfigError, match=r"features\.0\.0\.weight has shape \(16, 1, 3, 3\)"):
        take(tmp_path / "grey.pth", state)


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
    saved = {"args": argparse.Namespace(lr=0.1), "state_dict": network.state_dict()}
    with pytest.raises(DataError, match="more than tensors in it") as refused:
        take(Path("run.pth"), saved)
    exec(str(refused.value).splitlines()[-1].partition(": ")[2], {"torch": torch})
    assert_alike(import_source(settings(Path("weights.pth")), CLASSES), network)


def test_a_head_of_another_name_is_the_one_that_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.resnet18(num_classes=3)
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
    state = dict(network.eval().state_dict())
    averaged = {f"ema.{name}": torch.zeros_like(value) for name, value in state.items()}
    path = tmp_path / "w.pth"
    with pytest.raises(ConfigError, match=r"fc\.1; say which with source\.features"):
        take(path, averaged | state, backbone="resnet18")
    assert_alike(take(path, averaged | state, backbone="resnet18", features="fc.1"), network)
    for wrong in ("fc.7", "bn1"):
        with pytest.raises(ConfigError, match=rf"source\.features = '{wrong}': .*w\.pth.* fc\.1"):
            take(path, state, backbone="resnet18", features=wrong)


def test_a_convolution_as_the_head_and_a_prefix_without_counters(
    tmp_path: Path, network: nn.Module
) -> None:
    state = dict(network.state_dict())
    state["classifier.3.weight"] = state["classifier.3.weight"].view(3, -1, 1, 1)
    state = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    brought = take(tmp_path / "w.pth", prefixed("net.model.", state))
    assert_alike(brought, network)
    assert "the order of the data" in brought.remarks[-1]


def test_of_several_weights_those_that_were_trained_are_taken(
    tmp_path: Path, network: nn.Module
) -> None:
    state = network.state_dict()
    averaged = {name: torch.zeros_like(value) for name, value in state.items()}
    brought = take(tmp_path / "w.pth", {"state_dict_ema": averaged, "state_dict": state})
    assert_alike(brought, network)
    assert "'state_dict' are taken" in brought.remarks[0]
    assert "['state_dict_ema']" in brought.remarks[0]
    with pytest.raises(DataError, match=r"several networks, 'student', 'teacher'"):
        take(tmp_path / "w.pth", {"student": state, "teacher": averaged})


@pytest.mark.parametrize("std", [0.0, 58.0])
def test_a_normalisation_of_other_values_than_0_to_1_is_refused(
    std: float, tmp_path: Path, network: nn.Module
) -> None:
    card = {"mean": [0.5] * 3, "std": [std] * 3}
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"config\.json: mean .* divide both by 255"):
        take(tmp_path / "w.pth", network.state_dict())
    with pytest.raises(ConfigError, match=r"source\.mean and source\.std: mean \(124"):
        take(tmp_path / "w.pth", network.state_dict(), mean=(124.0,) * 3, std=(0.5,) * 3)


def test_a_file_of_keras_is_told_of_onnx(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"model\.keras .*\.onnx"):
        import_source(settings(tmp_path / "model.keras"), CLASSES)


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
    warn_of_collapse(logits, "the student", "transfer", CLASSES)
    said = capsys.readouterr().err
    assert ("the student calls 100 % of the TR target images 'cone'" in said) is warned
