"""The parts of the report behind the accuracies: tables in words, pictures beside them."""

import math
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
from sfkt_cli.evaluation.models import KEPT, model_digest, translate, weights_kept
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.evaluation.report import (
    BOUNDS,
    LABEL_FREE,
    NAMES,
    Headline,
    Line,
    Section,
    amount,
    interval,
    named,
    percent,
)
from sfkt_cli.evaluation.verdict import (
    PROVEN,
    Judgement,
    Verdict,
    advice,
    counted,
    judge_by_labels,
    rows_to_label,
    verdict,
)
from sfkt_cli.losses import structural_dissimilarity
from sfkt_cli.methods import find_method
from sfkt_cli.methods.label_free import EPOCHS_FILE, SELECTORS, load_epochs
from sfkt_cli.models.saving import WARM, WEIGHTS
from sfkt_cli.settings.runs import Run

SENSORS = {"depth": "depth", "nir": "near-infrared", "thermal": "thermal", "other": "target"}
REJECTED = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of images that the thresholds in the report make unknown."""
UNITS = {
    "ti_agreement": " % ↑",
    "ti_kappa": " ↑",
    "ti_rank": " ↑",
    "ti_closeness": " ↑",
    "tr_information": " (nats) ↑",
    "tr_density": " (nats) ↑",
    "confidence": " %",
    "classes_said": "",
}
"""Units of the label-free scores, and whether a large value is good."""
PICTURE_PAIRS = 256  # TI pairs that PSNR and SSIM look at, at most


def headline(evaluation: Evaluation, judged: Judgement | None) -> Headline:
    """The first line: with labels, how often the student is right; without them, the verdict."""
    main, split = evaluation.main_method, evaluation.headline_split
    images = f"{SENSORS[evaluation.store.modality]} images"
    who = NAMES.get(main, "student")
    if split is None:
        if judged is None:
            return Headline("There is no student yet, and no image has a label.")
        note = evaluation.outcomes[main].predictor.note
        details = (
            note and f"{who.capitalize()}: {note}.",
            _on_labelling(evaluation, len(images_to_label(evaluation, judged))),
            _on_pairs(evaluation),
        )
        return Headline(judged.sentence, " ".join(filter(None, details)), _tone(judged.word))
    here = {row.method: row for row in evaluation.rows if row.split == split.name}
    alone, encoded = (percent(here[name].accuracy) for name in ("source-only", "source-encoded"))
    text = f"The {who} recognises {percent(here[main].accuracy)} % of the {images}"
    kind = "held-out" if split.name == "test" else "training"
    detail = (
        f"{counted(here[main].n, f'{kind} image')} of {counted(split.scene_count, 'group')}, "
        f"95 % interval {interval(here[main].accuracy_ci95, ' %')}"
    )
    if main == "source-only":
        return Headline(f"{text}; there is no student yet.", detail)

    if encoded != alone:
        detail += f"; your RGB model on images encoded as {evaluation.encoding.kind}: {encoded} %"
    word = _compare(evaluation, main, "source-encoded", split).word
    if word == "cannot tell":
        detail += "; the difference may be chance"
    if note := evaluation.outcomes[main].predictor.note:
        detail += f"; {note}"
    elif judged is not None and judged.word != "cannot tell":
        detail += f"; without labels it would have been judged {judged.word} than your RGB model"
    rivals = [name for name in evaluation.rivals if name != "source-only"]
    p_values = scores.holm([_compare(evaluation, name, main, split).p for name in rivals])
    differing = [name for name, p in zip(rivals, p_values, strict=True) if p < PROVEN]
    best = max([main, *differing], key=lambda name: here[name].accuracy)
    if best != main:
        detail += f"; better still: {named(best)}, {percent(here[best].accuracy)} %"
    return Headline(f"{text}; your RGB model alone {alone} %.", detail, _tone(word))


def _tone(word: Verdict) -> str:
    return "open" if word == "cannot tell" else word


def _compare(evaluation: Evaluation, first: str, second: str, split: Split) -> Judgement:
    """Whether one method is better than another, by all labels of a split."""
    one, other = (evaluation.labelled(name, split).argmax(axis=1) for name in (first, second))
    groups, encoding = split.groups.astype(str), evaluation.encoding.kind
    return judge_by_labels(one, other, split.labels, groups, encoding)


def _on_labelling(evaluation: Evaluation, to_label: int) -> str:
    """What makes the labels of the user's own list a fair test; empty if there is no list."""
    if len(evaluation.own_labels[0]):
        return "p holds only if you labelled the whole list before you looked at the verdict."
    if not to_label or evaluation.list_to_label is None:
        return ""
    return (
        f"{evaluation.list_to_label.name} lists {counted(to_label, 'image')} to label. Label "
        "the whole list before you run sfkt evaluate again: if you keep labelling until something "
        "is decided, chance misleads you more often."
    )


