from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfkt_cli import scores

Numbers = NDArray[Any]
Interval = Callable[[NDArray[Any], NDArray[Any]], tuple[float, float]]


def _predictions(seed: int, samples: int, classes: int) -> tuple[Numbers, Numbers]:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(classes, 0.4), samples)
    labels = np.where(
        random.random(samples) < 0.5,
        probabilities.argmax(axis=1),
        random.integers(classes, size=samples),
    )
    return probabilities, labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), samples=st.integers(1, 60), classes=st.integers(2, 7))
def test_scores_of_predictions_equal_slow_loops(seed: int, samples: int, classes: int) -> None:
    probabilities, labels = _predictions(seed, samples, classes)
    predicted = [int(np.argmax(row)) for row in probabilities]
    confusion = scores.confusion_matrix(np.array(predicted), labels, classes)

    recalls, f1s, right = [], [], 0
    for k in range(classes):
        hits = sum(p == k and y == k for p, y in zip(predicted, labels, strict=True))
        true, said = sum(y == k for y in labels), sum(p == k for p in predicted)
        assert confusion[k].sum() == true
        assert confusion[:, k].sum() == said
        right += hits
        if true:
            recalls.append(hits / true)
        if true + said:
            precision, recall = hits / max(said, 1), hits / max(true, 1)
            f1s.append(2 * precision * recall / max(precision + recall, 1e-12))
    assert scores.accuracy(confusion) == pytest.approx(right / samples)
    assert scores.balanced_accuracy(confusion) == pytest.approx(sum(recalls) / len(recalls))
    assert scores.macro_f1(confusion) == pytest.approx(sum(f1s) / len(f1s))

    error = 0.0
    for number in range(15):
        inside = [
            n for n in range(samples)
            if number / 15 < probabilities[n].max() <= (number + 1) / 15
        ]  # fmt: skip
        if inside:
            confidence = sum(probabilities[n].max() for n in inside) / len(inside)
            share = sum(predicted[n] == labels[n] for n in inside) / len(inside)
            error += len(inside) / samples * abs(confidence - share)
    assert scores.calibration_error(probabilities, labels) == pytest.approx(error)


def test_certain_and_wrong_has_calibration_error_one() -> None:
    assert scores.calibration_error(np.eye(3), np.array([1, 2, 0])) == pytest.approx(1)
    assert scores.calibration_error(np.eye(3), np.arange(3)) == pytest.approx(0)


def test_a_class_without_samples_is_left_out() -> None:
    confusion = scores.confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 4)
    assert np.isnan(scores.class_recall(confusion)[2:]).all()
    assert scores.balanced_accuracy(confusion) == pytest.approx(0.75)
    assert scores.macro_f1(confusion) == pytest.approx(2 / 3)


def test_interval_of_independent_samples_is_wilsons() -> None:
    right, alone = np.arange(400) % 4 == 0, np.arange(400)
    z, n = scores.student_t_quantile(60), 399  # V is p (1 - p) / (n - 1)
    middle = (0.25 + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(0.25 * 0.75 / n + (z / (2 * n)) ** 2)
    assert scores.share_interval(right, alone) == pytest.approx((middle - half, middle + half))
    gains = right.astype(float)
    half = z * np.sqrt(0.25 * 0.75 / n)
    assert scores.difference_interval(gains, alone) == pytest.approx((0.25 - half, 0.25 + half))


@pytest.mark.parametrize("interval", [scores.share_interval, scores.difference_interval])
def test_samples_of_one_group_count_together(interval: Interval) -> None:
    once = (np.arange(40) % 4 == 0).astype(float)
    alone, copies = np.arange(40), np.repeat(once, 10)
    expected = interval(once, alone)
    assert interval(copies, np.repeat(alone, 10)) == pytest.approx(expected)
    naive = interval(copies, np.arange(400))
    assert naive[1] - naive[0] < 0.5 * (expected[1] - expected[0])
    whole = (0.0, 1.0) if interval is scores.share_interval else (-1.0, 1.0)
    assert interval(copies, np.zeros(400, int)) == whole, "one group says nothing about others"


def test_groups_that_happen_to_agree_are_no_surer_than_their_images() -> None:
    groups = np.repeat(np.arange(3), 20)
    right = np.concatenate([np.arange(20) < count for count in (10, 10, 11)])
    low, high = scores.share_interval(right, groups)
    assert high - low > 2 * 1.96 * np.sqrt(0.25 / 60)
    gain = (np.arange(20) % 10 == 0).astype(float)  # one in each of two groups
    low, high = scores.difference_interval(gain, np.arange(20) // 10)
    assert low < 0.0 < high


@pytest.mark.parametrize(("groups", "least"), [(2, 0.5), (6, 0.3), (18, 0.15)])
def test_all_right_is_not_certain(groups: int, least: float) -> None:
    ends = scores.share_interval(np.ones(36), np.arange(36) % groups)
    none_right = scores.share_interval(np.zeros(36), np.arange(36) % groups)
    assert ends[1] == 1
    assert 1 - ends[0] > least
    assert none_right == pytest.approx((0, 1 - ends[0]))


@pytest.mark.parametrize("scenes", [2, 3, 5, 20])
def test_intervals_cover_the_truth_over_few_groups(scenes: int) -> None:
    """Two methods that are equally good on average, and 15 points apart from scene to scene."""
    random, groups = np.random.default_rng(scenes), np.repeat(np.arange(scenes), 40)
    covered = {"share": 0, "difference": 0}
    for _ in range(500):
        accuracy = random.beta(4, 4 / 1.5, (2, scenes))[:, groups]
        first, second = (random.random(accuracy.shape) < accuracy).astype(float)
        for name, truth, ends in (
            ("share", 0.6, scores.share_interval(first, groups)),
            ("difference", 0.0, scores.difference_interval(first - second, groups)),
        ):
            covered[name] += ends[0] <= truth <= ends[1]
    assert min(covered.values()) >= 0.92 * 500


def test_neighbourhood_density_equals_a_slow_loop_and_prefers_clusters() -> None:
    probabilities, _ = _predictions(3, 12, 4)
    total = 0.0
    for i in range(12):
        weights = []
        for j in range(12):
            if j != i:
                a, b = probabilities[i], probabilities[j]
                cosine = float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b))
                weights.append(np.exp(cosine / 0.05))
        shares = np.array(weights) / sum(weights)
        total -= sum(s * np.log(s) for s in shares if s > 0)
    assert scores.soft_neighbourhood_density(probabilities) == pytest.approx(total / 12, rel=1e-6)
    clusters = np.repeat(np.eye(4) * 0.97 + 0.01, 3, axis=0)
    assert scores.soft_neighbourhood_density(clusters) == pytest.approx(np.log(2), abs=0.01)


