"""Pictures of the report, as PNG: confusion, reliability, curves, galleries, feature maps.

Matplotlib is imported when the first picture is drawn. Nothing relies on colour alone: lines have
styles, points have shapes, right and wrong are written out. Colours: Okabe and Ito (2008).
"""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.files import replacing

Numbers = NDArray[Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
POINTS = ("o", "^", "s", "D", "v", "P", "X")
INK = "#1b1f24"
WRONG = "#B32D00"
RIGHT = "#005A8C"
DPI = 130
COLUMNS = 4  # charts of training curves beside each other
FEWEST = 10  # a bin of fewer images says nothing about reliability
TERMS = {
    "cross_entropy": "cross-entropy",
    "rec": "reconstruction",
    "d": "discriminator",
    "f": "features of pairs",
    "p": "maps of pairs",
    "im": "information maximisation",
    "kl": "distillation",
    "self": "pseudo-labels",
    "ti_agreement": "TI agreement",
    "ti_kappa": "TI kappa",
    "ti_rank": "TI partner rank",
    "ti_closeness": "TI closeness",
    "tr_information": "information",
    "tr_density": "neighbourhood density",
    "tr_mirror": "agreement with mirror images",
    "confidence": "confidence",
    "classes_said": "classes named",
}
"""Full names of loss terms and scores; others are shown as they are."""


@dataclass(frozen=True)
class Strip:
    """One line of a gallery."""

    title: str  # what the pictures are
    pictures: Numbers  # (N, H, W, 3) in [0, 1]
    captions: Sequence[str] = ()  # a text below each, or nothing
    # Whether each caption is right (blue) or wrong (red); None: neither.
    right: Sequence[bool | None] = ()


def draw_confusion(path: Path, panels: Mapping[str, Numbers], classes: Sequence[str]) -> None:
    """Confusion matrices (K, K) side by side, in per cent of each true class."""
    count = len(classes)
    side = min(max(2.6, 0.36 * count + 0.4), 9.0)
    columns = len(panels) if count <= 12 else min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = _figure(lines, columns, (side * columns + 1.2, (side + 1.1) * lines))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, matrix) in zip(axes.flat, panels.items(), strict=False):
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="cividis", vmin=0, vmax=100)
        axis.set_title(textwrap.fill(title, 26), fontsize=10)
        axis.set_xlabel("predicted")
        places = range(0, count, max(1, -(-count // 40)))
        names = [short(classes[place], 14) for place in places]
        axis.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(places, names if axis in axes[:, 0] else [], fontsize=8)
        if axis in axes[:, 0]:
            axis.set_ylabel("true")
        if count <= 20:
            for row, column in np.argwhere(share >= 0.5):
                value = share[row, column]
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                    color="black" if value > 55 else "white",
                )  # fmt: skip
    _save(figure, path)


def draw_reliability(path: Path, panels: Mapping[str, tuple[Numbers, Numbers, Numbers]]) -> None:
    """Reliability diagrams: accuracy over confidence, with the samples of each bin below.

    ``panels``: title to samples, mean confidence and accuracy of each bin.
    """
    figure, axes = _figure(2, len(panels), (3.1 * len(panels) + 0.5, 4.2), ratios=(3, 1))
    for (upper, lower), (title, bins) in zip(axes.T, panels.items(), strict=True):
        count, confidence, right = bins
        full = count >= FEWEST
        upper.plot([0, 100], [0, 100], color="grey", linestyle=":", label="as sure as right")
        upper.plot(
            100 * confidence[full], 100 * right[full], color=COLOURS[0], marker="o", markersize=4,
            label="measured",
        )  # fmt: skip
        upper.set(xlim=(0, 100), ylim=(0, 100))
        upper.set_title(textwrap.fill(title, 26), fontsize=10)
        edges = np.arange(len(count)) / len(count)
        lower.bar(100 * edges, count, width=100 / len(count), align="edge", color="grey")
        lower.set(xlim=(0, 100), xlabel="confidence %")
    axes[0][0].set_ylabel("accuracy %")
    axes[1][0].set_ylabel("images")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    _save(figure, path)


def draw_curves(
    path: Path, stages: Mapping[str, Sequence[Mapping[str, float]]], chosen: Mapping[str, int]
) -> None:
    """Training curves: a small chart for each loss term and score, four in a row.

    ``stages``: title to the rows of metrics.jsonl, of which all but time and rate is drawn;
    ``chosen``: the epoch, from 1, that each stage kept.
    """
    from matplotlib.figure import Figure

    names = {
        title: sorted(
            {name for row in rows for name in row} - {"epoch", "seconds", "learning_rate"},
            key=lambda name: (name.startswith(("ti_", "tr_")), name),
        )
        for title, rows in stages.items()
    }
    lines = [-(-len(terms) // COLUMNS) for terms in names.values()]
    height = 1.6 * sum(lines) + 0.35 * len(lines)
    figure = Figure((2.6 * COLUMNS, height), DPI, layout="constrained")
    parts = figure.subfigures(len(stages), 1, squeeze=False, height_ratios=lines)[:, 0]
    for part, count, (title, rows) in zip(parts, lines, stages.items(), strict=True):
        part.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(count, COLUMNS, squeeze=False).flat
        for axis in axes[len(names[title]) :]:
            axis.set_visible(False)
        for axis, name in zip(axes, names[title], strict=False):
            values = [row.get(name, np.nan) for row in rows]  # some terms begin late
            axis.plot([row["epoch"] for row in rows], values, color=COLOURS[0], marker=".")
            if title in chosen:
                axis.axvline(chosen[title], color="grey", linewidth=1)
            axis.set_title(f"{TERMS[name]} ({name})" if name in TERMS else name, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.ticklabel_format(useOffset=False)  # one would stand in the title
            axis.set_xlim(rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5)
            axis.set_xlabel("epoch", fontsize=7)
            axis.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_sweep(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    setting: str,
    measured: str,
) -> None:
    """Accuracy over a setting, one line a series, with its standard deviation.

    ``curves``: label to (value, mean, standard deviation), the last two fractions.
    """
    figure, ((axis,),) = _figure(1, 1, (5.2, 3.6))
    for i, (label, points) in enumerate(curves.items()):
        values, means, deviations = np.array(sorted(points)).T
        axis.errorbar(
            values, 100 * means, 100 * deviations, label=label, color=COLOURS[i % len(COLOURS)],
            linestyle=LINES[i % len(LINES)], marker=POINTS[i % len(POINTS)], capsize=3,
        )  # fmt: skip
    ticks = sorted({value for points in curves.values() for value, _, _ in points})
    above = [value for value in ticks if value > 0]
    if ticks[0] >= 0 and above and above[-1] >= 10 * above[0]:  # 0, 0.03, 0.1, 0.3, 1
        axis.set_xscale("symlog", linthresh=above[0])
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks], minor=False)
        axis.set_xticks([], minor=True)
    axis.set(xlabel=setting, ylabel=measured)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_gallery(path: Path, strips: Sequence[Strip]) -> None:
    """Pictures of the same samples below each other, one line a view."""
    columns = max(len(strip.pictures) for strip in strips)
    lines = sum(max((text.count("\n") + 1 for text in s.captions), default=0) for s in strips)
    height = 1.42 * len(strips) + 0.19 * lines + 0.3
    figure, axes = _figure(len(strips), 1, (1.42 * columns + 0.4, height))
    for axis, strip in zip(axes[:, 0], strips, strict=True):
        gap = max(1, round(0.05 * strip.pictures.shape[2]))
        pitch = strip.pictures.shape[2] + gap
        row = np.ones((strip.pictures.shape[1], columns * pitch - gap, 3))
        for column, picture in enumerate(strip.pictures):
            row[:, column * pitch : (column + 1) * pitch - gap] = np.clip(picture, 0, 1)
        axis.imshow(row, interpolation="nearest")
        axis.spines[:].set_visible(False)
        axis.set_yticks([])
        axis.set_ylabel(strip.title, fontsize=9)
        centres = pitch * np.arange(len(strip.captions)) + (pitch - gap) / 2 - 0.5
        axis.set_xticks(centres, strip.captions, fontsize=8.5)
        axis.tick_params(axis="x", length=0, pad=2)
        for label, right in zip(axis.get_xticklabels(), strip.right, strict=False):
            label.set_color(INK if right is None else RIGHT if right else WRONG)
    _save(figure, path)


def draw_embedding(path: Path, panels: Mapping[str, Mapping[str, Numbers]]) -> None:
    """Feature maps: sets of features (N, D) by name on two axes, one panel a model."""
    figure, axes = _figure(1, len(panels), (4.2 * len(panels) + 0.4, 4.0))
    for axis, (title, sets) in zip(axes[0], panels.items(), strict=True):
        projected, explained = two_axes(sets)
        for i, (name, points) in enumerate(projected.items()):
            axis.scatter(
                points[:, 0], points[:, 1], s=11, marker=POINTS[i % len(POINTS)], alpha=0.55,
                linewidths=0, color=COLOURS[i % len(COLOURS)], label=name,
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set(
            xticks=[], yticks=[], xlabel=f"two main axes: {100 * explained:.0f} % of the variance"
        )
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def two_axes(sets: Mapping[str, Numbers]) -> tuple[dict[str, Numbers], float]:
    """Project sets of features (N, D) on the two main axes (PCA) of all of them together.

    The sets (N, 2) come with the share of the variance that the two axes hold.
    """
    together = np.concatenate([features.astype(np.float64) for features in sets.values()])
    mean = together.mean(axis=0)
    _, scale, axes = np.linalg.svd(together - mean, full_matrices=False)
    share = float((scale[:2] ** 2).sum() / max(float((scale**2).sum()), 1e-12))
    return {name: (features - mean) @ axes[:2].T for name, features in sets.items()}, share


def short(text: str, most: int) -> str:
    """A text cut to a number of letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _figure(
    rows: int, columns: int, size: tuple[float, float], ratios: Sequence[float] | None = None
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=ratios)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # class names may hold dollar signs
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # shown as a box
        figure.savefig(
            partial, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.08
        )
