"""The parts of the report behind the accuracies: tables in words, pictures beside them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from sfkt_cli import __version__, scores
from sfkt_cli.data.store import spread
from sfkt_cli.evaluation import figures, galleries
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.models import finished_methods, translate
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.evaluation.report import (
    BOUNDS,
    NAMES,
    Headline,
    Row,
    Section,
    amount,
    interval,
    named,
    percent,
)
from sfkt_cli.evaluation.verdict import Verdict, advice, verdict
from sfkt_cli.losses import structural_dissimilarity
from sfkt_cli.models.saving import CARD, WEIGHTS, read_card
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.pairs import FILE, SELECTORS, load_epochs

SENSORS = {"depth": "depth", "nir": "near-infrared", "thermal": "thermal", "other": "target"}
REJECTED = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of images that the thresholds in the report make unknown."""
LABEL_FREE = {
    "ti_agreement": "TI agreement % ↑",
    "ti_kappa": "TI kappa ↑",
    "ti_rank": "TI partner rank ↑",
    "ti_distance": "TI feature distance ↓",
    "tr_information": "information (nats) ↑",
    "density": "neighbourhood density (nats) ↑",
    "confidence": "confidence %",
    "classes_said": "classes named",
}
PICTURE_PAIRS = 256  # TI pairs that PSNR and SSIM look at, at most


def headline(evaluation: Evaluation, rows: Sequence[Row], judged: Verdict | None) -> Headline:
    """The first line: with labels how often the student is right, without them the verdict."""
    main, split = evaluation.main_method, evaluation.headline_split
    images = f"{SENSORS[evaluation.store.modality]} images"
    who = NAMES.get(main, "student")
    if split is None:
        if judged is None:
            return Headline("There is no student yet, and no image has a label.")
        tone = "open" if judged == "cannot tell" else judged
        return Headline(advice(judged, encoding_of(evaluation)), _on_pairs(evaluation), tone)
    here = {row.method: row for row in rows if row.split == split.name}
    text = f"The {who} recognises {percent(here[main].accuracy)} % of the {images}"
    kind = "held-out" if split.name == "test" else "training"
    detail = f"{here[main].n:,} {kind} images, 95 % interval {interval(here[main].accuracy_ci95)} %"
    if main == "source-only":
        return Headline(f"{text}; there is no student yet.", detail)

    _, low, high = evaluation.difference(main, "source-only", split)
    tone = "better" if low > 0 else "worse" if high < 0 else "open"
    if tone == "open":
        detail += "; the difference may be chance"
    rivals = [name for name in here if name not in (*BOUNDS, main, "source-only")]
    better = [name for name in rivals if evaluation.difference(name, main, split)[1] > 0]
    encoded = here["source-encoded"].accuracy if "source-encoded" in here else None
    if main in evaluation.models.students and encoded not in (None, here["source-only"].accuracy):
        of = encoding_of(evaluation)
        detail += f"; your RGB model on images encoded as {of}: {percent(encoded)} %"
    if note := evaluation.outcomes[main].predictor.note:
        detail += f"; {note}"
    elif judged not in (None, "cannot tell"):
        detail += f"; without labels it would have been judged {judged} than your RGB model"
    if better:
        best = max(better, key=lambda name: here[name].accuracy)
        detail += f"; better still: {named(best)}, {percent(here[best].accuracy)} %"
    return Headline(
        f"{text}; your RGB model alone {percent(here['source-only'].accuracy)} %.", detail, tone
    )


def judge(evaluation: Evaluation, run: Run) -> Verdict | None:
    """The verdict without labels on the main method; None where it is no student.

    It is the one that ``transfer`` gave, where there was a bridge then.
    """
    names = (evaluation.main_method, "source-encoded", "bridge-only")
    if names[0] not in evaluation.models.students:
        return None
    record = run.record(f"transfer/{names[0]}")
    if "bridge" in record["inputs"] and record.get("verdict"):
        return cast("Verdict", record["verdict"])
    outcomes = [evaluation.outcomes[name] for name in names if name in evaluation.outcomes]
    views = [o.probabilities["target"].argmax(axis=1) for o in outcomes if o.probabilities]
    if len(views) < len(names):
        return "cannot tell"
    groups = evaluation.store.strings("target/group")
    classes, seed = len(evaluation.classes), evaluation.config.seed
    return verdict(*views, classes=classes, groups=groups, seed=seed)


