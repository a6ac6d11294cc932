"""The pictures of the report: translations with predictions, worst errors, curves, features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfkt_cli import scores
from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.data.store import spread
from sfkt_cli.evaluation import figures
from sfkt_cli.evaluation.figures import Strip
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.models import finished_methods, source_on_rgb, translate, weights_kept
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.evaluation.report import Section, named
from sfkt_cli.methods.label_free import ScoringPairs

Numbers = NDArray[Any]
COLUMNS = 8
POINTS = 500  # samples of each set in a feature map, at most


def ti_gallery(evaluation: Evaluation, pairs: ScoringPairs) -> tuple[str, str]:
    """TI target, translated and true RGB images, with predictions; name and caption."""
    models = evaluation.models
    rows = _some(len(pairs.rows), evaluation.config.seed)
    stored, rgb = pairs.target[rows], evaluation.store["ti/rgb"][pairs.rows[rows]]
    partner = pairs.logits[rows].softmax(dim=1).numpy()
    own = evaluation.outcomes["bridge-only"].predictor.probabilities(stored)
    same = (partner.argmax(axis=1) == own.argmax(axis=1)).tolist()
    marks = ["✓ same" if agrees else "✗ differs" for agrees in same]
    captions = [f"{mark}\n{_says(evaluation, row)}" for mark, row in zip(marks, own, strict=True)]
    strips = [
        _target_strip(evaluation, stored),
        Strip("translated", translate(models, stored), captions, same),
        Strip("true RGB", rgb / 255.0, [_says(evaluation, row) for row in partner]),
    ]
    figures.draw_gallery(evaluation.folder / "gallery-ti.png", strips)
    return (
        "gallery-ti.png",
        "TI pairs: target image, its translation, the true RGB image. Below: predictions of the "
        "source model for the translation and for the RGB image (it does not know TI classes).",
    )


def tr_gallery(evaluation: Evaluation) -> Section:
    """TR target images and their translations, with predictions and the truth."""
    split = evaluation.headline_split or evaluation.splits["target"]
    rows = _spread_over_classes(split, evaluation.config.seed)
    legend = _draw_tr(evaluation, split, rows, "gallery-tr.png")
    drawn = "drawn at random" + " over the classes" * bool(split.truth)
    caption = f"Images of the {split.name} split, {drawn}: {legend}"
    return Section("Target images", picture="gallery-tr.png", caption=caption)


def worst_errors(evaluation: Evaluation, split: Split) -> Section | None:
    """The wrong predictions that were made with most confidence."""
    main = evaluation.main_method
    wrong = np.flatnonzero(~evaluation.right(main, split))
    if not len(wrong):
        return None
    confidence = evaluation.labelled(main, split).max(axis=1)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:COLUMNS]
    legend = _draw_tr(evaluation, split, split.rows[worst], "errors.png")
    caption = f"The most confident wrong predictions of {main} on the {split.name} split: {legend}"
    return Section("Worst errors", picture="errors.png", caption=caption)


def confusion(evaluation: Evaluation, split: Split) -> Section:
    """Confusion matrices of the methods shown."""
    names = evaluation.classes
    panels = {
        named(method): scores.confusion_matrix(
            evaluation.labelled(method, split).argmax(axis=1), split.labels, len(names)
        )
        for method in _shown_methods(evaluation)
    }
    figures.draw_confusion(evaluation.folder / "confusion.png", panels, names)
    caption = f"Confusion on the {split.name} split: per cent of each true class (a row)."
    return Section("Confusion", picture="confusion.png", caption=caption)


def reliability(evaluation: Evaluation, split: Split) -> Section:
    """How far a prediction's confidence can be trusted."""
    panels = {
        named(method): scores.reliability(evaluation.labelled(method, split), split.labels)
        for method in _shown_methods(evaluation)
    }
    figures.draw_reliability(evaluation.folder / "reliability.png", panels)
    caption = (
        f"Accuracy over confidence on the {split.name} split, 15 bins, and the images in each; "
        f"bins of fewer than {figures.FEWEST} images are left out above; below the dotted line "
        "the model is too sure."
    )
    return Section("Reliability", picture="reliability.png", caption=caption)


