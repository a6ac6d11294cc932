"""The parts of the report behind the accuracies: tables in words, pictures beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfkt_cli import scores
from sfkt_cli.evaluation import figures, galleries
from sfkt_cli.evaluation.epoch_choice import epoch_choice
from sfkt_cli.evaluation.models import finished_methods, translate
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.evaluation.report import BOUNDS, Row, Section, amount, interval, percent
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.pairs import spread

LABEL_FREE = {
    "ti_agreement": "TI agreement %",
    "ti_kappa": "TI kappa",
    "ti_rank": "TI partner rank",
    "ti_distance": "TI feature distance",
    "tr_information": "information (nats)",
    "density": "neighbourhood density (nats)",
    "confidence": "confidence %",
    "classes_said": "classes named",
}
IN_PERCENT = ("ti_agreement", "confidence")
PICTURE_PAIRS = 256
"""TI pairs that PSNR and SSIM look at, at most."""


def facts(evaluation: Evaluation, rows: Sequence[Row]) -> tuple[str, ...]:
    """What a reader should know first."""
    found = []
    rgb = [row for row in rows if row.method == "source-rgb"]
    if rgb:
        found.append(
            f"Source model on RGB: {percent(rgb[0].accuracy)} % "
            f"({interval(rgb[0].accuracy_ci95)}) of n = {rgb[0].n:,} held-out images"
        )
    else:
        found.append(
            "Source model on RGB: not known, there are no labelled RGB partners of test images"
        )
    if not rows:
        found.append("test.h5 holds no labels: there is no accuracy, only label-free scores")
    found += _gap_closed(evaluation, rows)
    resamplings = evaluation.config.evaluate.bootstrap
    how = f"{resamplings:,} bootstrap resamplings" if resamplings else "normal approximation"
    found.append(f"Intervals: 95 %, {how}; images of one group (scene, subject) are drawn together")
    found.append(
        "Training: seconds and memory beyond the source model (the bridge counts for methods that "
        f"use it); speed on {evaluation.runtime.device.type}; seed {evaluation.config.seed}"
    )
    return tuple(found)


def _gap_closed(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    """How much of the way from source-only to the better bound the method shown goes."""
    main, found = evaluation.main_method, []
    bounds = {row.method: row.accuracy for row in rows if row.method in BOUNDS and not row.note}
    for split in evaluation.splits:
        accuracy = {row.method: row.accuracy for row in rows if row.split == split}
        if not bounds or main not in accuracy or main == "source-only":
            continue
        best = max(bounds, key=lambda name: bounds[name])
        start, gap = accuracy["source-only"], bounds[best] - accuracy["source-only"]
        if gap > 0:
            found.append(
                f"{main} on the {split} split: {percent((accuracy[main] - start) / gap)} % of the "
                f"way from source-only to the better bound ({best} on held-out images)"
            )
    return found


def sections(
    evaluation: Evaluation, run: Run, rows: Sequence[Row], folder: Path
) -> tuple[Section, ...]:
    """All sections; pictures, where they are wanted, are written into the folder."""
    found = [differences(evaluation), label_free(evaluation), epochs_kept(evaluation, run)]
    if not evaluation.config.evaluate.pictures:
        found.append(classes(rows, evaluation))
        return tuple(section for section in found if section is not None)
    found += [bridge_quality(evaluation, run, folder), *galleries.tr_gallery(evaluation, folder)]
    found += [classes(rows, evaluation, folder), *confusion(evaluation, folder)]
    found += [*reliability(evaluation, folder), *galleries.worst_errors(evaluation, folder)]
    found += [*feature_map(evaluation, folder), *curves(run, folder)]
    return tuple(section for section in found if section is not None)


def differences(evaluation: Evaluation) -> Section | None:
    """The method shown against every other, image by image."""
    main, cells = evaluation.main_method, []
    for split in evaluation.splits.values():
        for other in evaluation.outcomes:
            said = evaluation.outcomes[other].probabilities
            if not len(split.rows) or other == main or other in BOUNDS or split.name not in said:
                continue
            mean, low, high = scores.paired_difference(
                evaluation.right(main, split),
                evaluation.right(other, split),
                resamplings=evaluation.config.evaluate.bootstrap,
                seed=evaluation.config.seed,
                groups=split.groups,
            )
            shown = (f"{100 * mean:+.1f}", f"{100 * low:+.1f} .. {100 * high:+.1f}")
            cells.append((f"{main} - {other}", split.name, *shown))
    if not cells:
        return None
    return Section(
        f"{main} against the others",
        (
            "Difference of accuracies on the same images, in points; paired bootstrap over the "
            "images. These are models of one seed: how far training scatters is not in the "
            "interval, `sfkt benchmark` measures it.",
        ),
        ("difference", "split", "points", "95 % interval"),
        tuple(cells),
        left=2,
    )


def label_free(evaluation: Evaluation) -> Section:
    """Scores that need no labels, beside the accuracy that they stand for."""
    split = evaluation.main_split
    methods = {m: o for m, o in evaluation.outcomes.items() if o.label_free and m not in BOUNDS}
    names = [n for n in LABEL_FREE if any(n in o.label_free for o in methods.values())]
    accuracy = {m: float(evaluation.right(m, split).mean()) for m in methods} if split else {}
    cells = []
    for method, outcome in methods.items():
        shown = [
            percent(value) if name in IN_PERCENT else amount(value)
            for name, value in ((name, outcome.label_free.get(name)) for name in names)
        ]
        known = [percent(accuracy[method])] if accuracy else []
        cells.append((method, *shown, *known))
    text = [
        "TI agreement: the share of TI pairs for which the method names the same class on the "
        "target image as the source model on the RGB image. Kappa: the agreement beyond chance, "
        "which is 0. No score here uses a label"
        + (f"; the last column does ({split.name} split)." if split else ".")
    ]
    if len(methods) >= 4 and accuracy:
        row = ["rank correlation"]
        for name in names:
            both = [
                (o.label_free[name], accuracy[m])
                for m, o in methods.items()
                if name in o.label_free
            ]
            value = scores.rank_correlation(*np.array(both).T) if len(both) >= 4 else float("nan")
            row.append("-" if np.isnan(value) else f"{value:+.2f}")
        cells.append((*row, ""))
        text.append("Last row: Spearman's correlation with accuracy over the methods, afterwards.")
    header = ("method", *(LABEL_FREE[n] for n in names), *(["accuracy %"] if accuracy else []))
    return Section("Label-free scores", tuple(text), header, tuple(cells))


def epochs_kept(evaluation: Evaluation, run: Run) -> Section | None:
    """The epochs that label-free scores chose."""
    target = evaluation.splits.get("target")
    if target is None:
        return None
    stages = ["bridge"] if evaluation.models.translator else []
    stages += [f"transfer/{name}" for name in evaluation.models.students]
    return epoch_choice(run, evaluation.store, target, stages)


def bridge_quality(evaluation: Evaluation, run: Run, folder: Path) -> Section | None:
    """How good the translations of TI images are, in pictures and figures."""
    models, pairs = evaluation.models, evaluation.pairs
    if models.translator is None or pairs is None:
        return None
    few = spread(len(pairs.rgb), PICTURE_PAIRS)
    rgb = pairs.rgb[few] / 255.0
    translated = translate(models, pairs.target[few], evaluation.runtime)
    found = galleries.translated_features(evaluation, pairs.target)
    enough = len(found) > 1
    distance = scores.frechet_distance(found, pairs.features.numpy()) if enough else None
    record = run.record("bridge")
    known = (
        "Nothing was trained on these pairs."
        if pairs.unseen
        else "The bridge was trained on them, too: there were too few pairs to keep some back."
    )
    cells = (
        ("TI agreement of the kept epoch", f"{percent(record.get('ti_agreement'))} %"),
        ("the same beyond chance (kappa)", amount(record.get("ti_kappa"))),
        ("epoch kept", str(record.get("best_epoch", "-"))),
        ("PSNR", f"{scores.psnr(translated, rgb).mean():.1f} dB"),
        ("SSIM", f"{scores.ssim(translated, rgb).mean():.3f}"),
        ("Fréchet distance of source features", amount(distance)),
    )
    return Section(
        "The bridge on TI pairs",
        (f"{len(pairs.rgb):,} translated TI target images against their RGB partners. {known}",),
        ("quantity", "value"),
        cells,
        *galleries.ti_gallery(evaluation, pairs, folder),
    )


def classes(
    rows: Sequence[Row], evaluation: Evaluation, folder: Path | None = None
) -> Section | None:
    """Accuracy of each class; with a folder for pictures also as bars."""
    split = evaluation.main_split
    if split is None:
        return None
    here = [row for row in rows if row.split == split.name]
    counts = np.bincount(split.labels, minlength=len(evaluation.classes))
    cells = [
        (name, f"{counts[k]:,}", *(percent(row.class_accuracy[k]) for row in here))
        for k, name in enumerate(evaluation.classes)
    ]
    header = ("class", "n", *(row.method for row in here))
    title = f"Accuracy by class, {split.name} split (%)"
    if folder is None:
        return Section(title, (), header, tuple(cells))
    shown = shown_methods(evaluation)
    bars = {row.method: row.class_accuracy for row in here if row.method in shown}
    figures.draw_class_bars(folder / "classes.png", bars, evaluation.classes)
    caption = "The same as bars: " + ", ".join(bars) + ", from left to right in each class."
    return Section(title, (), header, tuple(cells), "classes.png", caption)


def confusion(evaluation: Evaluation, folder: Path) -> list[Section]:
    """Confusion matrices of the methods shown."""
    split = evaluation.main_split
    if split is None:
        return []
    panels = {}
    for method in shown_methods(evaluation):
        said = evaluation.outcomes[method].probabilities[split.name][split.rows].argmax(axis=1)
        panels[method] = scores.confusion_matrix(said, split.labels, len(evaluation.classes))
    figures.draw_confusion(folder / "confusion.png", panels, evaluation.classes)
    caption = f"Confusion on the {split.name} split: per cent of each true class (a row)."
    return [Section("Confusion", picture="confusion.png", caption=caption)]


def reliability(evaluation: Evaluation, folder: Path) -> list[Section]:
    """How far a prediction's confidence can be trusted."""
    split = evaluation.main_split
    if split is None:
        return []
    panels = {
        method: scores.reliability(
            evaluation.outcomes[method].probabilities[split.name][split.rows], split.labels
        )
        for method in shown_methods(evaluation)
    }
    figures.draw_reliability(folder / "reliability.png", panels)
    caption = (
        f"Accuracy over confidence on the {split.name} split, 15 bins, and the images in each; "
        "below the dotted line: surer than right."
    )
    return [Section("Reliability", picture="reliability.png", caption=caption)]


