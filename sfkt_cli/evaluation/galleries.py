"""Pictures of images: translations with predictions, worst errors, features."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.data.pictures import picture_of
from sfkt_cli.data.store import spread
from sfkt_cli.evaluation import figures
from sfkt_cli.evaluation.figures import Strip
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.models import raw_encoding, source_on_rgb, translate
from sfkt_cli.evaluation.predictions import Evaluation, Pairs
from sfkt_cli.evaluation.report import Section, Shot

Numbers = NDArray[Any]
COLUMNS = 8
POINTS = 500  # samples of each set in a feature map, at most


def ti_gallery(evaluation: Evaluation, pairs: Pairs, folder: Path) -> tuple[str, str]:
    """TI target, translated and true RGB images, with predictions; name and caption."""
    models, runtime = evaluation.models, evaluation.runtime
    rows = _some(len(pairs.rgb), evaluation.config.seed)
    stored, rgb = pairs.target[rows], pairs.rgb[rows]
    partner = source_on_rgb(models, runtime).probabilities(rgb, runtime)
    own = evaluation.outcomes["bridge-only"].predictor.probabilities(stored, runtime)
    same = partner.argmax(axis=1) == own.argmax(axis=1)
    strips = [
        _target_strip(evaluation, stored),
        Strip(
            "translated",
            translate(models, stored, runtime),
            tuple(
                f"{'✓ same' if agrees else '✗ differs'}\n{_says(evaluation, row)}"
                for agrees, row in zip(same, own, strict=True)
            ),
            tuple(map(bool, same)),
        ),
        Strip("true RGB", rgb / 255.0, tuple(_says(evaluation, row) for row in partner)),
    ]
    figures.draw_gallery(folder / "gallery-ti.png", strips)
    return (
        "gallery-ti.png",
        "TI pairs: target image, its translation, the true RGB image. Below: predictions of the "
        "source model for the translation and for the RGB image (it does not know TI classes).",
    )


def tr_gallery(evaluation: Evaluation, folder: Path) -> Section | None:
    """TR target images and their translations, with predictions and the truth."""
    split = evaluation.main_split or next(iter(evaluation.splits.values()), None)
    if split is None or not len(split.target):
        return None
    rows = _spread_over_classes(split, evaluation.config.seed)
    legend = _draw_tr(evaluation, split, rows, folder / "gallery-tr.png")
    caption = f"Images of the {split.name} split, drawn at random over the classes: {legend}"
    return Section("Target images", picture="gallery-tr.png", caption=caption)


def shots(evaluation: Evaluation) -> tuple[Shot, ...]:
    """Real images of the sensor, with the predictions of the main method."""
    split = evaluation.headline_split or next(iter(evaluation.splits.values()), None)
    if split is None or not len(split.target) or not evaluation.config.evaluate.pictures:
        return ()
    probabilities = evaluation.outcomes[evaluation.main_method].probabilities[split.name]
    pictures = []
    for row in _spread_over_classes(split, evaluation.config.seed).tolist():
        best, label = int(probabilities[row].argmax()), split.truth.get(row)
        caption = evaluation.classes[best]
        if label is not None and label != best:
            caption = f"✗ {caption}, not {evaluation.classes[label]}"
        elif label is not None:
            caption = f"✓ {caption}"
        picture = picture_of(np.asarray(split.target[row]), evaluation.store.modality == "depth")
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="PNG")
        pictures.append(Shot(file.getvalue(), caption))
    return tuple(pictures)


def worst_errors(evaluation: Evaluation, split: Split, folder: Path) -> Section | None:
    """The wrong predictions that were made with most confidence."""
    main = evaluation.main_method
    if evaluation.right(main, split).all():
        return None
    confidence = evaluation.labelled(main, split).max(axis=1)
    wrong = np.flatnonzero(~evaluation.right(main, split))
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:COLUMNS]
    legend = _draw_tr(evaluation, split, split.rows[worst], folder / "errors.png")
    caption = f"The most confident wrong predictions of {main} on the {split.name} split: {legend}"
    return Section("Worst errors", picture="errors.png", caption=caption)


def feature_sets(evaluation: Evaluation) -> dict[str, dict[str, Numbers]]:
    """Features to be drawn: panels of sets (N, D) by name."""
    split = next(iter(evaluation.splits.values()), None)
    if split is None or len(split.target) < 3:
        return {}
    stored = np.asarray(split.target[spread(len(split.target), POINTS)])
    source_sets: dict[str, Numbers] = {}
    test = evaluation.splits.get("test")
    if test is not None and test.rgb is not None:
        rgb = np.asarray(test.rgb[spread(len(test.rgb), POINTS)])
        on_rgb = source_on_rgb(evaluation.models, evaluation.runtime)
        source_sets["RGB (test)"] = on_rgb.ask(rgb, evaluation.runtime)[0].numpy()
    if evaluation.models.translator:
        source_sets["translated target"] = features_of(evaluation, "bridge-only", stored)
    source_sets["raw target"] = features_of(evaluation, "source-only", stored)
    panels = {"source model": source_sets}
    main = evaluation.main_method
    labelled = evaluation.main_split
    if main in evaluation.models.students and labelled is not None and len(labelled.rows) >= 3:
        rows = labelled.rows[spread(len(labelled.rows), 2 * POINTS)]
        features = features_of(evaluation, main, np.asarray(labelled.target[rows]))
        labels = labelled.labels[np.searchsorted(labelled.rows, rows)]
        common = np.argsort(-np.bincount(labelled.labels), kind="stable")[: len(figures.POINTS)]
        panels[f"{main}, by true class"] = {
            evaluation.classes[k]: features[labels == k] for k in common if (labels == k).any()
        }
    return panels


def features_of(evaluation: Evaluation, method: str, stored: Numbers) -> Numbers:
    """A method's features (N, D) of stored target images."""
    features, _ = evaluation.outcomes[method].predictor.ask(stored, evaluation.runtime)
    on_cpu: Numbers = features.numpy()
    return on_cpu