def feature_map(evaluation: Evaluation) -> Section | None:
    """Where source, bridged and target features lie."""
    target, test = evaluation.splits["target"].target, evaluation.splits.get("test")
    if len(target) < 3:
        return None
    stored = np.asarray(target[spread(len(target), POINTS)])
    of_source: dict[str, Numbers] = {}
    if test is not None and test.rgb is not None:
        rgb = np.asarray(test.rgb[spread(len(test.rgb), POINTS)])
        of_source["RGB (test)"] = source_on_rgb(evaluation.models).ask(rgb)[0].numpy()
    if evaluation.models.bridge:
        of_source["translated target"] = evaluation.features("bridge-only", stored)
    of_source["raw target"] = evaluation.features("source-only", stored)
    panels = {"source model": of_source}
    student, labelled = evaluation.student, evaluation.headline_split
    if student and labelled is not None and len(labelled.rows) >= 3:
        places = spread(len(labelled.rows), 2 * POINTS)
        rows, labels = labelled.rows[places], labelled.labels[places]
        features = evaluation.features(student, np.asarray(labelled.target[rows]))
        common = np.argsort(-np.bincount(labelled.labels), kind="stable")[: len(figures.POINTS)]
        panels[f"{student}, by true class"] = {
            evaluation.classes[k]: features[labels == k] for k in common if (labels == k).any()
        }
    figures.draw_embedding(evaluation.folder / "features.png", panels)
    caption = "Features on their two main axes (PCA). Each panel has its own axes."
    return Section("Features", picture="features.png", caption=caption)


def curves(evaluation: Evaluation) -> Section | None:
    """Training curves of all stages that trained something."""
    run = evaluation.run
    names = ("source", "bridge", *(f"transfer/{name}" for name in finished_methods(run)))
    stages = {stage: rows for stage in names if run.has(stage) and (rows := run.metrics(stage))}
    records = {stage: run.record(stage) for stage in stages}
    chosen = {
        stage: record["best_epoch"]
        for stage, record in records.items()
        if record.get("best_epoch") and weights_kept(record)
    }
    if not stages:
        return None
    figures.draw_curves(evaluation.folder / "curves.png", stages, chosen)
    caption = (
        "Loss terms, before the weights of the settings (distillation includes the trust in the "
        "bridge), and label-free scores of each epoch; vertical line: the epoch whose weights were "
        "kept."
    )
    return Section("Training curves", picture="curves.png", caption=caption)


def _shown_methods(evaluation: Evaluation) -> list[str]:
    """The methods in pictures of several panels."""
    methods = ("source-only", "bridge-only", evaluation.main_method, "oracle")
    return [name for name in dict.fromkeys(methods) if name in evaluation.outcomes]


def _target_strip(
    evaluation: Evaluation,
    stored: Numbers,
    captions: Sequence[str] = (),
    right: Sequence[bool | None] = (),
) -> Strip:
    """Target images in the student's encoding."""
    encoding = evaluation.encoding
    encoded = as_rgb(encode(torch.from_numpy(np.ascontiguousarray(stored)), encoding))
    pictures = encoded.permute(0, 2, 3, 1).numpy()
    return Strip(f"target ({encoding.kind})", pictures, captions, right)


def _draw_tr(evaluation: Evaluation, split: Split, rows: Numbers, name: str) -> str:
    """Draw target images and their translations; says what stands below them."""
    stored = np.asarray(split.target[rows])
    labels = [split.truth.get(row) for row in rows.tolist()]

    def captions(method: str, with_truth: bool) -> tuple[list[str], list[bool | None]]:
        texts, right = list[str](), list[bool | None]()
        probabilities = evaluation.outcomes[method].probabilities[split.name][rows]
        for label, row in zip(labels, probabilities, strict=True):
            text, hit = _says(evaluation, row), None
            if label is not None:
                hit = bool(row.argmax() == label)
                text = f"{'✓' if hit else '✗'} {text}"
                text = f"is {evaluation.classes[label]}\n{text}" if with_truth else text
            texts.append(text)
            right.append(hit)
        return texts, right

    main = evaluation.main_method
    truth = "the true class and " if split.truth else ""
    legend = f"below each target image {truth}what {main} predicts"
    strips = [_target_strip(evaluation, stored, *captions(main, True))]
    if evaluation.models.bridge:
        translated = translate(evaluation.models, stored)
        strips.append(Strip("translated", translated, *captions("bridge-only", False)))
        legend += ", below its translation what the source model predicts"
    figures.draw_gallery(evaluation.folder / name, strips)
    return legend + (" (✓ right, ✗ wrong)." if truth else ".")


def _says(evaluation: Evaluation, probabilities: Numbers) -> str:
    best = int(probabilities.argmax())
    return f"{figures.short(evaluation.classes[best], 12)} {100 * probabilities[best]:.0f} %"


def _some(count: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng([seed, 0x9A11]).permutation(count)[:COLUMNS])


def _spread_over_classes(split: Split, seed: int) -> NDArray[np.int64]:
    """Rows of as many classes as possible, drawn at random; any rows where nothing is labelled."""
    if not len(split.rows):
        return _some(len(split.target), seed)
    order = np.random.default_rng([seed, 0x9A12]).permutation(len(split.rows))
    labels = split.labels[order]
    turn = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels[:4000])])
    first = np.argsort(turn, kind="stable")[:COLUMNS]
    chosen = order[first]
    return split.rows[chosen[np.argsort(split.labels[chosen], kind="stable")]]