def test_geometric_mean_of_two_views() -> None:
    views = [np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])]
    np.testing.assert_allclose(scores.geometric_mean(views), [[0.5, 0.5]])
    np.testing.assert_allclose(scores.geometric_mean(views[:1]), views[0])


def test_rank_correlation_with_ties() -> None:
    assert scores.rank_correlation(np.array([1, 2, 3]), np.array([10, 100, 1000])) == 1
    assert scores.rank_correlation(np.array([1, 2, 3]), np.array([3, 2, 1])) == -1
    tied = scores.rank_correlation(np.array([1, 1, 2]), np.array([1, 2, 3]))
    assert tied == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert np.isnan(scores.rank_correlation(np.ones(3), np.arange(3)))


def test_psnr_of_a_known_error() -> None:
    pictures = np.full((2, 4, 4, 3), 0.5)
    assert scores.psnr(pictures, pictures + 0.1) == pytest.approx([20, 20])
    assert scores.psnr(pictures, pictures) == pytest.approx([120, 120])


def test_frechet_distance_of_known_gaussians() -> None:
    random = np.random.default_rng(6)
    a = random.normal(size=(500, 3))
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert scores.frechet_distance(a, a + np.array([3, 4, 0])) == pytest.approx(25)
    spread = np.trace(np.cov(a, rowvar=False))
    centred = a - a.mean(axis=0)
    assert scores.frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread)
    assert scores.frechet_distance(a[:, :1], 2 + a[:, :1]) == pytest.approx(4)


@pytest.mark.parametrize("shared", [False, True])
def test_intervals_over_seeds_cover_the_truth(shared: bool) -> None:
    """Two methods that are equally good; training scatters by 1.2 points, scenes by ten."""
    random = np.random.default_rng(1)
    seeds, images, scenes, covered = 3, 960, 120, []
    for _ in range(200):
        of_scenes = random.normal(0, 0.1, (2, seeds, scenes))
        groups = [np.repeat(np.arange(scenes), images // scenes) for _ in range(seeds)]
        differences = []
        for seed in range(seeds):
            kept = 0 if shared else seed
            right = [
                random.random(images) < 0.8 + random.normal(0, 0.012) + effect[kept][groups[seed]]
                for effect in of_scenes
            ]
            differences.append(right[0].astype(int) - right[1])
        if not shared:
            groups = [group + seed * scenes for seed, group in enumerate(groups)]
        _, bounds, _ = scores.difference_over_seeds(differences, groups)
        assert bounds is not None
        covered.append(bounds[0] <= 0 <= bounds[1])
    assert 0.9 <= np.mean(covered) <= 0.99


def test_intervals_over_seeds_by_hand() -> None:
    ones = [np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0]), np.array([1, 1, 1, 0])]
    apart = [np.arange(4) + 4 * seed for seed in range(3)]
    mean, bounds, p_value = scores.difference_over_seeds(ones, apart)
    # d = 1/4, 1/2, 3/4: deviation 1/4, error 1/4 / sqrt 3, t(2) = 4.303, within 4.303: 95 %
    assert mean == 0.5
    assert bounds == pytest.approx((0.5 - 4.3027 * 0.25 / 3**0.5, 1.0), 1e-4)  # 1.12 is cut
    t = 0.5 / (0.25 / 3**0.5)
    assert p_value == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert scores.difference_over_seeds(ones[:1], apart[:1]) == (0.25, None, None)
    alike = [np.repeat([1.0, 0.0], [3, 97])] * 2  # two seeds happen to agree: still 100 images each
    mean, bounds, p_value = scores.difference_over_seeds(
        alike, [np.arange(100), np.arange(100, 200)]
    )
    assert bounds is not None
    assert bounds[1] - mean >= (0.03 * 0.97 / 200) ** 0.5
    assert p_value is not None
    assert p_value > 0.01
    _, shared, _ = scores.difference_over_seeds(ones, [np.arange(4)] * 3)
    assert shared is not None  # the same images in all seeds: they are fewer
    assert scores.difference_over_seeds(ones, [np.zeros(4, int)] * 3) == (0.5, (-1.0, 1.0), 1.0)
    two = scores.difference_interval(np.array([1.0, -1.0, 1.0, 0.0]), np.array([0, 0, 1, 1]))
    assert two == (-1.0, 1.0)
    assert scores.student_t_quantile(30) == pytest.approx(2.0423, abs=1e-4)
    assert scores.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_a_scale_of_the_logits(scale: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    wrong, ignored = (labels + 1) % 3, np.arange(4000) < 1000
    labels = np.where(ignored, wrong, labels)
    found = scores.fit_temperature(scale * logits, labels, 1.0 - ignored)
    assert found == pytest.approx(scale, rel=0.15)
