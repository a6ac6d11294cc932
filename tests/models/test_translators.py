"""What every translator promises; the quantiser; the terms that TGMB computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.data.images import Encoding
from sfkt_cli.methods.tgmb import Tgmb
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.models.translators import TRANSLATORS, Front, Quantiser, make_translator
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.stage import Stage

ENCODING = Encoding("window", 0.0, 1000.0, 1, True)
CLASSIFIER: dict[str, Any] = {
    "backbone": "small", "classes": 3, "width": 4, "bottleneck": 8,
    "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
}  # fmt: skip


def architecture(name: str, channels: int = 1) -> dict[str, Any]:
    more = {"codes": 8} if name == "vqgan" else {}
    return {"name": name, "channels": channels, "width": 4, **more}


def laid_out_as_loaded(module: nn.Module) -> nn.Module:
    """Channels last, as load_model leaves it: another layout rounds differently on some CPUs."""
    return module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_translations_are_rgb_images_of_the_same_size(name: str, channels: int) -> None:
    torch.manual_seed(0)
    translator = make_translator(**architecture(name, channels)).eval()
    bridged = translator(torch.rand(2, channels, 21, 18))
    assert bridged.shape == (2, 3, 21, 18)
    assert float(bridged.detach().min()) >= 0
    assert float(bridged.detach().max()) <= 1


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_saved_translator_says_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    translator = make_translator(**architecture(name)).eval()
    save_model(
        Stage("test", tmp_path, Config(), {}), translator, kind="translator",
        architecture=architecture(name), classes=[], encoding=ENCODING,
    )  # fmt: skip
    images = torch.rand(2, 1, 16, 16)
    expected = laid_out_as_loaded(translator)(images)
    assert torch.equal(load_model(tmp_path).module(images), expected)


@pytest.mark.parametrize("name", sorted(TRANSLATORS.keys() - {"identity"}))  # which has none
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    translator = make_translator(**architecture(name)).train()
    translator(torch.rand(4, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in translator.parameters())


@pytest.mark.parametrize("name", TRANSLATORS)
def test_every_translator_can_be_exported(name: str) -> None:
    torch.manual_seed(0)
    translator = make_translator(**architecture(name)).eval().requires_grad_(False)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(
        translator, (torch.rand(2, 1, 16, 16),), dynamic_shapes=(batch,)
    ).module()
    images = torch.rand(5, 1, 16, 16)
    torch.testing.assert_close(exported(images), translator(images))


def test_the_quantiser_takes_the_nearest_entry_and_passes_the_gradient() -> None:
    quantiser = Quantiser(3, 2).eval()
    quantiser.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    vectors = torch.tensor([[0.9, 0.2], [0.1, 1.8]]).T.reshape(1, 2, 1, 2).requires_grad_()
    quantised, commitment = quantiser(vectors)
    assert quantised[0, :, 0].T.tolist() == [[1, 0], [0, 2]]
    assert float(commitment.detach()) == pytest.approx((0.1**2 + 0.2**2 + 0.1**2 + 0.2**2) / 4)
    (passed,) = torch.autograd.grad(quantised.sum(), vectors)
    assert torch.equal(passed, torch.ones_like(vectors))


def test_the_codebook_follows_the_vectors_and_uses_all_its_entries() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    quantiser = Quantiser(4, 2).train()
    for _ in range(200):
        vectors = centres.repeat(16, 1) + 0.1 * torch.randn(64, 2)
        quantiser(vectors.T.reshape(1, 2, 8, 8))
    nearest = torch.cdist(centres, quantiser.codebook)
    assert float(nearest.min(dim=1).values.max()) < 0.3
    before = quantiser.codebook.clone()
    quantiser.eval()(torch.randn(1, 2, 4, 4))
    assert torch.equal(before, quantiser.codebook)


def slow_ssim(a: Any, b: Any) -> float:
    """Structural similarity of pictures (N, C, H, W), window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    window /= window.sum()
    values = []
    for n, c, y, x in np.ndindex(*a.shape[:2], a.shape[2] - 10, a.shape[3] - 10):
        u, v = a[n, c, y : y + 11, x : x + 11], b[n, c, y : y + 11, x : x + 11]
        mu, mv = (window * u).sum(), (window * v).sum()
        su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
        suv = (window * (u - mu) * (v - mv)).sum()
        top = (2 * mu * mv + 1e-4) * (2 * suv + 9e-4)
        values.append(top / ((mu**2 + mv**2 + 1e-4) * (su + sv + 9e-4)))
    return float(np.mean(values))


