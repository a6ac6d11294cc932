"""Every equation against a loop written from its docstring: values, gradients, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli import losses

Numbers = NDArray[np.float64]
Loss = Callable[..., Tensor]
Oracle = Callable[..., float]


def softmax_row(row: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def slow_reconstruction(bridged: Numbers, rgb: Numbers) -> float:
    total = 0.0
    for place in np.ndindex(bridged.shape):
        total += float(bridged[place] - rgb[place]) ** 2
    return total / bridged.size


def slow_domain_adversarial(ti: Numbers, tr: Numbers) -> float:
    on_ti = sum(-math.log(1 / (1 + math.exp(-d))) for d in ti) / len(ti)
    on_tr = sum(-math.log(1 - 1 / (1 + math.exp(-d))) for d in tr) / len(tr)
    return (on_ti + on_tr) / 2


def slow_entropy(logits: Numbers) -> float:
    total = 0.0
    for row in logits:
        total -= sum(p * math.log(p) for p in softmax_row(list(row)))
    return total / len(logits)


def slow_diversity(logits: Numbers) -> float:
    rows = [softmax_row(list(row)) for row in logits]
    mean = [sum(row[k] for row in rows) / len(rows) for k in range(logits.shape[1])]
    return -sum(q * math.log(q) for q in mean)


def slow_information_maximisation(logits: Numbers) -> float:
    return slow_entropy(logits) - slow_diversity(logits)


def slow_feature_matching(features: Numbers, partners: Numbers) -> float:
    total = 0.0
    for b, d in np.ndindex(features.shape):
        total += float(features[b, d] - partners[b, d]) ** 2
    return total / features.size


def slow_perceptual(seen: Numbers, partners: Numbers, variance: float = 1.0) -> float:
    """Of one level."""
    total = 0.0
    for place in np.ndindex(seen.shape):
        total += float(seen[place] - partners[place]) ** 2
    return total / seen.size / variance


def slow_feature_matching_norm(features: Numbers, partners: Numbers) -> float:
    total = 0.0
    for b, d in np.ndindex(features.shape):
        total += float(features[b, d] - partners[b, d]) ** 2
    return math.sqrt(total)


def slow_distillation(logits: Numbers, teacher: Numbers) -> float:
    total = 0.0
    for row, told in zip(logits, teacher, strict=True):
        said = softmax_row(list(row))
        total += sum(t * math.log(t / p) for t, p in zip(told, said, strict=True) if t > 0)
    return total / len(logits)


def random_case(name: str, seed: int) -> tuple[Loss, Oracle, list[Numbers]]:
    """A loss, its loop, and its arguments: the first gets a gradient."""
    random = np.random.default_rng(seed)
    batch, classes = int(random.integers(1, 6)), int(random.integers(2, 7))
    logits = random.normal(0, 3, (batch, classes))
    images = random.random((2, batch, 3, 2, 3))
    features = random.normal(0, 2, (2, batch, 7))
    arguments: dict[str, tuple[Oracle, list[Numbers]]] = {
        "reconstruction": (slow_reconstruction, list(images)),
        "domain_adversarial": (slow_domain_adversarial, [logits[0], random.normal(0, 3, 4)]),
        "entropy": (slow_entropy, [logits]),
        "diversity": (slow_diversity, [logits]),
        "information_maximisation": (slow_information_maximisation, [logits]),
        "feature_matching": (slow_feature_matching, list(features)),
        "feature_matching_norm": (slow_feature_matching_norm, list(features)),
        "distillation": (
            slow_distillation,
            [logits, random.dirichlet(np.full(classes, 0.7), batch)],
        ),
    }
    oracle, values = arguments[name]
    return getattr(losses, name), oracle, values


PLAIN = (
    "reconstruction",
    "domain_adversarial",
    "entropy",
    "diversity",
    "information_maximisation",
    "feature_matching",
    "feature_matching_norm",
    "distillation",
)


def finite_differences(oracle: Oracle, values: list[Numbers], number: int = 0) -> Numbers:
    """The gradient of a loop for one of its arguments, by central differences in float64."""
    gradient = np.zeros_like(values[number])
    for place in np.ndindex(gradient.shape):
        moved = []
        for step in (1e-6, -1e-6):
            changed = values[number].copy()
            changed[place] += step
            moved.append(oracle(*values[:number], changed, *values[number + 1 :]))
        gradient[place] = (moved[0] - moved[1]) / 2e-6
    return gradient


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_value_and_gradient_equal_a_slow_loop(name: str, seed: int) -> None:
    loss, oracle, values = random_case(name, seed)
    tensors = [torch.tensor(value, dtype=torch.float32) for value in values]
    tensors[0].requires_grad_()
    result = loss(*tensors)
    assert result.dtype == torch.float32
    assert result.shape == ()
    assert float(result.detach()) == pytest.approx(oracle(*values), rel=2e-5, abs=2e-6)
    torch.autograd.backward(result)
    assert tensors[0].grad is not None
    expected = torch.tensor(finite_differences(oracle, values), dtype=torch.float32)
    torch.testing.assert_close(tensors[0].grad, expected, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("name", ["feature_matching", "feature_matching_norm", "distillation"])
def test_partners_and_teachers_are_constants(name: str) -> None:
    loss, _, values = random_case(name, 3)
    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    torch.autograd.backward(loss(*tensors))
    assert tensors[0].grad is not None
    assert tensors[0].grad.abs().sum() > 0
    assert tensors[1].grad is None


def test_perceptual_is_the_mean_of_its_levels_and_partners_are_constants() -> None:
    random = np.random.default_rng(2)
    shapes = ((3, 2, 4, 5), (3, 6, 2, 1))
    seen, partners = ([random.normal(1, 2, shape) for shape in shapes] for _ in range(2))
    tensors = [torch.tensor(level, dtype=torch.float32, requires_grad=True) for level in seen]
    told = [torch.tensor(level, dtype=torch.float32, requires_grad=True) for level in partners]
    variances = [4.0, 0.5]
    result = losses.perceptual(tensors, told, variances)
    each = [slow_perceptual(*level) for level in zip(seen, partners, variances, strict=True)]
    assert float(result.detach()) == pytest.approx(sum(each) / 2, rel=2e-5)
    torch.autograd.backward(result)
    for number, tensor in enumerate(tensors):
        expected = finite_differences(slow_perceptual, [seen[number], partners[number]])
        expected = expected / 2 / variances[number]
        assert tensor.grad is not None
        torch.testing.assert_close(
            tensor.grad, torch.tensor(expected).float(), rtol=1e-3, atol=1e-5
        )
    assert all(level.grad is None for level in told)


def test_perceptual_bears_the_scaled_gradients_of_fp16() -> None:
    generator = torch.Generator().manual_seed(5)
    level, partner = (torch.rand(2, 8, 16, 16, generator=generator).half() for _ in range(2))
    level.requires_grad_()
    torch.autograd.backward(losses.perceptual([level], [partner], [1e-3]) * 2.0**12)
    assert level.grad is not None
    expected = 2.0**12 / 1e-3 * 2 / level.numel() * (level.detach() - partner)
    torch.testing.assert_close(level.grad, expected, rtol=1e-2, atol=1e-1)


def test_perceptual_leaves_the_rows_that_have_no_partner() -> None:
    generator = torch.Generator().manual_seed(4)
    level = torch.rand(5, 2, 3, 3, generator=generator, requires_grad=True)
    partner = torch.rand(2, 2, 3, 3, generator=generator)
    torch.autograd.backward(losses.perceptual([level], [partner], [0.5]))
    alone = level[:2].detach().clone().requires_grad_()
    torch.autograd.backward(losses.perceptual([alone], [partner], [0.5]))
    assert level.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(level.grad[:2], alone.grad)
    assert not level.grad[2:].any()


def test_both_domains_get_a_gradient() -> None:
    _, oracle, values = random_case("domain_adversarial", 5)
    ti, tr = (torch.tensor(value, dtype=torch.float32, requires_grad=True) for value in values)
    torch.autograd.backward(losses.domain_adversarial(ti, tr))
    for number, tensor in enumerate((ti, tr)):
        assert tensor.grad is not None
        expected = torch.tensor(finite_differences(oracle, values, number), dtype=torch.float32)
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-5)


def test_logits_of_the_discriminator_may_have_a_second_axis() -> None:
    ti, tr = torch.randn(5), torch.randn(3)
    flat = losses.domain_adversarial(ti, tr)
    torch.testing.assert_close(losses.domain_adversarial(ti[:, None], tr[:, None]), flat)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_taken_to_float32_first(name: str, kind: torch.dtype) -> None:
    loss, _, values = random_case(name, 11)
    low = [torch.tensor(value).to(kind) for value in values]
    result = loss(*low)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(*[value.float() for value in low]))


def test_information_maximisation_is_least_at_the_frequencies_of_the_prior() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 3))
    prior = np.array([0.6, 0.3, 0.1])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    expected = slow_entropy(logits) + float((mean * np.log(mean / prior)).sum()) - math.log(3)
    given, equal = torch.tensor(logits), torch.full((3,), 1 / 3)
    loss = losses.information_maximisation(given, torch.tensor(prior).float())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    plain = losses.information_maximisation(given)
    assert float(losses.information_maximisation(given, equal)) == pytest.approx(float(plain))
    certain = 50 * torch.eye(3)[[0] * 6 + [1] * 3 + [2]]
    here = losses.information_maximisation(certain, torch.tensor(prior).float())
    assert float(here) == pytest.approx(-math.log(3), abs=1e-5)
    assert float(here) < float(losses.information_maximisation(certain, equal)) - 0.1


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize(
    "name", ["entropy", "diversity", "information_maximisation", "distillation"]
)
def test_extreme_logits_give_finite_values_and_gradients(name: str, size: float) -> None:
    logits = size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    logits.requires_grad_()
    more = [torch.eye(3)] if name == "distillation" else []
    loss = getattr(losses, name)(logits, *more)
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_extreme_discriminators_pseudo_labels_and_equal_features_stay_finite() -> None:
    logits = torch.tensor([[1e30, -1e30], [-1e30, 1e30]], requires_grad=True)
    features = torch.zeros(2, 3, requires_grad=True)
    total = (
        losses.domain_adversarial(logits[0], logits[1])
        + losses.pseudo_label_cross_entropy(logits, torch.tensor([1, 1]))
        + losses.feature_matching_norm(features, torch.zeros(2, 3))
    )
    torch.autograd.backward(total)
    assert torch.isfinite(total)
    for tensor in (logits, features):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_rows_are_summed_and_divided_by_the_batch() -> None:
    random = np.random.default_rng(2)
    logits, teacher = random.normal(size=(5, 4)), random.dirichlet(np.ones(4), 5)
    labels = random.integers(4, size=5)
    divergence = cross_entropy = 0.0
    for row in range(5):
        said = softmax_row(list(logits[row]))
        rows = [t * math.log(t / p) for t, p in zip(teacher[row], said, strict=True)]
        divergence += sum(rows) / 5
        cross_entropy -= math.log(said[labels[row]]) / 5
    student = torch.tensor(logits, requires_grad=True)
    found = losses.distillation(student, torch.tensor(teacher))
    assert float(found.detach()) == pytest.approx(divergence, rel=1e-5)
    found = losses.pseudo_label_cross_entropy(student, torch.tensor(labels))
    assert float(found.detach()) == pytest.approx(cross_entropy, rel=1e-5)
    torch.autograd.backward(found)
    assert student.grad is not None
    for row in range(5):
        said = softmax_row(list(logits[row]))
        said[labels[row]] -= 1
        expected = [value / 5 for value in said]
        assert student.grad[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_gradient_that_goes_back_is_turned_round() -> None:
    features = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    passed = losses.reverse_gradient(features)
    assert torch.equal(passed, features)
    torch.autograd.backward((passed * torch.arange(6.0).view(3, 2)).sum())
    assert features.grad is not None
    assert torch.equal(features.grad, -torch.arange(6.0, dtype=torch.float64).view(3, 2))


def norms(seed: int, layers: int) -> list[tuple[Numbers, nn.BatchNorm2d]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        norm = nn.BatchNorm2d(4)
        norm.running_mean = torch.tensor(random.normal(size=4), dtype=torch.float32)
        norm.running_var = torch.tensor(random.random(4) + 0.5, dtype=torch.float32)
        found.append((random.normal(1, 2, (3, 4, 2, 2)), norm))
    return found


def slow_batch_norm_matching(layers: list[tuple[Numbers, nn.BatchNorm2d]]) -> float:
    total = 0.0
    for number, (activations, norm) in enumerate(layers):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        means = variances = 0.0
        for channel in range(activations.shape[1]):
            values = [activations[b, channel, h, w] for b, h, w in np.ndindex(3, 2, 2)]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            means += (mean - float(norm.running_mean[channel])) ** 2
            variances += (variance - float(norm.running_var[channel])) ** 2
        total += (10 if number == 0 else 1) * (math.sqrt(means) + math.sqrt(variances))
    return total


def test_batch_norm_matching_equals_a_slow_loop() -> None:
    layers = norms(0, 3)
    tensors = [torch.tensor(seen, dtype=torch.float32, requires_grad=True) for seen, _ in layers]
    loss = losses.batch_norm_matching(
        [(tensor, norm) for tensor, (_, norm) in zip(tensors, layers, strict=True)]
    )
    assert float(loss.detach()) == pytest.approx(slow_batch_norm_matching(layers), rel=1e-5)
    torch.autograd.backward(loss)

    def moved(number: int) -> Oracle:
        return lambda seen: slow_batch_norm_matching(
            [(seen if n == number else s, norm) for n, (s, norm) in enumerate(layers)]
        )

    for number, tensor in enumerate(tensors):
        assert tensor.grad is not None
        expected = finite_differences(moved(number), [layers[number][0]])
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_batch_norm_matching_is_zero_for_the_statistics_of_the_source() -> None:
    activations = torch.randn(64, 4, 3, 3, requires_grad=True)
    norm = nn.BatchNorm2d(4, momentum=None)
    norm.train()(activations)
    assert norm.running_var is not None
    norm.running_var *= (64 * 9 - 1) / (64 * 9)  # it stores the unbiased variance
    loss = losses.batch_norm_matching([(activations, norm)])
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert activations.grad is not None
    assert torch.isfinite(activations.grad).all()


def test_batch_norm_without_statistics_is_refused() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        losses.batch_norm_matching([(torch.zeros(2, 4, 1, 1), norm)])


def value(name: str, *tensors: Any) -> float:
    return float(getattr(losses, name)(*tensors))


def test_what_large_and_small_values_mean() -> None:
    """The claims of the docstrings."""
    classes = 5
    certain, flat = 100 * torch.eye(classes), torch.zeros(classes, classes)
    collapsed = certain[:1].expand(classes, -1)
    log_k = math.log(classes)
    close = pytest.approx

    assert value("entropy", flat) == close(log_k)
    assert value("entropy", certain) == close(0, abs=1e-6)
    assert value("diversity", certain) == close(log_k)
    assert value("diversity", collapsed) == close(0, abs=1e-6)
    assert value("information_maximisation", certain) == close(-log_k)
    assert value("information_maximisation", collapsed) == close(0, abs=1e-6)
    assert value("information_maximisation", flat) == close(0, abs=1e-6)

    teacher = torch.eye(classes)
    assert value("distillation", certain, teacher) == close(0, abs=1e-6)
    assert value("distillation", flat, teacher) == close(log_k)
    assert value("distillation", certain.roll(1, 0), teacher) > log_k

    right = torch.arange(classes)
    assert value("pseudo_label_cross_entropy", certain, right) == close(0, abs=1e-6)
    assert value("pseudo_label_cross_entropy", flat, right) == close(log_k)

    yes, no = torch.full((4,), 30.0), torch.full((4,), -30.0)
    assert value("domain_adversarial", yes, no) == close(0, abs=1e-6)
    assert value("domain_adversarial", 0 * yes, 0 * no) == close(math.log(2))
    assert value("domain_adversarial", no, yes) == close(30)

    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(8, 3, 32, 32, generator=generator)
    assert value("reconstruction", picture, picture) == 0
    assert value("reconstruction", torch.full_like(picture, 0.5), picture) == close(
        1 / 12, rel=0.02
    )

    features = torch.randn(2, 500, 64, generator=generator)
    variance = float(features.var())
    assert value("feature_matching", features[0], features[0]) == 0
    assert value("feature_matching", features[0], features[1]) == close(2 * variance, rel=0.02)
    small = value("feature_matching_norm", features[0, :125], features[1, :125])
    assert value("feature_matching_norm", features[0], features[1]) == close(2 * small, rel=0.02)
