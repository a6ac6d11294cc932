"""Is the student better than the untouched RGB model? An answer without labels (ours).

Three views look at each target image: the student, the RGB model on the encoded image, and the RGB
model behind the translator. Where the first two differ, the third takes sides. If errors were
independent, the one that the third view agrees with more often would be right more often
(Platanios, Blum and Mitchell, UAI 2014). They are not quite, since all views come from one RGB
model: the same theory gives accuracies that are far too high, so none is told. ``docs/results.md``
says how often the verdict was right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "cannot tell"]
Predicted = Sequence[int] | NDArray[Any]
RESAMPLINGS = 2000
FEWEST = 30
"""Of fewer images nothing is said."""


def verdict(
    student: Predicted, untouched: Predicted, bridge: Predicted, *, classes: int, seed: int = 0
) -> Verdict:
    """Compare a student with the untouched RGB model by a third view of the same images.

    ``better`` and ``worse`` need a third view that sides clearly with one of both (95 %, two-sided,
    over draws of the images), while all three agree with each other more often than by chance.

    Args:
        student: (N,) predicted class indices.
        untouched: (N,) those of the RGB model on the encoded images.
        bridge: (N,) those of the RGB model behind the translator.
        classes: Number of classes, K.
        seed: Seed of the draws.
    """
    s, u, b = (np.asarray(view) for view in (student, untouched, bridge))
    if len(s) < FEWEST or np.array_equal(u, b):
        return "cannot tell"
    pattern = 4 * (s == u) + 2 * (s == b) + (u == b)
    shares = np.bincount(pattern, minlength=8) / len(s)
    draws = np.random.default_rng([seed, 0x7E5]).multinomial(len(s), shares, size=RESAMPLINGS)
    su, sb, ub = (
        draws[:, [p for p in range(8) if p & bit]].sum(axis=1) / len(s) for bit in (4, 2, 1)
    )
    if min(np.percentile(agreement, 2.5) for agreement in (su, sb, ub)) <= 1 / classes:
        return "cannot tell"
    low, high = np.percentile(sb - ub, (2.5, 97.5))
    return "better" if low > 0 else "worse" if high < 0 else "cannot tell"


def advice(word: Verdict, encoding: str) -> str:
    """The verdict as a sentence that says what to ship.

    Args:
        word: Of :func:`verdict`.
        encoding: Name of the encoding of target images.
    """
    if word == "better":
        return "Judged without labels, the student is better than your RGB model: ship the student."
    if word == "worse":
        return (
            "Judged without labels, the student is worse than your RGB model: keep your RGB model "
            f"with the encoding {encoding}."
        )
    return (
        "Without labels it cannot be told whether the student is better than your RGB model: label "
        "some hundred images before you ship it."
    )