def test_reconstruction_losses_against_numpy() -> None:
    random = np.random.default_rng(0)
    first, second = random.random((2, 2, 3, 14, 15)).astype(np.float32)
    second = 0.5 * (first + second)
    tensors = torch.from_numpy(first), torch.from_numpy(second)
    expected = 1 - slow_ssim(first, second)
    assert float(losses.structural_dissimilarity(*tensors)) == pytest.approx(expected, abs=1e-4)
    assert float(losses.structural_dissimilarity(tensors[0], tensors[0])) == pytest.approx(0)
    assert float(losses.absolute_error(*tensors)) == pytest.approx(np.abs(first - second).mean())


def test_half_a_step_along_the_gradient_of_dissimilarity_lowers_it() -> None:
    torch.manual_seed(0)
    rgb = torch.rand(1, 3, 16, 16)
    bridged = torch.rand(1, 3, 16, 16, requires_grad=True)
    before = losses.structural_dissimilarity(bridged, rgb)
    (slope,) = torch.autograd.grad(before, bridged)
    after = losses.structural_dissimilarity(bridged - 0.5 * slope, rgb)
    assert float(after.detach()) < float(before.detach())


def make_tgmb(**more: Any) -> Tgmb:
    torch.manual_seed(0)
    name = more.pop("name", "pointwise")
    weights = {"rec": 1.0, "d": 1.0, "im": 1.0, "f": 1.0} | more.pop("weights", {})
    return Tgmb(
        make_translator(**architecture(name)), freeze(Classifier(**CLASSIFIER)), ENCODING,
        weights=weights, **{"rec_loss": "mse", "d_on": "feature", **more},
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "ti_rgb": torch.randint(0, 256, (4, 32, 32, 3), generator=generator).to(torch.uint8),
        "ti_target": torch.randint(1, 1000, (4, 32, 32), generator=generator),
        "tr_target": torch.randint(1, 1000, (4, 32, 32), generator=generator),
    }


@pytest.mark.parametrize("rec_loss", ["mse", "l1", "ssim"])
@pytest.mark.parametrize("d_on", ["feature", "image"])
def test_tgmb_computes_the_terms_that_are_asked_for(rec_loss: str, d_on: str) -> None:
    terms = make_tgmb(rec_loss=rec_loss, d_on=d_on).train()(batch())
    assert set(terms) == {"rec", "d", "im", "f"}
    assert all(term.shape == () and torch.isfinite(term) for term in terms.values())


def test_a_vector_quantised_translator_adds_its_terms() -> None:
    objective = make_tgmb(name="vqgan", weights={"commit": 0.25, "patch": 0.1})
    terms = objective.train()(batch())
    assert set(terms) == {"rec", "d", "im", "f", "commit", "patch"}
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in objective.translator.parameters())
    assert all(p.grad is not None for p in objective.patch_discriminator.parameters())


def test_one_backward_pass_sets_the_translator_against_the_discriminator() -> None:
    objective = make_tgmb(d_on="image").train()
    loss = objective(batch())["d"]
    loss.backward()
    signs = {
        objective.discriminator: -1,  # descends the loss
        objective.translator: +1,  # climbs it: its gradient was turned round
    }
    for module, sign in signs.items():
        stepped = make_tgmb(d_on="image").train()
        stepped.load_state_dict(objective.state_dict())
        other = stepped.discriminator if sign < 0 else stepped.translator
        with torch.no_grad():
            for parameter, moved in zip(module.parameters(), other.parameters(), strict=True):
                assert parameter.grad is not None
                moved.sub_(parameter.grad, alpha=1e-2)
        assert sign * float((stepped(batch())["d"] - loss).detach()) > 0


def test_a_translator_in_front_stays_frozen_and_is_saved_with_its_student(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Classifier(**CLASSIFIER)
    student.front = Front(make_translator(**architecture("unet")), 1)
    before = {name: value.clone() for name, value in student.front.state_dict().items()}
    student.train()
    encoded = torch.rand(4, 1, 16, 16)
    student(encoded.expand(-1, 3, -1, -1))[1].sum().backward()
    assert all(torch.equal(before[k], v) for k, v in student.front.state_dict().items())
    assert all(parameter.grad is None for parameter in student.front.parameters())
    save_model(
        Stage("test", tmp_path, Config(), {}), student, kind="classifier",
        architecture=CLASSIFIER | {"front": architecture("unet")}, classes=["a", "b", "c"],
        encoding=ENCODING,
    )  # fmt: skip
    loaded = load_model(tmp_path).module
    images = encoded.expand(-1, 3, -1, -1)
    assert torch.equal(loaded(images)[1], laid_out_as_loaded(student).eval()(images)[1])
    assert torch.equal(student.front(images), student.front.get_submodule("translator")(encoded))