def feature_map(evaluation: Evaluation, folder: Path) -> list[Section]:
    """Where source, bridged and target features lie."""
    panels = galleries.feature_sets(evaluation)
    if not panels:
        return []
    projected, explained = {}, {}
    for title, sets in panels.items():
        projected[title], explained[title] = figures.two_axes(sets)
    figures.draw_embedding(folder / "features.png", projected, explained)
    caption = "Features on their two main axes (PCA), each panel by itself."
    return [Section("Features", picture="features.png", caption=caption)]


def curves(run: Run, folder: Path) -> list[Section]:
    """Training curves of all stages that trained something."""
    stages, chosen = {}, {}
    for stage in ("source", "bridge", *(f"transfer/{name}" for name in finished_methods(run))):
        rows = run.metrics(stage) if run.finished(stage) else []
        if rows:
            stages[stage] = rows
            best = run.record(stage).get("best_epoch")
            if best is not None:
                chosen[stage] = int(best)
    if not stages:
        return []
    figures.draw_curves(folder / "curves.png", stages, ("ti_", "tr_"), chosen)
    caption = (
        "Loss terms (above) and label-free scores (below) of each epoch; vertical line: the epoch "
        "whose weights were kept."
    )
    return [Section("Training curves", picture="curves.png", caption=caption)]


def shown_methods(evaluation: Evaluation) -> list[str]:
    """The methods in pictures of several panels."""
    wanted = ("source-only", "bridge-only", evaluation.main_method, "oracle")
    return [name for name in dict.fromkeys(wanted) if name in evaluation.outcomes]
