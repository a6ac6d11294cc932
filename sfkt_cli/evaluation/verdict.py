"""Is the student better than the untouched RGB model? Answers without labels, or from a few (ours).

Three views look at each target image: the student, the RGB model on the encoded image, and the RGB
model behind the translator. If the first two differ, the third takes sides. If errors were
independent, the view that the third agrees with more often would be right more often (Platanios,
Blum and Mitchell, UAI 2014). They are not independent: the third view is also the RGB model, and
sides with itself. So it can only speak for the student, and a student is called worse only if it
certainly agrees with neither view. A student that the third view taught to the end
(``follows_bridge`` of a method) agrees with it, right or wrong, so it is never called better.

If this cannot tell, a few labels can. They are needed for images on which the student and the
untouched model differ, because all others say nothing. ``docs/results.md`` says how often the
verdicts were right.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.methods import ENCODED

Verdict = Literal["better", "worse", "cannot tell"]
Predicted = Sequence[int] | NDArray[Any]
"""Class indices (N,): of the student, of the untouched RGB model on the encoded images, of the RGB
model behind the translator (``bridge``), or the true ones (``labels``)."""
Names = Sequence[str] | NDArray[np.str_]
"""Scenes or recordings (N,), whose images are alike."""
RESAMPLINGS = 2000
FEWEST = 30  # fewer images give no verdict
FEWEST_SCENES = 10  # nor do fewer scenes: draws of one to three have hardly any width
AT_CHANCE = 0.1  # a kappa (agreement beyond chance) below this is no agreement
TO_LABEL = 50
"""Largest number of images that are listed to be labelled."""
PROVEN = 0.05  # p below which labels decide
PROVING_SCENES = 6  # labels of fewer never decide: their smallest p is 2^(1 - scenes)


class Judgement(NamedTuple):
    """A verdict, the sentence that says it, and the p-value that it rests on, if labels gave it."""

    word: Verdict
    sentence: str
    p: float = 1.0


def verdict(
    student: Predicted,
    untouched: Predicted,
    bridge: Predicted,
    *,
    classes: int,  # their number K
    groups: Names | None = None,
    seed: int = 0,
    follows_bridge: bool = False,
) -> Verdict:
    """Compare a student with the untouched RGB model by a third view of the same images.

    ``better``: the third view agrees with the student more often than with the untouched model
    (95 %, two-sided, over draws of the groups), and all three agree with each other beyond chance.
    ``worse``: the two views of the RGB model agree beyond chance, and the student's agreement with
    both is certainly below AT_CHANCE. Few images, or few scenes, prove neither. Without ``groups``,
    each image is a scene. ``seed`` decides the draws. A student that ``follows_bridge`` is never
    called better.
    """
    s, u, b = (np.asarray(view) for view in (student, untouched, bridge))
    pattern = 4 * (s == u) + 2 * (s == b) + (u == b)
    names, scene = np.unique(np.arange(len(s)) if groups is None else groups, return_inverse=True)
    if len(s) < FEWEST or len(names) < FEWEST_SCENES:
        return "cannot tell"
    table = np.bincount(8 * scene + pattern, minlength=8 * (scene.max() + 1)).reshape(-1, 8)
    kinds, times = np.unique(table, axis=0, return_counts=True)  # scenes that are alike
    random = np.random.default_rng([seed, 0x7E5])
    draws = random.multinomial(len(table), times / len(table), size=RESAMPLINGS) @ kinds
    shares = draws / draws.sum(axis=1, keepdims=True)
    su, sb, ub = (shares[:, [p for p in range(8) if p & bit]].sum(axis=1) for bit in (4, 2, 1))
    frequencies = [np.bincount(view, minlength=classes) / len(s) for view in (s, u, b)]
    chance = [float(frequencies[i] @ frequencies[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    pairs = list(zip((su, sb, ub), chance, strict=True))
    beyond_chance = [np.percentile(agreement, 2.5) > expected for agreement, expected in pairs]
    at_chance = [
        np.percentile(agreement, 97.5) < expected + AT_CHANCE * (1 - expected)
        for agreement, expected in pairs[:2]
    ]
    if beyond_chance[2] and all(at_chance):
        return "worse"
    if all(beyond_chance) and not follows_bridge and np.percentile(sb - ub, 2.5) > 0:
        return "better"
    return "cannot tell"


def rows_to_label(
    student: Predicted, untouched: Predicted, groups: Names, *, seed: int
) -> NDArray[np.int64]:
    """Rows (at most TO_LABEL) of images on which the two models differ, in a random order.

    One image of each scene comes first, then a second one, because images of a scene are alike.
    There are none if the two differ on too few scenes for labels to decide. ``seed`` decides the
    order.
    """
    differ = np.flatnonzero(np.asarray(student) != np.asarray(untouched))
    if len({groups[row] for row in differ.tolist()}) < PROVING_SCENES:
        return np.zeros(0, np.int64)
    drawn = np.random.default_rng([seed, 0x1AB]).permutation(differ)
    seen: Counter[str] = Counter()
    turns = []
    for row in drawn:
        turns.append(seen[groups[row]])
        seen[groups[row]] += 1
    return drawn[np.argsort(turns, kind="stable")][:TO_LABEL]


def judge_by_labels(
    student: Predicted, untouched: Predicted, labels: Predicted, groups: Names, encoding: str
) -> Judgement:
    """Compare a student with the untouched RGB model by labels of a few images.

    An exact sign-flip test over scenes, two-sided, at p < PROVEN: if both models were equally good,
    the gain of each scene would be as likely negative as positive. ``encoding`` is the name of the
    encoding of target images.
    """
    s, u, true = (np.asarray(view) for view in (student, untouched, labels))
    gains = (s == true).astype(np.int64) - (u == true)
    scenes, scene = np.unique(groups, return_inverse=True)
    sizes, times = np.unique(np.abs(np.bincount(scene, gains)).astype(np.int64), return_counts=True)
    # Sums of drawn signs have the characteristic function of a product of cosines.
    most = int(sizes @ times)
    angles = 2 * np.pi * np.arange(2 * most + 1) / (2 * most + 1)
    product = np.prod([np.cos(size * angles) ** n for size, n in zip(sizes, times, strict=True)], 0)
    chances = np.fft.fftshift(np.fft.fft(product).real) / len(angles)  # of -most .. most
    p = float(chances[np.abs(np.arange(-most, most + 1)) >= abs(gains.sum())].sum())
    p = max(round(p, 12), 1e-12)  # the rest is rounding
    word: Verdict = "cannot tell" if p >= PROVEN else "better" if gains.sum() > 0 else "worse"
    counts = (
        f"Of {len(true)} images that you labelled, the student alone recognises "
        f"{(gains > 0).sum()}, your RGB model alone {(gains < 0).sum()} (p {p:.2g}): "
    )
    few = f"they are of {counted(len(scenes), 'group')}; at least {PROVING_SCENES} are needed."
    what_to_do = {
        "better": "ship the student.",
        "worse": _keep(encoding),
        "cannot tell": few if len(scenes) < PROVING_SCENES else "this may be chance.",
    }
    return Judgement(word, counts + what_to_do[word], p)


def advice(
    word: Verdict,
    encoding: str,
    student: Predicted,
    untouched: Predicted,
    groups: Names,
    *,
    follows_bridge: bool = False,
) -> str:
    """The verdict without labels as a sentence that says what to ship.

    ``encoding`` is the name of the encoding of target images; ``follows_bridge`` as in
    :func:`verdict`.
    """
    if word == "better":
        return "Judged without labels, the student is better than your RGB model: ship the student."
    if word == "worse":
        return "Judged without labels, the student is worse than your RGB model: " + _keep(encoding)
    unknown = "Without labels, sfkt cannot tell whether the student is better than your RGB model"
    if follows_bridge:
        unknown += ", because the bridge taught it to the end and would only agree with itself"
    differ = np.flatnonzero(np.asarray(student) != np.asarray(untouched))
    scenes = len({groups[row] for row in differ.tolist()})
    if not scenes:
        return f"{unknown}: the two name the same class for every image."
    if scenes < PROVING_SCENES:
        few = (
            f"{unknown}. Nor would a few labels show it: the two differ on images of "
            f"{counted(scenes, 'group')} only, and at least {PROVING_SCENES} are needed."
        )
        if len(set(groups)) < PROVING_SCENES:
            few += (
                " Images of one folder (or group of a manifest) are one group: give each recording "
                "its own, and prepare them again."
            )
        return few
    return f"{unknown}."


def _keep(encoding: str) -> str:
    return (
        f"keep your RGB model with the encoding {encoding}, which sfkt export --method {ENCODED} "
        "writes."
    )


def counted(count: int, noun: str) -> str:
    """``1 group``, ``2 groups``."""
    return f"{count:,} {noun}{'s'[: count != 1]}"