def encoding_of(evaluation: Evaluation) -> str:
    """Name of the encoding that the main method's student sees."""
    return evaluation.models.students[evaluation.main_method][1].kind


def _on_pairs(evaluation: Evaluation) -> str:
    """How far the main method and the RGB model alone agree with the RGB model on TI pairs."""
    if evaluation.pairs is None:
        return ""
    agreements = [
        f"{NAMES.get(method, 'student')} {percent(score['ti_agreement'])} % "
        f"(kappa {score['ti_kappa']:.2f})"
        for method in dict.fromkeys((evaluation.main_method, "source-only"))
        if "ti_kappa" in (score := evaluation.outcomes[method].label_free)
    ]
    return (
        f"Pairs whose {SENSORS[evaluation.store.modality]} image gets the class that your RGB "
        f"model gives its RGB partner: {', '.join(agreements)}. Kappa is 0 by chance and 1 at most."
    )


def made(evaluation: Evaluation, run: Run) -> str:
    """When the report was made, by which version, and of which model."""
    main = evaluation.main_method
    model = {"source-only": "source", "bridge-only": "bridge"}.get(main, f"transfer/{main}")
    file = Path(run.folder.name) / model / WEIGHTS
    digest = str(read_card(run.path(model, CARD)).get("sha256"))[:12]
    return f"{time.strftime('%Y-%m-%d')}, sfkt {__version__}, model {file.as_posix()} ({digest})"


def facts(evaluation: Evaluation, run: Run, rows: Sequence[Row]) -> tuple[str, ...]:
    """What a reader should know first."""
    on_rgb = "not known, because no labelled test image has an RGB partner"
    for row in (row for row in rows if row.method == "source-rgb"):
        share = f"{percent(row.accuracy)} % ({interval(row.accuracy_ci95)})"
        on_rgb = f"{share} of n = {row.n:,} held-out images"
    resamplings = evaluation.config.evaluate.bootstrap
    how = f"{resamplings:,} bootstrap resamplings" if resamplings else "normal approximation"
    unlabelled = ["test.h5 holds no labels: there is no accuracy, only label-free scores"]
    return (
        f"Source model on RGB: {on_rgb}",
        *([] if rows else unlabelled),
        *_gap_closed(evaluation, rows),
        *_measured(evaluation, run),
        f"Intervals: 95 %, {how}; images of one group (scene, subject) are drawn together",
        "Training: seconds and memory beyond the source model (the bridge counts for methods that "
        f"use it); speed on {evaluation.runtime.device.type}; seed {evaluation.config.seed}",
    )


def _measured(evaluation: Evaluation, run: Run) -> list[str]:
    """What the training measured without labels, and went by."""
    main, lines = evaluation.main_method, []
    if main not in evaluation.models.students:
        return []
    record = run.record(f"transfer/{main}")
    if main == "tgkt" and "bridge_trust" in record:
        trust, left = record["bridge_trust"], record["bridge_trust_left"]
        taught = "0, so the student learned without it, from its own images and the pairs"
        if trust:
            taught = (
                f"{trust:.2f} before the training; its weight then falls to 0. Measured again with "
                f"the finished student: {left:.2f} (1: the bridge sees much better)"
            )
        lines.append(f"Trust in the bridge, 0 to 1: {taught}")
    if record.get("strangers") is not None:
        lines.append(
            f"At most about {percent(record['strangers'])} % of the target images may show none of "
            "the classes (a coarse bound: no more look like TI images; it may well be none)"
        )
    return lines