def _target_strip(
    evaluation: Evaluation,
    stored: Numbers,
    captions: tuple[str, ...] = (),
    right: tuple[bool | None, ...] = (),
) -> Strip:
    """Target images in the student's encoding."""
    encoding = evaluation.models.encoding or raw_encoding(evaluation.store)
    encoded = as_rgb(encode(torch.from_numpy(np.ascontiguousarray(stored)), encoding))
    pictures = encoded.permute(0, 2, 3, 1).numpy()
    return Strip(f"target ({encoding.kind})", pictures, captions, right)


def _draw_tr(evaluation: Evaluation, split: Split, rows: Numbers, path: Path) -> str:
    """Draw target images and their translations; says what stands below them."""
    stored = np.asarray(split.target[rows])
    truth = split.truth

    def captions(method: str, with_truth: bool) -> tuple[tuple[str, ...], tuple[bool | None, ...]]:
        texts, right = [], []
        for row in rows.tolist():
            row_probabilities = evaluation.outcomes[method].probabilities[split.name][row]
            label = truth.get(row)
            hit = None if label is None else bool(row_probabilities.argmax() == label)
            mark = "" if hit is None else "✓ " if hit else "✗ "
            head = f"is {evaluation.classes[label]}\n" if label is not None and with_truth else ""
            texts.append(f"{head}{mark}{_says(evaluation, row_probabilities)}")
            right.append(hit)
        return tuple(texts), tuple(right)

    main = evaluation.main_method
    legend = f"below each target image {'the true class and ' if truth else ''}what {main} predicts"
    strips = [_target_strip(evaluation, stored, *captions(main, True))]
    if evaluation.models.translator:
        translated = translate(evaluation.models, stored, evaluation.runtime)
        strips.append(Strip("translated", translated, *captions("bridge-only", False)))
        legend += ", below its translation what the source model predicts"
    figures.draw_gallery(path, strips)
    return legend + (" (✓ right, ✗ wrong)." if truth else ".")


def _says(evaluation: Evaluation, probabilities: Numbers) -> str:
    best = int(probabilities.argmax())
    return f"{figures.short(evaluation.classes[best], 12)} {100 * probabilities[best]:.0f} %"


def _some(count: int, seed: int) -> NDArray[np.int64]:
    chosen = np.random.default_rng([seed, 0x9A11]).permutation(count)[:COLUMNS]
    return np.sort(chosen).astype(np.int64)


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
