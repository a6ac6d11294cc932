"""What every backbone and translator promises, on disk and in memory."""

from __future__ import annotations

import os
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torchvision import models

from sfkt_cli.data.images import Encoding
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import sha256_file, sha256_json, write_record
from sfkt_cli.models.backbones import make_backbone, normalisation_of
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.importing import read_weights
from sfkt_cli.models.saving import (
    CARD,
    USE,
    WEIGHTS,
    Card,
    Saved,
    load_model,
    read_card,
    save_model,
    warm_start,
)
from sfkt_cli.models.translators import TRANSLATORS, make_translator
from sfkt_cli.settings.config import Config, SourceConfig, method_settings
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.source import check_image_size

BACKBONES = ("small", "resnet18")
TRANSLATOR_SIZES = {"vqgan": {"codes": 8}}
CLASSES = ["box", "cone", "sphere"]
ENCODING = Encoding("window", 500.0, 4000.0, 1, True)


def architecture(backbone: str, **more: Any) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "classes": len(CLASSES),
        "width": 4,
        "bottleneck": 8,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
    } | more


def translator_sizes(name: str, channels: int) -> dict[str, Any]:
    return {"name": name, "channels": channels, "width": 4, **TRANSLATOR_SIZES.get(name, {})}


def stirred(module: nn.Module) -> nn.Module:
    """The module after a training step's worth of changes to parameters and statistics."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.05 * torch.rand_like(tensor)).add_(0.001)
    return module


def classifier(backbone: str, **more: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**architecture(backbone, **more))


def save(folder: Path, module: nn.Module, **more: Any) -> None:
    kept: dict[str, Any] = {
        "kind": "classifier",
        "architecture": architecture("small"),
        "classes": CLASSES,
        "encoding": ENCODING,
    }
    save_model(Stage("test", folder, Config(seed=5), {"transfer.h5": "abc"}), module, **kept | more)


@pytest.mark.parametrize("method", ["tgkt", "distill"])
@pytest.mark.parametrize(
    ("pretrained", "bottleneck", "expected"),
    [(True, 8, (0.01, 0.1)), (True, 0, (0.01, 0.3)), (False, 8, (0.03, 1.0))],
)
def test_a_student_without_a_bottleneck_learns_faster(
    method: str, pretrained: bool, bottleneck: int, expected: tuple[float, float]
) -> None:
    student = classifier("small", bottleneck=bottleneck)
    settings, layer = method_settings(Config(), method), student.has_bottleneck
    assert settings.rates(pretrained=pretrained, bottleneck=layer) == expected
    fixed = settings.model_copy(update={"backbone_rate": 0.5})
    assert fixed.rates(pretrained=pretrained, bottleneck=layer)[1] == 0.5


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [16, 33, 48])
@pytest.mark.parametrize("bottleneck", [0, 8])
def test_classifiers_take_any_size_of_image(backbone: str, size: int, bottleneck: int) -> None:
    model = classifier(backbone, bottleneck=bottleneck)
    images = torch.rand(2, 3, size, size, requires_grad=True)
    features, logits = model.train()(images)
    assert logits.shape == (2, len(CLASSES))
    assert features.shape == (2, bottleneck or (16 if backbone == "small" else 512))
    torch.testing.assert_close(model.head(features), logits)
    torch.autograd.backward(logits.square().sum())
    assert images.grad is not None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    alone = model.eval()(images[:1])[1]
    torch.testing.assert_close(alone, model(images)[1][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_normalisation_travels_inside(backbone: str) -> None:
    plain = classifier(backbone, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    model = classifier(backbone)
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    std = torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    expected = plain.eval()((images - mean) / std)[1]
    torch.testing.assert_close(model.eval()(images)[1], expected)


@pytest.mark.parametrize("name", TRANSLATORS)
@pytest.mark.parametrize("size", [(16, 16), (33, 33), (48, 48), (17, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_translations_have_the_size_of_the_image(
    name: str, size: tuple[int, int], channels: int
) -> None:
    torch.manual_seed(0)
    translator = make_translator(**translator_sizes(name, channels))
    encoded = torch.rand(2, channels, *size, requires_grad=True)
    bridged = translator.train()(encoded)
    assert bridged.shape == (2, 3, *size)
    assert bridged.min() >= 0
    assert bridged.max() <= 1
    torch.autograd.backward(bridged.square().sum())
    assert encoded.grad is not None
    assert torch.isfinite(encoded.grad).all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bottleneck", [0, 8])
def test_a_classifier_comes_back_bit_for_bit(
    tmp_path: Path, backbone: str, bottleneck: int
) -> None:
    model = stirred(classifier(backbone, bottleneck=bottleneck)).eval()
    built = architecture(backbone, bottleneck=bottleneck)
    save(tmp_path, model, architecture=built, method="tgkt")
    saved = load_model(tmp_path)
    assert saved.card.classes == CLASSES
    assert saved.card.encoding == ENCODING
    assert saved.card.method == "tgkt"
    assert saved.card.normalisation == {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    assert saved.card.seed == 5
    assert saved.card.inputs == {"transfer.h5": "abc"}
    assert not saved.module.training
    before, after = model.state_dict(), saved.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    first = (tmp_path / "model.safetensors").read_bytes()
    save(tmp_path, saved.module, architecture=built)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_a_network_that_uses_a_tensor_twice_is_saved(tmp_path: Path) -> None:
    architecture: dict[str, Any] = {
        "backbone": "small", "classes": 2, "width": 4, "bottleneck": 8,
        "mean": (0.5,) * 3, "std": (0.2,) * 3,
    }  # fmt: skip
    model = Classifier(**architecture).eval()
    model.backbone.norm.bias = model.backbone.norm.weight  # type: ignore[union-attr]
    save_model(
        Stage("test", tmp_path, Config(), {}), model, kind="classifier",
        architecture=architecture, classes=["a", "b"], encoding=None,
    )  # fmt: skip
    again, images = load_model(tmp_path).module, torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images)[1], model(images)[1])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    built = translator_sizes(name, 1)
    translator = stirred(make_translator(**built)).eval()
    save(tmp_path, translator, kind="translator", architecture=built, classes=[])
    saved = load_model(tmp_path)
    encoded = torch.rand(2, 1, 24, 24).contiguous(memory_format=torch.channels_last)
    assert torch.equal(saved.module(encoded), load_model(tmp_path).module(encoded))
    before, after = translator.state_dict(), saved.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_whose_name_is_not_utf8_holds_models(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save(folder, classifier("small"))
    assert load_model(folder).card.classes == CLASSES
    assert read_weights(folder / WEIGHTS)[0]


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "gone"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, classifier("small"))
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "gone":
        weights.unlink()
    elif damage == "other":
        save(tmp_path / "other", stirred(classifier("small")))
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    else:
        content[len(content) // 2] ^= 1
        weights.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(DataError) as caught:
        load_model(tmp_path)
    assert str(weights) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": {}},
        {"architecture": None},
        {"architecture": architecture("resnet18")},
        {"architecture": architecture("small", classes=4)},
        {"architecture": architecture("small", surprise=1)},
        {"encoding": {"kind": "window"}},
        {"kind": "translator"},
        {"classes": None},
    ],
)
def test_a_card_that_does_not_fit_the_weights_is_named(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    save(tmp_path, classifier("small"))
    path = tmp_path / "model.json"
    write_record(path, read_card(path).as_json() | change)
    with pytest.raises(DataError) as caught:
        load_model(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{", "\ufffe"])
def test_a_damaged_card_is_named(tmp_path: Path, content: str | None) -> None:
    save(tmp_path, classifier("small"))
    path = tmp_path / "model.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_model(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_frozen_model_stays_as_it_is_and_passes_gradients(backbone: str) -> None:
    model = freeze(stirred(classifier(backbone)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    for _ in range(3):
        torch.autograd.backward(model(images)[1].square().sum())
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("resnet81", "resnet18"),
        ("timm:resnet18x", "timm"),
        ("timm:resnet18.none", "tag"),
        ("Small", "resnet18"),
    ],
)
def test_an_unknown_backbone_is_named_with_the_nearest(backbone: str, told: str) -> None:
    if told == "tag":
        pytest.importorskip("timm")
    with pytest.raises(ConfigError) as caught:
        classifier(backbone)
    assert repr(backbone) in str(caught.value)
    assert told in str(caught.value)


def test_weights_that_cannot_be_downloaded_are_told_in_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(name: str, **options: Any) -> nn.Module:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(ConfigError, match=r"of resnet18 could not .*Name or.*source\.checkpoint"):
        make_backbone("resnet18", width=8, pretrained=True)


def test_the_small_backbone_has_no_published_weights() -> None:
    with pytest.raises(ConfigError, match=r"source\.backbone"):
        classifier("small", pretrained=True)


@pytest.mark.parametrize(
    ("name", "network"), [("googlenet", models.GoogLeNet), ("inception_v3", models.Inception3)]
)
def test_networks_with_classifiers_on_the_side_are_taken_without_them(
    monkeypatch: pytest.MonkeyPatch, name: str, network: Any
) -> None:
    """Published weights are as torchvision would fetch them; images are normalised as it says."""
    published = network(init_weights=False, transform_input=True)
    weights = models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: published.state_dict())
    backbone, size = make_backbone(name, width=4, pretrained=True)
    images = torch.rand(2, 3, 80, 80)
    again, _ = make_backbone(name, width=4, pretrained=False)
    again.load_state_dict(backbone.state_dict())
    published.fc = nn.Identity()
    preset = weights.DEFAULT.transforms()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (preset.mean, preset.std))
    ours = normalisation_of(SourceConfig(backbone=name))
    own_mean, own_std = (torch.tensor(each).view(3, 1, 1) for each in (ours.mean, ours.std))
    expected = published.eval()((images - mean) / std)
    torch.testing.assert_close(
        backbone.eval()((images - own_mean) / own_std), expected, rtol=1e-3, atol=1e-4
    )
    assert backbone.train()(images).shape == (2, size)


def test_an_unknown_translator_is_named_with_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        make_translator("transformer", channels=1, width=4)
    assert all(name in str(caught.value) for name in ["'transformer'", *TRANSLATORS])


def test_a_backbone_of_one_size_only_refuses_others_with_a_way_out() -> None:
    model = Classifier(
        backbone="vit_b_16", classes=3, width=8, bottleneck=8, mean=(0, 0, 0), std=(1, 1, 1)
    )
    with pytest.raises(ConfigError, match=r"vit_b_16.*32 x 32.*image_size=224"):
        check_image_size(model, "vit_b_16", 32)


def test_a_name_of_timm_without_its_prefix_is_told() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"timm has it: write timm:resnet26d; near: "):
        make_backbone("resnet26d", width=4, pretrained=False)


def test_a_number_that_json_lacks_is_refused_before_it_is_lost(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, classifier("small"), architecture=architecture("small", gain=-torch.inf))
    assert not (tmp_path / CARD).exists()


@pytest.mark.parametrize(("kind", "revision"), [("shading", 1), ("shading", 2), ("window", 1)])
def test_a_model_of_earlier_shading_is_refused_and_other_cards_stay_as_they_were(
    tmp_path: Path, kind: Any, revision: int
) -> None:
    encoding = Encoding(kind, 500.0, 4000.0, 1, True, revision=revision)
    save(tmp_path, classifier("small"), encoding=encoding)
    card = read_card(tmp_path / CARD).as_json()
    assert ("revision" in card["encoding"]) == (revision > 1)
    if (kind, revision) == ("shading", 1):
        with pytest.raises(DataError, match="missing depth was black"):
            load_model(tmp_path)
    else:
        assert load_model(tmp_path).card.encoding == encoding


def test_a_model_that_has_the_earlier_name_of_its_encoding_is_read(tmp_path: Path) -> None:
    encoding = Encoding("standardised", 0.0, 255.0, 1, False)
    save(tmp_path, classifier("small"), encoding=encoding)
    weights, card = tmp_path / WEIGHTS, read_card(tmp_path / CARD).as_json()
    card["encoding"]["kind"] = "percentile"
    used_as = sha256_json({name: card.get(name) for name in USE})
    weights.write_bytes(to_bytes(load_file(weights), {"used_as": used_as}))
    write_record(tmp_path / CARD, card | {"sha256": sha256_file(weights)})
    assert load_model(tmp_path).card.encoding == encoding


def test_weights_that_were_saved_for_another_use_are_refused(tmp_path: Path) -> None:
    save(tmp_path, classifier("small"))
    write_record(tmp_path / CARD, read_card(tmp_path / CARD).as_json() | {"encoding": None})
    with pytest.raises(DataError, match="saved for another use"):
        load_model(tmp_path)


def test_a_warm_start_takes_all_but_the_translator_in_front() -> None:
    fronts, bodies = ([nn.Linear(1, 1) for _ in "ab"] for _ in "cd")
    earlier, module = (
        nn.ModuleDict({"front": front, "body": body})
        for front, body in zip(fronts, bodies, strict=True)
    )
    translator = fronts[1].weight.clone()

    def earlier_of(**architecture: Any) -> Saved:
        card = Card(
            kind="classifier", architecture=architecture, classes=CLASSES, normalisation={},
            encoding=None, inputs={"source": "0" * 64}, seed=0, versions={}, sha256="0" * 64,
        )  # fmt: skip
        return Saved(earlier, card)

    saved = earlier_of()
    warm_start(saved, module, {}, saved)
    assert torch.equal(bodies[1].weight, bodies[0].weight)
    assert torch.equal(fronts[1].weight, translator)
    warm_start(saved, module, {"front": {"name": "identity"}}, saved)
    assert torch.equal(fronts[1].weight, translator)
    with pytest.raises(DataError, match=r"has width 4 \(here 8\): give this run") as refused:
        warm_start(earlier_of(width=4, graph={"nodes": []}), module,
                   {"width": 8, "graph": {"nodes": []}, "front": {}}, saved)  # fmt: skip
    assert "graph" not in str(refused.value)