def _gap_closed(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    """How much of the way from source-only to the better bound the method shown goes."""
    main, lines = evaluation.main_method, []
    bounds = {row.method: row.accuracy for row in rows if row.method in BOUNDS and not row.note}
    for split in evaluation.splits:
        accuracy = {row.method: row.accuracy for row in rows if row.split == split}
        if not bounds or main not in accuracy or main == "source-only":
            continue
        best = max(bounds, key=lambda name: bounds[name])
        start, gap = accuracy["source-only"], bounds[best] - accuracy["source-only"]
        if gap > 0:
            lines.append(
                f"{main} on the {split} split gains {100 * (accuracy[main] - start):.1f} of the "
                f"{100 * gap:.1f} points from source-only to the better bound ({best} on held-out "
                "images)"
            )
    return lines


def sections(
    evaluation: Evaluation, run: Run, rows: Sequence[Row], folder: Path
) -> tuple[Section, ...]:
    """All sections; pictures, where they are wanted, are written into the folder."""
    parts = [differences(evaluation), thresholds(evaluation, run), label_free(evaluation)]
    stages = ["bridge"] if evaluation.models.translator else []
    stages += [f"transfer/{name}" for name in evaluation.models.students]
    parts.append(epoch_choice(run, evaluation.splits.get("target"), stages))
    pictures, split = evaluation.config.evaluate.pictures, evaluation.main_split
    if pictures:
        parts += [bridge_quality(evaluation, run, folder), galleries.tr_gallery(evaluation, folder)]
    if split is not None:
        parts.append(classes(rows, evaluation, split))
    if pictures and split is not None:
        parts += [confusion(evaluation, split, folder), reliability(evaluation, split, folder)]
        parts.append(galleries.worst_errors(evaluation, split, folder))
    if pictures:
        parts += [feature_map(evaluation, folder), curves(run, folder)]
    return tuple(section for section in parts if section is not None)


def differences(evaluation: Evaluation) -> Section | None:
    """The method shown against every other, image by image."""
    main, cells = evaluation.main_method, []
    for split in evaluation.labelled_splits:
        for other in (name for name in evaluation.outcomes if name not in (main, *BOUNDS)):
            mean, low, high = evaluation.difference(main, other, split)
            interval_text = f"{100 * low:+.1f} .. {100 * high:+.1f}"
            cells.append((named(other), split.name, f"{100 * mean:+.1f}", interval_text))
    if not cells:
        return None
    return Section(
        f"{named(main)} against the others",
        (
            "Difference of accuracies on the same images, in points; paired bootstrap over the "
            "images. The models have one seed: the interval does not include the scatter of "
            "training, which sfkt benchmark measures.",
        ),
        ("against", "split", "points ↑", "95 % interval"),
        tuple(cells),
        left=2,
    )


def thresholds(evaluation: Evaluation, run: Run) -> Section | None:
    """What `sfkt predict --threshold` rejects, of wrong answers and of right ones."""
    main, split = evaluation.main_method, evaluation.headline_split
    if split is None or main not in evaluation.models.students:
        return None
    temperature = evaluation.outcomes[main].predictor.temperature
    confidence = evaluation.labelled(main, split).max(axis=1)
    right = evaluation.right(main, split)
    cells = []
    for share in REJECTED:
        threshold = round(float(np.quantile(confidence, share)), 3)
        unsure = confidence < threshold
        parts = (unsure, unsure[~right], unsure[right], right[~unsure])
        shares = (percent(float(part.mean()) if len(part) else None) for part in parts)
        cells.append((f"{threshold:.3f}", *shares))
    return Section(
        "Thresholds",
        (
            f"What sfkt predict --threshold rejects with {named(main)}, on the {split.name} split. "
            f"Its logits are divided by the temperature {temperature:g}, fitted without labels.",
        ),
        (
            "threshold", "unknown %", "wrong answers rejected % ↑", "right answers rejected % ↓",
            "accuracy of the rest % ↑",
        ),
        tuple(cells),
    )  # fmt: skip


def label_free(evaluation: Evaluation) -> Section:
    """Scores that need no labels, beside the accuracy that they stand for."""
    split = evaluation.main_split
    methods = {m: o for m, o in evaluation.outcomes.items() if o.label_free and m not in BOUNDS}
    names = [n for n in LABEL_FREE if any(n in o.label_free for o in methods.values())]
    accuracy = {m: float(evaluation.right(m, split).mean()) for m in methods} if split else {}
    cells = []
    for method, outcome in methods.items():
        texts = [
            (percent if "%" in LABEL_FREE[name] else amount)(outcome.label_free.get(name))
            for name in names
        ]
        cells.append((named(method), *texts, *([percent(accuracy[method])] if accuracy else [])))
    text = [
        "TI agreement: the share of TI pairs for which the method names the same class on the "
        "target image as the source model on the RGB image. Kappa: the agreement beyond chance, "
        "which is 0. No score here uses a label"
        + (f"; the last column does ({split.name} split)." if split else ".")
    ]
    if len(methods) >= 4 and accuracy:
        row = ["rank correlation"]
        for name in names:
            having = [method for method, o in methods.items() if name in o.label_free]
            values = [methods[method].label_free[name] for method in having]
            row.append(_correlation(values, [accuracy[method] for method in having]))
        cells.append((*row, ""))
        text.append("Last row: Spearman's correlation with accuracy over the methods, afterwards.")
    header = ("method", *(LABEL_FREE[n] for n in names), *(["accuracy % ↑"] if accuracy else []))
    return Section("Label-free scores", tuple(text), header, tuple(cells))


def epoch_choice(run: Run, target: Split | None, stages: Sequence[str]) -> Section | None:
    """How well label-free scores chose the epochs, compared with labels afterwards.

    It tells how the kept epoch compares with the best one, and each score with accuracy.
    """
    if target is None or not len(target.rows):
        return None
    rows = spread(len(target.ids))
    places = np.minimum(np.searchsorted(target.rows, rows), len(target.rows) - 1)
    labelled = target.rows[places] == rows
    cells = []
    for stage in stages:
        predicted = load_epochs(run.output(stage, FILE).parent)
        kept = run.record(stage).get("best_epoch") or len(predicted) + 1
        metrics = run.metrics(stage)
        whole = len(metrics) == len(predicted) >= max(kept, 2) and predicted.shape[1] == len(rows)
        if not np.any(labelled) or not whole:
            continue
        right = predicted[:, labelled] == target.labels[places[labelled]]
        accuracy = right.mean(axis=1)
        curves = ([row[name] for row in metrics if name in row] for name in SELECTORS)
        correlations = [_correlation(values, accuracy.tolist()) for values in curves]
        of_kept, best = accuracy[kept - 1], accuracy.max()
        cells.append((stage, f"{kept} of {len(predicted)}", percent(of_kept), percent(best),
                      f"{100 * (best - of_kept):.1f}", *correlations))  # fmt: skip
    if not cells:
        return None
    columns = ("stage", "kept", "its accuracy %", "best %", "lost")
    return Section(
        "Choosing the epoch without labels",
        (
            "Accuracy on the unlabelled target images after the epoch that was kept and after the "
            "best one, and Spearman's correlation of each label-free score with it over the "
            "epochs. This was computed afterwards; nothing was chosen by it.",
        ),
        (*columns, *(figures.TERMS[name] for name in SELECTORS)),
        tuple(cells),
    )


def _correlation(values: Sequence[float], accuracies: Sequence[float]) -> str:
    """Spearman's rank correlation; - where there are fewer than four of both, or all are equal."""
    if len(values) != len(accuracies) or len(values) < 4:
        return "-"
    value = scores.rank_correlation(np.array(values), np.array(accuracies))
    return "-" if np.isnan(value) else f"{value:+.2f}"


def bridge_quality(evaluation: Evaluation, run: Run, folder: Path) -> Section | None:
    """How good the translations of TI images are, in pictures and figures."""
    models, pairs = evaluation.models, evaluation.pairs
    if models.translator is None or pairs is None:
        return None
    few = spread(len(pairs.rgb), PICTURE_PAIRS)
    rgb = pairs.rgb[few] / 255.0
    translated = translate(models, pairs.target[few], evaluation.runtime)
    pictures = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (translated, rgb))
    features = galleries.features_of(evaluation, "bridge-only", pairs.target)
    enough = len(features) > 1
    distance = scores.frechet_distance(features, pairs.features.numpy()) if enough else None
    record = run.record("bridge")
    trained = (
        "Nothing was trained on these pairs."
        if pairs.unseen
        else "The bridge was trained on them, too: there were too few pairs to keep some back."
    )
    cells = (
        ("TI agreement of the kept epoch", f"{percent(record.get('ti_agreement'))} %"),
        ("the same beyond chance (kappa)", amount(record.get("ti_kappa"))),
        ("epoch kept", str(record.get("best_epoch", "-"))),
        ("PSNR", f"{scores.psnr(translated, rgb).mean():.1f} dB"),
        ("SSIM", f"{1 - float(structural_dissimilarity(*pictures)):.3f}"),
        ("Fréchet distance of source features", amount(distance)),
    )
    return Section(
        "The bridge on TI pairs",
        (f"{len(pairs.rgb):,} translated TI target images against their RGB partners. {trained}",),
        ("quantity", "value"),
        cells,
        *galleries.ti_gallery(evaluation, pairs, folder),
    )


