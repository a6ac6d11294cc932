"""Is the student better than the untouched RGB model? An answer without labels (ours).

Three views look at each target image: the student, the RGB model on the encoded image, and the RGB
model behind the translator. Where the first two differ, the third takes sides. If errors were
independent, the one that the third view agrees with more often would be right more often
(Platanios, Blum and Mitchell, UAI 2014). They are not: the third view is the RGB model, too, and
sides with itself. So only its word for the student counts, and a student is called worse only where
it certainly agrees with neither view. ``docs/results.md`` says how often the verdict was right.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "cannot tell"]
Predicted = Sequence[int] | NDArray[Any]
RESAMPLINGS = 2000
FEWEST = 30  # of fewer images nothing is said
AT_CHANCE = 0.1  # a kappa (agreement beyond chance) below this is no agreement


def verdict(
    student: Predicted,
    untouched: Predicted,
    bridge: Predicted,
    *,
    classes: int,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare a student with the untouched RGB model by a third view of the same images.

    ``better``: the third view agrees with the student more often than with the untouched model
    (95 %, two-sided, over draws of the groups), and all three agree with each other beyond chance.
    ``worse``: the two views of the RGB model agree beyond chance, and the student's agreement with
    both is certainly AT_CHANCE. Few images prove neither.

    Args:
        student: (N,) predicted class indices.
        untouched: (N,) those of the RGB model on the encoded images.
        bridge: (N,) those of the RGB model behind the translator.
        classes: Number of classes, K.
        groups: (N,) names of scenes or recordings, whose images are alike; None: each image alone.
        seed: Seed of the draws.
    """
    s, u, b = (np.asarray(view) for view in (student, untouched, bridge))
    if len(s) < FEWEST:
        return "cannot tell"
    pattern = 4 * (s == u) + 2 * (s == b) + (u == b)
    _, scene = np.unique(np.arange(len(s)) if groups is None else groups, return_inverse=True)
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
    if all(beyond_chance) and np.percentile(sb - ub, 2.5) > 0:
        return "better"
    return "cannot tell"


def advice(word: Verdict, encoding: str) -> str:
    """The verdict as a sentence that says what to ship; ``encoding`` is that of target images."""
    if word == "better":
        return "Judged without labels, the student is better than your RGB model: ship the student."
    if word == "worse":
        return (
            "Judged without labels, the student is worse than your RGB model: keep your RGB model "
            f"with the encoding {encoding}."
        )
    return (
        "Without labels it cannot be told whether the student is better than your RGB model: label "
        "a few hundred images before you ship it."
    )