def judge(evaluation: Evaluation) -> Judgement | None:
    """The verdict on the main method: by the user's own labels, else without any.

    Without labels it is the verdict of ``transfer``, if there was a bridge then and nothing has
    changed since. None: the main method is not a student.
    """
    if evaluation.student is None:
        return None
    rows, labels = evaluation.own_labels
    scenes, encoding = evaluation.splits["target"].scenes, evaluation.encoding.kind
    student, untouched = evaluation.said(evaluation.student), evaluation.said("source-encoded")
    if len(rows):
        groups = [scenes[row] for row in rows]
        return judge_by_labels(student[rows], untouched[rows], labels, groups, encoding)
    record = evaluation.run.record(f"transfer/{evaluation.student}")
    word: Verdict = "cannot tell"
    follows = record.get("follows_bridge", find_method(evaluation.student).follows_bridge)
    current = evaluation.outcomes[evaluation.student].predictor.note in (None, KEPT)
    if current and "bridge" in record["inputs"] and record.get("verdict"):
        word = cast("Verdict", record["verdict"])
    elif "bridge-only" in evaluation.outcomes:
        bridge, classes = evaluation.said("bridge-only"), len(evaluation.classes)
        seed = evaluation.config.seed
        word = verdict(student, untouched, bridge, classes=classes, groups=scenes, seed=seed)
    if follows and word == "better":  # the bridge agrees with itself, also in earlier records
        word = "cannot tell"
    said = advice(word, encoding, student, untouched, scenes, follows_bridge=follows)
    return Judgement(word, said)


def images_to_label(evaluation: Evaluation, judged: Judgement | None) -> list[str]:
    """Files of the images whose labels would decide; none if they would not, or need not."""
    if judged is None or judged.word != "cannot tell" or evaluation.labelled_splits:
        return []
    student, untouched = evaluation.said(evaluation.main_method), evaluation.said("source-encoded")
    target = evaluation.splits["target"]
    rows = rows_to_label(student, untouched, target.scenes, seed=evaluation.config.seed)
    return [target.paths[row] for row in rows]


def _on_pairs(evaluation: Evaluation) -> str:
    """How often the main method and the untouched model agree with the RGB model on TI pairs."""
    if evaluation.pairs is None:
        return ""
    score = {name: outcome.label_free for name, outcome in evaluation.outcomes.items()}
    agreements = [
        f"{NAMES.get(method, 'student')} {percent(score[method]['ti_agreement'])} % "
        f"(kappa {amount(score[method]['ti_kappa'])})"
        for method in (evaluation.main_method, "source-encoded")
    ]
    return (
        f"Pairs whose {SENSORS[evaluation.store.modality]} image gets the class that your RGB "
        f"model gives its RGB partner: {', '.join(agreements)}. Kappa is 0 by chance and 1 at most."
    )


def made(evaluation: Evaluation) -> str:
    """When the report was made, by which version, and of which model."""
    main, run = evaluation.main_method, evaluation.run
    model = {"source-only": "source", "bridge-only": "bridge"}.get(main, f"transfer/{main}")
    file = Path(run.folder.name) / model / WEIGHTS
    digest = model_digest(run, model)[:12]
    return f"{time.strftime('%Y-%m-%d')}, sfkt {__version__}, model {file.as_posix()} ({digest})"