def classes(rows: Sequence[Row], evaluation: Evaluation, split: Split) -> Section:
    """Accuracy of each class."""
    here = [row for row in rows if row.split == split.name]
    counts = np.bincount(split.labels, minlength=len(evaluation.classes))
    cells = [
        (name, f"{counts[k]:,}", *(percent(row.class_accuracy[k]) for row in here))
        for k, name in enumerate(evaluation.classes)
    ]
    header = ("class", "n", *(named(row.method) for row in here))
    title = f"Accuracy by class, {split.name} split (%)"
    return Section(title, (), header, tuple(cells))


def confusion(evaluation: Evaluation, split: Split, folder: Path) -> Section:
    """Confusion matrices of the methods shown."""
    panels = {
        named(method): scores.confusion_matrix(
            evaluation.labelled(method, split).argmax(axis=1), split.labels, len(evaluation.classes)
        )
        for method in shown_methods(evaluation)
    }
    figures.draw_confusion(folder / "confusion.png", panels, evaluation.classes)
    caption = f"Confusion on the {split.name} split: per cent of each true class (a row)."
    return Section("Confusion", picture="confusion.png", caption=caption)


def reliability(evaluation: Evaluation, split: Split, folder: Path) -> Section:
    """How far a prediction's confidence can be trusted."""
    panels = {
        named(method): scores.reliability(evaluation.labelled(method, split), split.labels)
        for method in shown_methods(evaluation)
    }
    figures.draw_reliability(folder / "reliability.png", panels)
    caption = (
        f"Accuracy over confidence on the {split.name} split, 15 bins, and the images in each; "
        f"bins of fewer than {figures.FEWEST} images are left out above; below the dotted line "
        "the model is too sure."
    )
    return Section("Reliability", picture="reliability.png", caption=caption)


