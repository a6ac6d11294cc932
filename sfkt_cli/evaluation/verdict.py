"""Is the student better than the untouched RGB model? An answer without labels (ours).

Three views look at each target image: the student, the RGB model on the encoded image, and the RGB
model behind the translator. Where student and RGB model differ, the third view takes sides. If the
errors of the views were independent, their agreements would even tell how often each is right
(Platanios, Blum and Mitchell, UAI 2014): beyond chance, kappa_ij = b_i b_j with b = (K a - 1) /
(K - 1) for accuracy a, so

    b_student^2 = kappa_student,untouched * kappa_student,bridge / kappa_untouched,bridge

They are not independent: all views come from one RGB model. So accuracies come out too high, and
``docs/results.md`` says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Word = Literal["better", "worse", "cannot tell"]
RESAMPLINGS = 2000
FEWEST = 30
"""Of fewer images nothing is said."""


@dataclass(frozen=True)
class Verdict:
    """What the agreements say.

    Attributes:
        word: Whether the student is better than the untouched RGB model.
        student: Estimated accuracy of the student; None where it cannot be told.
        untouched: Of the untouched RGB model.
        student_ci95: 95 % interval of ``student`` over the images, dependence of views left out.
    """

    word: Word
    student: float | None = None
    untouched: float | None = None
    student_ci95: tuple[float, float] | None = None

    def sentence(self, encoding: str) -> str:
        """What it means, and what to ship.

        Args:
            encoding: Name of the encoding of target images.
        """
        if self.student is None or self.untouched is None or self.student_ci95 is None:
            return (
                "Without labels it cannot be told whether the student is better than your RGB "
                "model: label some hundred images before you ship it."
            )
        low, high = self.student_ci95
        estimate = (
            f"judged without labels, it is right for about {self.student:.0%} ({low:.0%} .. "
            f"{high:.0%}) of these images, your RGB model for {self.untouched:.0%}"
        )
        if self.word == "better":
            return f"The student is better than your RGB model: {estimate}. Ship the student."
        if self.word == "worse":
            return (
                f"The student is worse than your RGB model: {estimate}. Keep your RGB model with "
                f"the encoding {encoding}."
            )
        return (
            f"It cannot be told whether the student is better than your RGB model: {estimate}. "
            "Label some hundred images before you ship it."
        )


def verdict(
    student: Sequence[int] | NDArray[Any],
    untouched: Sequence[int] | NDArray[Any],
    bridge: Sequence[int] | NDArray[Any],
    *,
    classes: int,
    seed: int = 0,
) -> Verdict:
    """Compare a student with the untouched RGB model by a third view of the same images.

    ``better`` and ``worse`` need a third view that sides clearly (95 % of RESAMPLINGS draws of the
    images, two-sided) with one of both, and that agrees with both beyond chance.

    Args:
        student: (N,) predicted class indices.
        untouched: (N,) those of the RGB model on the encoded images.
        bridge: (N,) those of the RGB model behind the translator.
        classes: Number of classes, K.
        seed: Seed of the draws.
    """
    s, u, b = (np.asarray(view) for view in (student, untouched, bridge))
    if len(s) < FEWEST or np.array_equal(u, b):
        return Verdict("cannot tell")
    pattern = 4 * (s == u) + 2 * (s == b) + (u == b)
    counts = np.bincount(pattern, minlength=8)
    draws = np.random.default_rng([seed, 0x7E5]).multinomial(
        len(s), counts / len(s), size=RESAMPLINGS
    )
    su, sb, ub = (
        (rows[..., [p for p in range(8) if p & bit]].sum(axis=-1) / len(s) * classes - 1)
        / (classes - 1)
        for rows, bit in ((np.vstack([counts, draws]), bit) for bit in (4, 2, 1))
    )
    low, high = np.percentile(sb[1:] - ub[1:], (2.5, 97.5))
    word: Word = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    if min(np.percentile(kappa[1:], 2.5) for kappa in (su, sb, ub)) <= 0:
        return Verdict("cannot tell")

    def accuracy(first: NDArray[Any], second: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        beyond = np.sqrt(np.clip(first * second / np.maximum(other, 1e-9), 0, 1))
        share: NDArray[Any] = (beyond * (classes - 1) + 1) / classes
        return share

    students, untouched_ones = accuracy(su, sb, ub), accuracy(su, ub, sb)
    interval = np.percentile(students[1:], (2.5, 97.5))
    return Verdict(
        word,
        float(students[0]),
        float(untouched_ones[0]),
        (float(interval[0]), float(interval[1])),
    )
