"""The verdict without labels: right where errors are independent, silent where it cannot know."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from sfkt_cli.evaluation.verdict import advice, judge_by_labels, rows_to_label, verdict

CLASSES = 5


def view(
    labels: NDArray[np.int64], accuracy: float, random: np.random.Generator
) -> NDArray[np.int64]:
    """Predictions that are right so often, and else any other class."""
    others = (labels + random.integers(1, CLASSES, len(labels))) % CLASSES
    return np.where(random.random(len(labels)) < accuracy, labels, others)


@pytest.mark.parametrize(
    ("student", "untouched", "word"),
    [(0.9, 0.6, "better"), (0.5, 0.8, "cannot tell"), (0.2, 0.8, "worse")],
)
def test_independent_views_tell_who_is_better(student: float, untouched: float, word: str) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, 400)
    views = [view(labels, accuracy, random) for accuracy in (student, untouched, 0.6)]
    assert verdict(*views, classes=CLASSES) == word


def test_equally_good_views_are_rarely_told_apart() -> None:
    random = np.random.default_rng(1)
    words = []
    for _ in range(100):
        labels = random.integers(0, CLASSES, 300)
        views = [view(labels, 0.7, random) for _ in range(3)]
        words.append(verdict(*views, classes=CLASSES))
    assert words.count("cannot tell") >= 88


def test_views_of_one_model_that_side_with_each_other_do_not_condemn_the_student() -> None:
    random = np.random.default_rng(3)
    labels = random.integers(0, CLASSES, 400)
    untouched = view(labels, 0.3, random)
    bridge = np.where(random.random(400) < 0.6, untouched, view(labels, 0.4, random))
    student = view(labels, 0.6, random)
    assert verdict(student, untouched, bridge, classes=CLASSES) == "cannot tell"


@pytest.mark.parametrize("third", ["translator", "identity"])
def test_a_student_of_one_class_is_worse(third: str) -> None:
    random = np.random.default_rng(4)
    labels = random.integers(0, CLASSES, 400)
    untouched = view(labels, 0.5, random)
    bridge = view(labels, 0.5, random) if third == "translator" else untouched
    collapsed = np.full(400, 2)
    assert verdict(collapsed, untouched, bridge, classes=CLASSES) == "worse"


@pytest.mark.parametrize("images", [30, 61])
def test_few_images_do_not_condemn_a_good_student(images: int) -> None:
    random = np.random.default_rng(5)
    words = []
    for _ in range(100):
        labels = random.integers(0, CLASSES, images)
        views = [view(labels, accuracy, random) for accuracy in (0.5, 0.3, 0.3)]
        words.append(verdict(*views, classes=CLASSES))
    assert words.count("worse") <= 3


@pytest.mark.parametrize("scenes", [20, 80])
def test_frames_of_one_scene_do_not_make_a_student_better(scenes: int) -> None:
    random = np.random.default_rng(6)
    frames = 400 // scenes
    groups = [f"scene-{number}" for number in range(scenes) for _ in range(frames)]
    words = {"grouped": list[str](), "apart": list[str]()}
    for _ in range(100):
        labels = random.integers(0, CLASSES, scenes)
        views = [view(labels, 0.7, random).repeat(frames) for _ in range(3)]
        words["grouped"].append(verdict(*views, classes=CLASSES, groups=groups))
        words["apart"].append(verdict(*views, classes=CLASSES))
    assert words["grouped"].count("better") <= 6 < words["apart"].count("better")


@pytest.mark.parametrize("scenes", [1, 2, 3])
def test_a_few_scenes_prove_nothing(scenes: int) -> None:
    random = np.random.default_rng(10)
    groups = [f"scene-{number * scenes // 300}" for number in range(300)]
    for accuracies in ((0.7, 0.7, 0.7), (0.9, 0.6, 0.6), (0.2, 0.8, 0.6)):
        labels = random.integers(0, CLASSES, 300)
        views = [view(labels, accuracy, random) for accuracy in accuracies]
        assert verdict(*views, classes=CLASSES, groups=groups) == "cannot tell"
        if accuracies[0] != 0.7:
            assert verdict(*views, classes=CLASSES) != "cannot tell"
    told = advice("cannot tell", "normals", views[0], views[1], groups)
    assert f"differ on images of {scenes} group" in told
    assert "give each recording its own" in told
    assert not len(rows_to_label(views[0], views[1], groups, seed=0)), "no label could decide"


def test_without_a_third_view_nothing_is_said() -> None:
    random = np.random.default_rng(2)
    labels = random.integers(0, CLASSES, 500)
    student, untouched = (view(labels, accuracy, random) for accuracy in (0.9, 0.6))
    chance = random.integers(0, CLASSES, 500)
    assert verdict(student, untouched, untouched, classes=CLASSES) == "cannot tell"
    assert verdict(student, untouched, chance, classes=CLASSES) == "cannot tell"
    few = verdict(student[:20], untouched[:20], labels[:20], classes=CLASSES)
    assert few == "cannot tell"
    alone = [str(number) for number in range(500)]
    views = (student, untouched, alone)
    assert advice(few, "normals", *views).endswith("than your RGB model.")
    assert "keep your RGB model with the encoding normals" in advice("worse", "normals", *views)


@pytest.mark.parametrize("accuracies", [(0.7, 0.5), (0.85, 0.4)])
def test_the_bridge_does_not_prove_a_student_of_its_own(accuracies: tuple[float, float]) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, 500)
    untouched, bridge = (view(labels, accuracy, random) for accuracy in accuracies)
    student = np.where(random.random(500) < 0.97, bridge, random.integers(0, CLASSES, 500))
    assert (student == labels).mean() < (untouched == labels).mean()
    word = verdict(student, untouched, bridge, classes=CLASSES, follows_bridge=True)
    assert word == "cannot tell"
    alone = [str(number) for number in range(500)]
    told = advice(word, "normals", student, untouched, alone, follows_bridge=True)
    assert "the bridge taught it" in told
    collapsed = np.zeros(500, int)  # it agrees with neither, and may be condemned
    assert verdict(collapsed, untouched, bridge, classes=CLASSES, follows_bridge=True) == "worse"


def test_labels_decide_as_all_signs_of_the_scenes_say() -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        labels = random.integers(0, CLASSES, 24)
        student, untouched = (view(labels, accuracy, random) for accuracy in (0.8, 0.4))
        scenes = random.integers(0, 8, 24)
        gains = (student == labels).astype(int) - (untouched == labels)
        sums = np.array([gains[scenes == scene].sum() for scene in range(8)])
        signs = np.array(list(itertools.product((-1, 1), repeat=8)))
        p = (np.abs(signs @ sums) >= abs(sums.sum())).mean()
        groups = scenes.astype(str)
        word, sentence, told = judge_by_labels(student, untouched, labels, groups, "normals")
        assert told == pytest.approx(p)
        assert f"(p {p:.2g})" in sentence
        assert (word == "cannot tell") == (p >= 0.05)
        assert word != "better" or gains.sum() > 0


@pytest.mark.parametrize(
    ("right", "wrong", "word", "ends"),
    [
        (6, 0, "better", "ship the student."),
        (5, 0, "cannot tell", "this may be chance."),
        (4, 0, "cannot tell", "they are of 5 groups; at least 6 are needed."),
        (0, 6, "worse", "sfkt export --method source-encoded writes."),
        (3, 3, "cannot tell", "this may be chance."),
        (0, 0, "cannot tell", "they are of 1 group; at least 6 are needed."),
    ],
)
def test_six_labels_of_one_kind_decide(right: int, wrong: int, word: str, ends: str) -> None:
    student = np.array([0] * right + [1] * wrong + [1])
    untouched = np.array([1] * right + [0] * wrong + [2])
    labels = np.zeros(len(student), int)
    scenes = [str(number) for number in range(len(labels))]
    judged = judge_by_labels(student, untouched, labels, scenes, "normals")
    assert judged.word == word
    assert judged.sentence.endswith(ends)
    assert f"Of {len(labels)} images" in judged.sentence
    assert f"alone recognises {right}, your RGB model alone {wrong} (p " in judged.sentence
    one_scene = judge_by_labels(student, untouched, labels, ["hall"] * len(labels), "normals")
    assert one_scene.word == "cannot tell"
    assert one_scene.sentence.endswith("they are of 1 group; at least 6 are needed.")


def test_equally_good_models_are_rarely_told_apart_by_labels() -> None:
    random = np.random.default_rng(8)
    words: list[str] = []
    for _ in range(400):
        labels = random.integers(0, CLASSES, 200)
        student, untouched = (view(labels, 0.6, random) for _ in range(2))
        scenes = np.arange(200).astype(str)
        rows = rows_to_label(student, untouched, scenes, seed=len(words))
        views = (student[rows], untouched[rows], labels[rows], scenes[rows])
        words.append(judge_by_labels(*views, "normals").word)
    assert words.count("cannot tell") >= 380


@pytest.mark.parametrize("differing", [0, 1, 5, 6])
def test_only_scenes_on_which_the_two_differ_can_decide(differing: int) -> None:
    groups = [f"scene-{number}" for number in range(40) for _ in range(3)]
    untouched = np.zeros(len(groups), int)
    student = untouched.copy()
    student[: 3 * differing] = 1
    told = advice("cannot tell", "normals", student, untouched, groups)
    assert told.endswith("is better than your RGB model.") == (differing == 6)
    assert bool(len(rows_to_label(student, untouched, groups, seed=0))) == (differing == 6)
    assert (f"differ on images of {differing} group" in told) == (0 < differing < 6)
    assert ("name the same class for every image" in told) == (not differing)
    assert "one folder" not in told, "there are enough scenes"


def test_images_to_label_differ_and_come_from_all_scenes_first() -> None:
    random = np.random.default_rng(9)
    labels = random.integers(0, CLASSES, 300)
    student, untouched = (view(labels, accuracy, random) for accuracy in (0.9, 0.5))
    scenes = [f"scene-{number // 10}" for number in range(300)]
    rows = rows_to_label(student, untouched, scenes, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 50
    assert (student[rows] != untouched[rows]).all()
    differing = {scenes[row] for row in np.flatnonzero(student != untouched)}
    assert {scenes[row] for row in rows[: len(differing)]} == differing
    counts = Counter(scenes[row] for row in rows)
    assert max(counts.values()) <= 2
    assert rows.tolist() == rows_to_label(student, untouched, scenes, seed=0).tolist()
    assert rows.tolist() != rows_to_label(student, untouched, scenes, seed=1).tolist()
    assert not len(rows_to_label(student, student, scenes, seed=0))
