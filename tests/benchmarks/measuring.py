"""Timing two things in turn, so that whatever else the machine does touches both alike."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        name: What was measured.
        value: In ``unit``.
        unit: Such as ``ms`` or ``images/s``; empty for a ratio.
        target: What it should be, such as ``<= 1.08``; empty where there is none.
        samples: The single measurements behind the value.
    """

    name: str
    value: float
    unit: str = ""
    target: str = ""
    samples: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "value": round(self.value, 4)}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def alternate(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    before: Callable[[], object] | None = None,
) -> tuple[list[float], list[float]]:
    """Wall seconds of both, called in turn; one call of each before is not counted.

    The order within a round changes from round to round. ``before`` is called, and not timed,
    ahead of each.
    """
    first()
    second()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            if before:
                before()
            times[which].append(seconds((first, second)[which]))
    return times


def ratio_row(name: str, above: Sequence[float], below: Sequence[float], target: str = "") -> Row:
    """The median of the ratios of measurements taken in turn."""
    ratios = tuple(round(a / b, 4) for a, b in zip(above, below, strict=True))
    return Row(name, median(ratios), "", target, ratios)


def time_row(name: str, times: Sequence[float], target: str = "") -> Row:
    """The median of some times, in milliseconds."""
    return Row(name, 1e3 * median(times), "ms", target, tuple(round(1e3 * t, 3) for t in times))


def own_peak_mb() -> float:
    """Largest resident memory of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