def feature_map(evaluation: Evaluation, folder: Path) -> Section | None:
    """Where source, bridged and target features lie."""
    panels = galleries.feature_sets(evaluation)
    if not panels:
        return None
    projected, explained = {}, {}
    for title, sets in panels.items():
        projected[title], explained[title] = figures.two_axes(sets)
    figures.draw_embedding(folder / "features.png", projected, explained)
    caption = "Features on their two main axes (PCA). Each panel has its own axes."
    return Section("Features", picture="features.png", caption=caption)


def curves(run: Run, folder: Path) -> Section | None:
    """Training curves of all stages that trained something."""
    names = ("source", "bridge", *(f"transfer/{name}" for name in finished_methods(run)))
    metrics = {stage: run.metrics(stage) for stage in names if run.has(stage)}
    stages = {stage: rows for stage, rows in metrics.items() if rows}
    chosen = {stage: best for stage in stages if (best := run.record(stage).get("best_epoch"))}
    if not stages:
        return None
    figures.draw_curves(folder / "curves.png", stages, chosen)
    caption = (
        "Loss terms, unweighted, and label-free scores of each epoch; vertical line: the epoch "
        "whose weights were kept."
    )
    return Section("Training curves", picture="curves.png", caption=caption)


def shown_methods(evaluation: Evaluation) -> list[str]:
    """The methods in pictures of several panels."""
    methods = ("source-only", "bridge-only", evaluation.main_method, "oracle")
    return [name for name in dict.fromkeys(methods) if name in evaluation.outcomes]