def facts(evaluation: Evaluation) -> tuple[str, ...]:
    """What a reader should know first."""
    on_rgb = "not known, because no labelled test image has an RGB partner"
    for row in evaluation.rows:
        if row.method == "source-rgb":
            share = f"{percent(row.accuracy)} % ({interval(row.accuracy_ci95)})"
            on_rgb = f"{share} of n = {row.n:,} held-out images"
    groups = " and ".join(
        f"{counted(split.scene_count, 'group')} of the {split.name} split"
        for split in evaluation.labelled_splits
    )
    how = "test.h5 holds no labels, so there is no accuracy, only label-free scores"
    if groups:
        how = (
            f"Intervals: 95 %, from the scatter between the {groups}. Images of one group (scene, "
            "subject) are alike, so few groups give wide intervals"
        )
    return (
        f"Source model on RGB: {on_rgb}",
        *_measured(evaluation),
        how,
        "Training: seconds and memory beyond the source model (the bridge counts for methods that "
        f"use it); speed on {evaluation.models.runtime.device.type}; seed {evaluation.config.seed}",
    )


def _measured(evaluation: Evaluation) -> list[str]:
    """What the training measured without labels and relied on."""
    if evaluation.student is None:
        return []
    record, lines = evaluation.run.record(f"transfer/{evaluation.student}"), []
    used = {"tgkt.trust": "measured", "tgkt.beta_kl": 1.0} | record.get("settings", {})
    measured = used["tgkt.trust"] == "measured" and used["tgkt.beta_kl"]
    if evaluation.student == "tgkt" and "bridge_trust" in record and measured:
        taught = "0, so the student learned without it, from its own images and the pairs"
        if record.get("groups_compared", 2) < 2:
            taught = (
                "0, because it cannot be measured: too few TI pairs, or groups of them (places)"
            )
        elif record["bridge_trust"]:
            taught = (
                f"{record['bridge_trust']:.2f} before the training; the bridge's weight then falls "
                "to 0. Measured again with the finished student: "
                f"{record['bridge_trust_left']:.2f} (1: the bridge sees at least as well)"
            )
        lines.append(f"Trust in the bridge, 0 to 1: {taught}")
    if record.get("strangers") is not None:
        lines.append(
            f"About {percent(record['strangers'])} % of the target images may show none of the "
            "classes (a rough estimate: the true share may be 0, or larger)"
        )
    return lines


def sections(evaluation: Evaluation) -> tuple[Section, ...]:
    """All sections; if pictures are wanted, they are written into the folder."""
    pictures, split = evaluation.config.evaluate.pictures, evaluation.headline_split
    stages = ["bridge"] if evaluation.models.bridge else []
    stages += [f"transfer/{name}" for name in evaluation.models.students]
    parts = [
        differences(evaluation),
        thresholds(evaluation),
        label_free(evaluation),
        epoch_choice(evaluation.run, evaluation.splits["target"], stages),
    ]
    if pictures:
        parts += [bridge_quality(evaluation), galleries.tr_gallery(evaluation)]
    if split is not None:
        parts.append(classes(evaluation, split))
    if pictures and split is not None:
        parts += [
            galleries.confusion(evaluation, split),
            galleries.reliability(evaluation, split),
            galleries.worst_errors(evaluation, split),
        ]
    if pictures:
        parts += [galleries.feature_map(evaluation), galleries.curves(evaluation)]
    return tuple(section for section in parts if section is not None)


def differences(evaluation: Evaluation) -> Section | None:
    """The method shown against every other, image by image."""
    main, lines = evaluation.main_method, list[Line]()
    for split in evaluation.labelled_splits:
        for other in evaluation.rivals:
            gains = evaluation.right(main, split).astype(float) - evaluation.right(other, split)
            ends = scores.difference_interval(gains, split.groups)
            lines.append(
                {"against": named(other), "split": split.name,
                 "points ↑": f"{100 * gains.mean():+.1f}",
                 "95 % interval": " .. ".join(f"{100 * end:+.1f}" for end in ends)}
            )  # fmt: skip
    if not lines:
        return None
    return Section(
        f"{named(main)} against the others",
        (
            "Difference of accuracies on the same images, in points. The models have one seed: the "
            "interval does not include the scatter of training, which sfkt benchmark measures.",
        ),
        lines,
        left=2,
    )


