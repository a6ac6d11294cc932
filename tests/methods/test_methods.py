"""What methods compute: hand-made examples, gradients, and a source model that nothing touches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.data.store import spread
from sfkt_cli.errors import ConfigError
from sfkt_cli.methods import METHODS, find_method, label_free
from sfkt_cli.methods.objective import TeacherOutputs, cluster_labels
from sfkt_cli.methods.socket_match import Socket
from sfkt_cli.methods.tgkt import Tgkt
from sfkt_cli.methods.tgmb import Tgmb
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.frozen import FeatureMaps
from sfkt_cli.models.translators import Front, UNetTranslator
from sfkt_cli.scores import soft_neighbourhood_density
from sfkt_cli.settings.config import Config, build
from sfkt_cli.stages.bridge import loss_weights
from sfkt_cli.training.loop import Batch
from sfkt_cli.training.recipes import start_student
from tests.methods.made import ENCODING, Made

COUNT, CLASSES, FEATURES, SIDE = 12, 3, 8, 16


def make_source() -> Classifier:
    torch.manual_seed(0)
    model = Classifier(
        backbone="small",
        classes=CLASSES,
        width=4,
        bottleneck=FEATURES,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    model.train()
    for _ in range(3):  # statistics of its own
        model(torch.rand(16, 3, SIDE, SIDE))
    return freeze(model)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 1000, (2, COUNT, SIDE, SIDE), generator=generator)
    return {
        "tr_target": images[0],
        "tr_target_2": images[0].flip(2),
        "tr_rows": torch.arange(COUNT),
        "ti_target": images[1],
        "ti_rows": torch.arange(COUNT),
        "ti_rgb": torch.randint(256, (COUNT, SIDE, SIDE, 3), generator=generator).byte(),
    }


def make_outputs(
    source: Classifier, lead: Callable[[Classifier], float] = lambda student: 3.0
) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        ti_features, _ = source(torch.rand(COUNT, 3, SIDE, SIDE, generator=generator))
    bridged = 2 * torch.randn(COUNT, CLASSES, generator=generator)
    return Made(source, make_batch()["tr_target"], ti_features, bridged, lead)


def make_objective(method: str, source: Classifier, config: Config) -> Any:
    kind = find_method(method)
    student = start_student(source)
    if kind.translated:
        student.front = Front(freeze(UNetTranslator(1, 4)), 1)
    return kind(student, make_outputs(source), config)


def make_tgkt(
    settings: dict[str, Any], lead: Callable[[Classifier], float] = lambda student: 3.0
) -> Tgkt:
    source = make_source()
    return Tgkt(start_student(source), make_outputs(source, lead), build(settings))


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_nothing_else(method: str) -> None:
    source = make_source()
    before = whole_state(source)
    config = build({"tgkt": {"beta_self": 1.0, "self_from": 0.0}})
    objective = make_objective(method, source, config)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for epoch in range(2):
        objective.begin_epoch(epoch)
        for _ in range(2):
            objective.train()
            terms = objective(make_batch())
            weighted = [objective.weights[name] * term for name, term in terms.items()]
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(weighted).sum())
            optimizer.step()
    assert same(before, source.state_dict())
    assert not source.training
    assert all(parameter.grad is None for parameter in source.parameters())
    inner = {id(module) for module in objective.modules()}
    assert not any(id(module) in inner for module in source.modules())
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    reached = objective.student.backbone.parameters()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in reached)


@pytest.mark.parametrize("method", ["shot", "socket"])
def test_the_head_stays_the_sources(method: str) -> None:
    source = make_source()
    objective = make_objective(method, source, Config())
    assert same(whole_state(source.head), whole_state(objective.student.head))
    assert not any(p.requires_grad for p in objective.student.head.parameters())
    assert all(p.requires_grad for p in objective.student.backbone.parameters())


@pytest.mark.parametrize("kept", [True, False])
def test_settings_say_whether_a_worse_student_of_tgkt_is_replaced(kept: bool) -> None:
    assert make_tgkt({"tgkt": {"keep_untouched": kept}}).keep_untouched is kept


def feature_maps_of(source: Classifier) -> FeatureMaps:
    return FeatureMaps([source.backbone], source.features, torch.rand(1, 3, SIDE, SIDE))


@pytest.mark.parametrize("term", ["rec", "d", "im", "f", "p"])
def test_every_term_of_the_bridge_reaches_the_translator_alone(term: str) -> None:
    source = make_source()
    before = whole_state(source)
    weights = {name: float(name == term) for name in ("rec", "d", "im", "f")}
    feature_maps = feature_maps_of(source) if term == "p" else None
    objective = Tgmb(
        UNetTranslator(1, 4),
        source,
        ENCODING,
        weights=weights,
        rec_loss="mse",
        d_on="feature",
        feature_maps=feature_maps,
    )
    objective.train()
    terms = objective(make_batch())
    assert set(terms) == {term}
    assert torch.isfinite(terms[term])
    torch.autograd.backward(terms[term])
    assert all(p.grad is not None for p in objective.parameters())  # several processes rely on it
    assert same(before, source.state_dict())
    assert not source.training
    assert all(parameter.grad is None for parameter in source.parameters())
    assert hasattr(objective, "discriminator") == (term == "d")


@pytest.mark.parametrize(
    ("terms", "d_on", "expected"),
    [("rec", "feature", []), ("f", "feature", [True, False]), ("d", "feature", [True]),
     ("d", "image", []), ("rec d", "image", []), ("rec im f", "feature", [True, False]),
     ("p", "feature", [True, False]), ("rec im f p", "feature", [True, False])],
)  # fmt: skip
def test_the_bridge_asks_the_source_model_no_more_than_its_terms_need(
    terms: str, d_on: str, expected: list[bool]
) -> None:
    """One pass for each entry, true where a gradient goes through it."""
    source = make_source()
    passes: list[bool] = []
    source.backbone.register_forward_hook(lambda *given: passes.append(given[2].requires_grad))
    weights = {name: float(name in terms.split()) for name in ("rec", "d", "im", "f")}
    objective = Tgmb(
        UNetTranslator(1, 4), source, ENCODING, weights=weights, rec_loss="mse",
        d_on=d_on, feature_maps=feature_maps_of(source) if "p" in terms.split() else None,
    )  # fmt: skip
    passes.clear()
    assert set(objective.train()(make_batch())) == set(terms.split())
    assert passes == expected


def test_pairs_that_are_not_registered_have_no_pixel_loss() -> None:
    weights = loss_weights(Config(), registered=False)
    objective = Tgmb(
        UNetTranslator(1, 4), make_source(), ENCODING, weights=weights, rec_loss="mse",
        d_on="feature",
    )  # fmt: skip
    assert set(objective(make_batch())) == {"im", "f"}


def test_pseudo_labels_of_a_hand_computed_example() -> None:
    """Two clusters at right angles; the last image is called 0 but lies with those of class 1."""
    features = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    logits = 100 * nn.functional.one_hot(torch.tensor([0, 0, 1, 0]), 2).float()
    labels, similarity = cluster_labels(features, logits, rounds=0)
    assert labels.tolist() == [0, 0, 1, 1]
    centre = [1 / math.sqrt(10), 3 / math.sqrt(10)]  # of 2 (1, 1) and 1 (-1, 1)
    near, far = (centre[0] + centre[1]) / math.sqrt(2), (centre[1] - centre[0]) / math.sqrt(2)
    expected = torch.tensor([[near, 0.0], [near, 0.0], [far, 1.0], [far, 1.0]])
    torch.testing.assert_close(similarity, expected)
    labels, similarity = cluster_labels(features, logits, rounds=1)
    assert labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
    # SOCKET: the mean of class 0 is not made longer: (1, 3) / sqrt 18, of two to one.
    labels, distance = cluster_labels(features, logits, rounds=0, euclidean=True)
    assert labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(distance[0, 0], -torch.tensor(2 / math.sqrt(18)))


def test_as_socket_measures_it_a_short_centroid_is_near() -> None:
    """Class 0 spreads over half a circle: in cosine its mean is far, in the plane it is near."""
    features = torch.tensor([[9.0], [-9.0], [1.0], [0.9], [0.45]])
    logits = 100 * nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 0]), 2).float()
    cosine = cluster_labels(features, logits, rounds=0)[0]
    plane = cluster_labels(features, logits, rounds=0, euclidean=True)[0]
    angles = [math.atan2(1, value) for (value,) in features.tolist()]
    points = np.array([[math.cos(angle), math.sin(angle)] for angle in angles])
    means = np.array([points[[0, 1, 4]].mean(0), points[[2, 3]].mean(0)])
    gaps = np.linalg.norm(points[:, None] - means, axis=2)
    assert plane.tolist() == gaps.argmin(axis=1).tolist()
    assert cosine.tolist() != plane.tolist()


def test_a_class_without_images_drops_out() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    labels, similarity = cluster_labels(features, logits, rounds=2)
    assert labels.tolist() == [0, 0, 1]
    assert (similarity[:, 2] == -1).all()


def test_a_class_that_nobody_predicts_drops_out_of_the_soft_round() -> None:
    """Class 2 is second everywhere; its weighted mean is nearest to the image between both."""
    features = torch.tensor([[1.0], [-1.0], [0.0]])
    logits = torch.tensor([[1.0, -9.0, 0.9], [-9.0, 1.0, 0.9], [0.6, 0.5, 0.55]])
    soft, _ = cluster_labels(features, logits, rounds=0)
    assert soft.tolist() == [0, 1, 2]
    labels, _ = cluster_labels(features, logits, rounds=1)
    assert 2 not in labels.tolist()


def slow_cluster_labels(
    features: list[list[float]], probabilities: list[list[float]], rounds: int
) -> list[int]:
    units = []
    for row in features:
        length = math.sqrt(sum(value**2 for value in row) + 1)
        units.append([value / length for value in [*row, 1.0]])
    weights, labels = probabilities, [0] * len(units)
    predicted = {row.index(max(row)) for row in probabilities}
    for number in range(rounds + 1):
        centres: list[list[float] | None] = []
        for k in range(len(weights[0])):
            mass = [sum(w[k] * u[d] for w, u in zip(weights, units, strict=True))
                    for d in range(len(units[0]))]  # fmt: skip
            length = math.sqrt(sum(value**2 for value in mass))
            dropped = rounds and (k not in predicted or (number and not any(w[k] for w in weights)))
            centres.append([value / length for value in mass] if length and not dropped else None)
        for n, unit in enumerate(units):
            cosines = [
                -1.0 if c is None else sum(a * b for a, b in zip(unit, c, strict=True))
                for c in centres
            ]
            labels[n] = cosines.index(max(cosines))
        weights = [[float(label == k) for k in range(len(weights[0]))] for label in labels]
    return labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rounds=st.integers(0, 2))
def test_pseudo_labels_equal_a_slow_loop(seed: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(15, 4, generator=generator)
    logits = 2 * torch.randn(15, 4, generator=generator)
    expected = slow_cluster_labels(features.tolist(), logits.softmax(1).tolist(), rounds)
    assert cluster_labels(features, logits, rounds=rounds)[0].tolist() == expected


def test_the_bridge_teaches_as_far_as_it_is_trusted_beside_the_student() -> None:
    leads = iter([1.0, 0.0, -0.7, 5.0, -1.0])
    objective = make_tgkt({"transfer": {"epochs": 5}}, lambda student: next(leads)).eval()
    batch = make_batch()
    teacher = objective.outputs.bridged_logits.softmax(dim=1)[batch["tr_rows"]]
    for epoch, weight in enumerate([1.0, 0.8, 0.3, 0.4, 0.0]):
        objective.begin_epoch(epoch)
        _, logits = objective.student(as_rgb(encode(batch["tr_target"], ENCODING)))
        whole = losses.distillation(logits, teacher)
        torch.testing.assert_close(objective(batch)["kl"], weight * whole)


def test_the_bridge_is_compared_with_a_student_of_the_targets_statistics() -> None:
    source = make_source()
    adapted: list[Classifier] = []
    outputs = make_outputs(source, lambda student: 0.5 if adapted == [student] else 9.0)
    outputs.adapt = adapted.append  # type: ignore[method-assign, assignment]
    student = start_student(source)
    assert Tgkt(student, outputs, build({})).trust == 0.0
    assert Tgkt(student, make_outputs(source, lambda student: 9.0), build({})).trust == 1.0


def test_the_paper_trusts_its_bridge_to_the_end() -> None:
    paper = {"transfer": {"epochs": 4}, "tgkt": {"trust": "full"}}
    objective = make_tgkt(paper, lambda student: 0.0)
    assert objective.follows_bridge
    assert not make_tgkt({"tgkt": {"trust": "full", "beta_kl": 0}}).follows_bridge
    assert not make_tgkt({}).follows_bridge
    for epoch in range(4):
        objective.begin_epoch(epoch)
        assert float(objective.bridge_weight) == 1.0


def test_a_bridge_without_trust_teaches_nothing() -> None:
    leads = iter([0.9, 9.0])
    objective = make_tgkt({}, lambda student: next(leads))
    for epoch in range(2):
        objective.begin_epoch(epoch)
    terms = objective(make_batch())
    assert set(terms) == {"kl", "f", "im", "self"}
    assert terms["kl"].item() == 0.0
    with pytest.raises(ConfigError, match=r"tgkt.beta_f are 0.*may get no trust"):
        make_tgkt({"tgkt": {"beta_im": 0, "beta_f": 0, "beta_self": 0}}, lambda student: 0.0)


def test_a_bridge_that_cannot_be_compared_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source()
    outputs = make_outputs(source)
    outputs.groups = ["hall", "hall"]
    Tgkt(start_student(source), outputs, build({}))
    assert "too few groups" in capsys.readouterr().err


def test_no_pairs_are_loaded_without_their_term() -> None:
    objective, batch = make_tgkt({"tgkt": {"beta_f": 0}}), make_batch()
    assert not objective.needs_ti
    del batch["ti_target"], batch["ti_rows"]
    assert set(objective(batch)) == {"kl", "im"}


def test_pseudo_labels_come_when_they_are_due() -> None:
    objective = make_tgkt({"transfer": {"epochs": 4}, "tgkt": {"self_from": 0.5}})
    for epoch in range(4):
        objective.begin_epoch(epoch)
        terms = {"kl", "f", "im"} | ({"self"} if epoch >= 2 else set())
        assert set(objective(make_batch())) == terms
        assert bool(objective.prior.eq(1.0 / CLASSES).all()) == (epoch < 2)
    labels, _ = cluster_labels(*objective.outputs.predict_all(objective.student), rounds=1)
    assert objective.pseudo_labels.equal(labels)


def test_target_images_and_pairs_share_their_batch_statistics() -> None:
    objective, batch = make_tgkt({}), make_batch()
    alone = copy.deepcopy(objective.student)
    terms = objective(batch)
    both = torch.cat([batch["tr_target"], batch["ti_target"]])
    features, logits = alone(as_rgb(encode(both, ENCODING)))
    count = len(batch["tr_target"])
    expected = losses.information_maximisation(logits[:count], objective.prior)
    torch.testing.assert_close(terms["im"], expected)
    partners = objective.outputs.ti_features[batch["ti_rows"]]
    expected = losses.feature_matching(features[count:], partners)
    torch.testing.assert_close(terms["f"], expected)
    assert all(
        torch.equal(a, b) for a, b in zip(objective.student.buffers(), alone.buffers(), strict=True)
    )


def test_running_statistics_of_the_student_follow_within_an_epoch() -> None:
    source = make_source()
    norms = [m for m in source.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norms[0].momentum, norms[1].momentum, norms[2].momentum = 0.01, 0.3, None
    student = start_student(source)
    momenta = [m.momentum for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert momenta[:3] == [0.1, 0.3, None]
    assert norms[0].momentum == 0.01


@pytest.mark.parametrize("trained", [True, False])
def test_the_head_is_trained_where_it_is_asked_for(trained: bool) -> None:
    config = build({"tgkt": {"train_head": trained}})
    student = make_objective("tgkt", make_source(), config).student
    assert all(p.requires_grad == trained for p in student.head.parameters())
    assert all(p.requires_grad for p in student.backbone.parameters())


@pytest.mark.parametrize("name", ["kl", "f", "self", "im"])
def test_a_weight_of_zero_switches_a_term_off(name: str) -> None:
    weights = {f"beta_{other}": float(other != name) for other in ("kl", "f", "self", "im")}
    config = build({"tgkt": {**weights, "self_from": 0.0}})
    objective = make_objective("tgkt", make_source(), config)
    objective.begin_epoch(0)
    assert set(objective(make_batch())) == {"kl", "f", "self", "im"} - {name}


@pytest.mark.parametrize(
    "settings",
    [{"beta_self": 0}, {"beta_self": 0.3, "self_from": 1.0}, {"beta_kl": 0, "beta_self": 0}],
)
def test_a_student_that_nothing_may_train_is_refused(settings: dict[str, float]) -> None:
    config = build({"tgkt": {"beta_f": 0, "beta_im": 0, **settings}})
    with pytest.raises(ConfigError, match="nothing is sure to train the student"):
        make_objective("tgkt", make_source(), config)


@pytest.mark.parametrize(
    "settings", [{"beta_kl": 0, "beta_self": 0.3, "self_from": 0.0}, {"trust": "full"}]
)
def test_pseudo_labels_or_a_trusted_bridge_alone_train_a_student(settings: dict[str, Any]) -> None:
    config = build({"tgkt": {"beta_f": 0, "beta_im": 0, "beta_self": 0, **settings}})
    objective = make_objective("tgkt", make_source(), config)
    objective.begin_epoch(0)
    assert set(objective(make_batch())) == {"self" if "beta_kl" in settings else "kl"}


def one_hot(classes: list[int]) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), 2).float()


def test_kappa_of_a_hand_computed_example() -> None:
    """Two of ten disagree; both name the first class in half of the images: chance is a half."""
    partners = one_hot([0] * 5 + [1] * 5)
    model = one_hot([0] * 4 + [1] * 5 + [0])
    assert label_free.kappa(model, partners) == pytest.approx((0.8 - 0.5) / 0.5)
    assert label_free.kappa(one_hot([0] * 10), partners) == pytest.approx(0.0)
    assert label_free.kappa(partners, partners) == pytest.approx(1.0)


def test_class_frequencies_are_the_students_own_from_when_they_are_due() -> None:
    objective = make_tgkt({"transfer": {"epochs": 10}, "tgkt": {"self_from": 0.3}})
    objective.begin_epoch(2)
    assert torch.allclose(objective.prior, torch.full((CLASSES,), 1 / CLASSES))
    objective.begin_epoch(3)
    predicted = objective.outputs.predict_all(objective.student)[1].softmax(dim=1).mean(dim=0)
    assert torch.allclose(objective.prior, 0.5 * predicted + 0.5 / CLASSES)
    assert float(objective.prior.std()) > 0.005
    equal = make_tgkt({"tgkt": {"prior": "equal", "self_from": 0}})
    equal.begin_epoch(0)
    assert torch.allclose(equal.prior, torch.full((CLASSES,), 1 / CLASSES))


def test_partner_rank_is_the_share_of_images_that_are_less_alike() -> None:
    random = np.random.default_rng(0)
    features, partners = random.normal(size=(2, 7, 5))
    first, second = (
        (part - part.mean(0)) / np.linalg.norm(part - part.mean(0), axis=1, keepdims=True)
        for part in (features, partners)
    )
    expected = [
        np.mean([first[i] @ second[j] < first[i] @ second[i] for j in range(7) if j != i])
        for i in range(7)
    ]
    rank = label_free.partner_rank(torch.tensor(features), torch.tensor(partners))
    assert rank.tolist() == pytest.approx(expected)
    own = label_free.partner_rank(torch.tensor(partners) * 3 + 1, torch.tensor(partners))
    assert own.tolist() == [1.0] * 7
    assert label_free.partner_rank(torch.ones(1, 5), torch.ones(1, 5)).tolist() == [0.5]


def test_the_lead_of_a_bridge_is_its_gain_in_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    partners, noise, others = torch.randn(3, 40, 8, generator=generator)
    near, far = partners + 0.3 * noise, partners + 3 * noise
    alone = [f"scene-{number}" for number in range(40)]
    assert label_free.bridge_lead(near, far, partners, alone) > 3.0
    assert label_free.bridge_lead(near, near, partners, alone) == 0.0
    for improved in range(1, 14):
        slightly = torch.where(torch.arange(40)[:, None] < improved, near, far)
        gains = label_free.partner_rank(slightly, partners) - label_free.partner_rank(far, partners)
        errors = float(gains.mean() / (gains.std().clamp_min(1 / 40) / 40**0.5))
        lead = label_free.bridge_lead(slightly, far, partners, alone)
        assert lead == pytest.approx(errors, rel=1e-5)
        back = label_free.bridge_lead(far, slightly, partners, alone)
        assert back == pytest.approx(-errors, rel=1e-5)
    assert label_free.bridge_lead(near[:1], others[:1], partners[:1], alone[:1]) == 0.0


def test_the_frames_of_a_recording_prove_no_more_than_one_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    partners, first, second = torch.randn(3, 12, 8, generator=generator)
    pairs = [partners + first, partners + second, partners]
    groups = [f"recording-{number}" for number in range(12)]
    once = label_free.bridge_lead(pairs[0], pairs[1], pairs[2], groups)
    frames = [part.repeat_interleave(9, dim=0) for part in pairs]
    bridged, other, rgb = frames
    of_frames = [name for name in groups for _ in range(9)]
    as_groups = label_free.bridge_lead(bridged, other, rgb, of_frames)
    apart = label_free.bridge_lead(bridged, other, rgb, [str(number) for number in range(108)])
    assert as_groups == pytest.approx(once, rel=0.2)
    assert abs(apart) > 2.5 * abs(as_groups) > 0


def test_mirror_images_show_whether_a_model_sees_classes() -> None:
    classes = 9 * torch.eye(3)[torch.arange(30) % 3]
    same = label_free.target_scores(classes, classes)
    assert same["tr_mirror"] == pytest.approx(1.0)
    assert label_free.target_scores(classes, classes.roll(1, 0))["tr_mirror"] < 0.0
    collapsed = 9 * torch.eye(3)[torch.zeros(30, dtype=torch.long)]
    assert label_free.target_scores(collapsed, collapsed)["tr_mirror"] == 0.0
    assert same["tr_information"] == label_free.information(classes)
    assert same["tr_density"] == soft_neighbourhood_density(classes.softmax(dim=1).numpy())


@pytest.mark.parametrize("strangers", [0, 60, 150])
def test_strangers_among_target_images_are_counted(strangers: int) -> None:
    generator = torch.Generator().manual_seed(strangers)
    centres = 3 * torch.randn(5, 12, generator=generator)

    def draw(count: int, kinds: slice) -> Tensor:
        chosen = torch.randint(len(centres[kinds]), (count,), generator=generator)
        return centres[kinds][chosen] + torch.randn(count, 12, generator=generator)

    features = torch.cat([draw(300 - strangers, slice(3)), draw(strangers, slice(3, 5))])
    share = label_free.stranger_share(features, draw(200, slice(3, 5)))
    assert share == pytest.approx(strangers / 300, abs=0.08)
    assert label_free.stranger_share(features[:49], draw(200, slice(3, 5))) is None
    assert label_free.stranger_share(features, draw(49, slice(3, 5))) is None


def test_strangers_among_very_many_images_are_counted_in_some_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    features, ti_features = (torch.randn(count, 3, generator=generator) for count in (10_300, 60))
    some = features[spread(len(features), 10_000)]
    few = label_free.stranger_share(some, ti_features)
    assert few == label_free.stranger_share(features, ti_features)
    assert few != label_free.stranger_share(features[:10_000], ti_features)


def test_socket_matches_the_statistics_of_the_target_images_alone() -> None:
    """The hooks see each batch norm once, in the pass over target images, in training."""
    source = make_source()
    objective = Socket(start_student(source), make_outputs(source), Config())
    seen: list[Tensor] = []
    student = objective.student
    layers = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    batch = make_batch()
    objective.train()
    term = objective(batch)["bn"]
    assert len(seen) == 2 * len(layers)  # target images, then TI images
    stored = [m for m in source.modules() if isinstance(m, nn.BatchNorm2d)]
    total = 0.0
    for place, inputs in enumerate(seen[: len(layers)]):
        norm = stored[called_in_order(student, batch)[place]]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = inputs.mean(dim=(0, 2, 3))
        variance = (inputs - mean.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
        gap = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
        total += (10.0 if place == 0 else 1.0) * float(gap)
    assert float(term.detach()) == pytest.approx(total, rel=1e-4)


def test_sockets_gate_is_off_as_published_and_closes_itself_as_released() -> None:
    terms = {}
    for gated in (False, True):
        source = make_source()
        config = build({"socket": {"bn_gate": gated}})
        objective = Socket(start_student(source), make_outputs(source), config).train()
        terms[gated] = objective(make_batch())["bn"]
        terms[gated].backward()
        assert (objective.gate.grad is not None) == gated
    assert objective.gate.grad is not None
    assert objective.gate.grad > 0  # a step downhill closes it
    share = 1 / (1 + math.exp(-1))
    off, on = (float(terms[gated].detach()) for gated in (False, True))
    assert on == pytest.approx(share * off, rel=1e-5)


def test_socket_matches_batch_norms_that_run_over_all_processes() -> None:
    source = make_source()
    terms = []
    for synchronised in (False, True):
        student = start_student(source)
        if synchronised:
            nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        terms.append(Socket(student, make_outputs(source), Config()).train()(make_batch())["bn"])
    assert float(terms[0].detach()) > 0
    assert float(terms[1].detach()) == pytest.approx(float(terms[0].detach()), rel=1e-6)


def called_in_order(student: Classifier, batch: Batch) -> list[int]:
    """Numbers of the batch norms among the modules, as a pass meets them."""
    order: list[int] = []
    layers = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, n=number: order.append(n))
        for number, layer in enumerate(layers)
    ]
    training = student.training
    student.eval()(as_rgb(encode(batch["tr_target"], ENCODING)))
    student.train(training)
    for hook in hooks:
        hook.remove()
    return order


def test_looking_at_the_student_leaves_no_statistics_behind() -> None:
    source = make_source()
    objective = Socket(start_student(source), make_outputs(source), Config())
    before = whole_state(objective.student)
    objective.train()
    objective.begin_epoch(0)
    assert same(before, objective.student.state_dict())
    assert objective.student.training


def test_batch_norms_of_the_frozen_source_stay_asleep_under_train() -> None:
    source = make_source()
    weights = {"rec": 1.0, "d": 0.0, "im": 0.0, "f": 1.0}
    objective = Tgmb(
        UNetTranslator(1, 4), source, ENCODING, weights=weights, rec_loss="mse", d_on="feature"
    )
    objective.train()
    assert all(not module.training for module in source.modules())
    assert not any(name.startswith("_frozen") for name, _ in objective.named_modules())


def test_label_free_scores() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]] * 50
    assert label_free.agreement(logits, logits[[0, 1, 2, 1]]) == 0.75
    assert label_free.information(logits[:3]) == pytest.approx(math.log(3))
    assert label_free.information(logits[[0, 0]]) == pytest.approx(0, abs=1e-6)
    assert label_free.information(logits) == pytest.approx(
        -float(losses.information_maximisation(logits))
    )
    generator = torch.Generator().manual_seed(0)
    features, others = torch.randn(2, 4000, 6, generator=generator)
    assert label_free.feature_distance(features, features) == 0
    mean = features.mean(dim=0).expand_as(features)
    assert label_free.feature_distance(mean, features) == pytest.approx(1, rel=1e-5)
    assert label_free.feature_distance(others, features) == pytest.approx(2, rel=0.05)
    assert math.isfinite(label_free.feature_distance(features, torch.ones_like(features)))