def thresholds(evaluation: Evaluation) -> Section | None:
    """How many wrong and right answers `sfkt predict --threshold` rejects."""
    main, split = evaluation.student, evaluation.headline_split
    if split is None or main is None:
        return None
    temperature = evaluation.outcomes[main].predictor.temperature
    confidence = evaluation.labelled(main, split).max(axis=1)
    right = evaluation.right(main, split)
    lines: list[Line] = []
    levels = np.quantile(confidence, REJECTED).tolist()
    for shown in dict.fromkeys(_threshold(level) for level in levels):
        unsure = confidence < float(shown)
        parts = {
            "unknown %": unsure,
            "wrong answers rejected % ↑": unsure[~right],
            "right answers rejected % ↓": unsure[right],
            "accuracy of the rest % ↑": right[~unsure],
        }
        shares = {
            name: percent(float(part.mean()) if len(part) else None) for name, part in parts.items()
        }
        lines.append({"threshold": shown, **shares})
    text = f"What sfkt predict --threshold rejects with {named(main)}, on the {split.name} split."
    if temperature != 1:
        text += (
            f" Its logits are divided by the temperature {temperature:g}, fitted without labels."
        )
    return Section("Thresholds", (text,), lines)


def _threshold(confidence: float) -> str:
    """A confidence, rounded down to at least two digits of what it lacks: 0.612, 0.999987."""
    digits = max(3, 1 - math.floor(math.log10(max(1 - confidence, 1e-7))))
    return f"{math.floor(confidence * 10**digits) / 10**digits:.{digits}f}"


def label_free(evaluation: Evaluation) -> Section:
    """Scores that need no labels, beside the accuracy that they stand for."""
    split = evaluation.headline_split
    scored = {m: o.label_free for m, o in evaluation.outcomes.items() if m not in BOUNDS}
    headings = {
        name: figures.TERMS.get(name, name) + unit
        for name, unit in UNITS.items()
        if name in scored["source-only"]
    }
    lines = []
    for method, values in scored.items():
        texts = {
            heading: (percent if "%" in heading else amount)(values.get(name))
            for name, heading in headings.items()
        }
        lines.append({"method": named(method), **texts})
    text = (
        "TI agreement: the share of TI pairs for which the method names the same class on the "
        "target image as the source model on the RGB image. Kappa: agreement beyond chance (0 is "
        "chance). Closeness: 0 if the features of the two images are the same, -1 if they are no "
        "closer than to the mean. No score here uses a label"
    )
    if split is None:
        return Section(LABEL_FREE, (f"{text}.",), lines)
    paragraphs = [f"{text}; the last column does ({split.name} split)."]
    accuracy = {method: float(evaluation.right(method, split).mean()) for method in scored}
    for line, share in zip(lines, accuracy.values(), strict=True):
        line["accuracy % ↑"] = percent(share)
    if len(scored) >= 4:
        last = {"method": "rank correlation"}
        for name, heading in headings.items():
            having = [method for method, values in scored.items() if name in values]
            last[heading] = _correlation(
                [scored[method][name] for method in having], [accuracy[m] for m in having]
            )
        lines.append({**last, "accuracy % ↑": ""})
        paragraphs.append(
            "Last row: Spearman's correlation with accuracy over the methods, afterwards."
        )
    return Section(LABEL_FREE, tuple(paragraphs), lines)


def epoch_choice(run: Run, target: Split, stages: Sequence[str]) -> Section | None:
    """How well label-free scores chose the epochs, compared with labels afterwards.

    It compares the kept epoch with the best one, and each score with accuracy.
    """
    labels = np.array([target.truth.get(row, -1) for row in spread(len(target.ids)).tolist()])
    lines: list[Line] = []
    for stage in stages:
        predicted = load_epochs(run.output(stage, EPOCHS_FILE).parent)
        record = run.record(stage)
        kept = (weights_kept(record) and record.get("best_epoch")) or len(predicted) + 1
        metrics = run.metrics(stage)
        whole = len(metrics) == len(predicted) >= max(kept, 2) and predicted.shape[1] == len(labels)
        if not np.any(labels >= 0) or not whole:
            continue
        accuracy = (predicted == labels)[:, labels >= 0].mean(axis=1)
        of_kept, best = accuracy[kept - 1], accuracy.max()
        line = {
            "stage": stage,
            "kept": f"{kept} of {len(predicted)}",
            "its accuracy %": percent(of_kept),
            "best %": percent(best),
            "lost": f"{100 * (best - of_kept):.1f}",
        }
        for name in SELECTORS:
            values = [row[name] for row in metrics if name in row]
            line[figures.TERMS.get(name, name)] = _correlation(values, accuracy.tolist())
        lines.append(line)
    if not lines:
        return None
    return Section(
        "Choosing the epoch without labels",
        (
            "Accuracy on the unlabelled target images after the epoch that was kept and after the "
            "best one, and Spearman's correlation of each label-free score with it over the "
            "epochs. This was computed afterwards; nothing was chosen by it.",
        ),
        lines,
    )


def _correlation(values: Sequence[float], accuracies: Sequence[float]) -> str:
    """Spearman's rank correlation; - for fewer than four values, or if all are equal."""
    if len(values) != len(accuracies) or len(values) < 4:
        return "-"
    value = scores.rank_correlation(np.array(values), np.array(accuracies))
    return "-" if np.isnan(value) else f"{value:+.2f}"


def bridge_quality(evaluation: Evaluation) -> Section | None:
    """How good the translations of TI images are, in pictures and figures."""
    models, pairs = evaluation.models, evaluation.pairs
    if models.bridge is None or pairs is None:
        return None
    few = spread(len(pairs.rows), PICTURE_PAIRS)
    rgb = evaluation.store["ti/rgb"][pairs.rows[few]] / 255.0
    translated = translate(models, pairs.target[few])
    pictures = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (translated, rgb))
    features, distance = evaluation.features("bridge-only", pairs.target), None
    if len(features) > 1:
        distance = scores.frechet_distance(features, pairs.features.numpy())
    record, agreed = evaluation.run.record("bridge"), evaluation.outcomes["bridge-only"].label_free
    kept = weights_kept(record)
    trained = "Nothing was trained on these pairs."
    if not pairs.unseen:
        trained = "The bridge was trained on them, too: there were too few pairs to hold some out."
    elif WARM in record.get("inputs", {}):
        trained = "The run that the bridge was started from may have been trained on some of them."
    if not kept:
        trained = (
            "The translator was not kept, because it is not clearly better: these are the encoded "
            "images. With it, a target image is closer to its RGB partner than to "
            f"{percent(record.get('ti_rank'))} % of the others; without it, than to "
            f"{percent(record.get('untouched_rank'))} %."
        )
    quantities = {
        figures.TERMS["ti_agreement"]: f"{percent(agreed['ti_agreement'])} %",
        figures.TERMS["ti_kappa"]: amount(agreed["ti_kappa"]),
        "epoch kept": str(record.get("best_epoch", "-") if kept else "none"),
        "PSNR": f"{scores.psnr(translated, rgb).mean():.1f} dB",
        "SSIM": f"{1 - float(structural_dissimilarity(*pictures)):.3f}",
        "Fréchet distance of source features": amount(distance),
    }
    return Section(
        "The bridge on TI pairs",
        (f"{len(pairs.rows):,} translated TI target images against their RGB partners. {trained}",),
        [{"quantity": name, "value": text} for name, text in quantities.items()],
        *galleries.ti_gallery(evaluation, pairs),
    )


def classes(evaluation: Evaluation, split: Split) -> Section:
    """Accuracy of each class."""
    here = [row for row in evaluation.rows if row.split == split.name]
    counts = np.bincount(split.labels, minlength=len(evaluation.classes))
    lines = [
        {"class": name, "n": f"{counts[k]:,}"}
        | {named(row.method): percent(row.class_accuracy[k]) for row in here}
        for k, name in enumerate(evaluation.classes)
    ]
    return Section(f"Accuracy by class, {split.name} split (%)", lines=lines)
