"""What every model predicts for every image, and the scores of these predictions."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli import scores
from sfkt_cli.console import printable
from sfkt_cli.data.store import Store, spread
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.models import Models, Predictor, source_on_rgb
from sfkt_cli.evaluation.report import Row
from sfkt_cli.methods import label_free
from sfkt_cli.settings.config import Config
from sfkt_cli.training.pairs import held_out_pairs
from sfkt_cli.training.predicting import warn_of_collapse
from sfkt_cli.training.runtime import Runtime

Numbers = NDArray[Any]
TRAINING_ACCURACY = "trained on these very images and labels: its training accuracy"
ENSEMBLE = "tgkt+bridge"
VIEWS = ("tgkt", "bridge-only")  # what the ensemble is made of
SPEED_IMAGES = 512
SPEED_ROUNDS = 3


@dataclass
class Outcome:
    """What one model predicts."""

    predictor: Predictor  # the model
    probabilities: dict[str, Numbers] = field(default_factory=dict)  # (N, K) of each split, by name
    # Scores that need no labels, by name.
    label_free: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None  # speed of inference


@dataclass(frozen=True)
class Pairs:
    """The TI pairs that score, and the source model's outputs on the RGB images."""

    target: Numbers  # (M, H, W[, C]) target images, as stored
    rgb: Numbers  # (M, H, W, 3) RGB partners, as stored
    features: Tensor  # (M, D) of the RGB partners
    logits: Tensor  # (M, K) of the RGB partners
    unseen: bool  # whether nothing was trained on them; there may be too few pairs for that


@dataclass(frozen=True)
class Evaluation:
    """All that the report is made from."""

    config: Config  # settings
    store: Store  # transfer.h5
    models: Models  # read back
    splits: dict[str, Split]  # by name
    outcomes: dict[str, Outcome]  # by method, bounds last
    pairs: Pairs | None  # held-out TI pairs; None where there are none
    runtime: Runtime  # device and precision

    @property
    def classes(self) -> list[str]:
        """Names of the classes as they are shown; of the source model where the data have none."""
        return [printable(name) for name in self.store.classes or self.models.card.classes]

    @property
    def main_method(self) -> str:
        """The method that pictures show: tgkt, else that of the settings, else the best known."""
        students = list(self.models.students)
        for name in ("tgkt", self.config.transfer.method, *students, "bridge-only"):
            if name in self.outcomes:
                return name
        return "source-only"

    @property
    def labelled_splits(self) -> list[Split]:
        """The splits that have labels, ``target`` first."""
        return [split for split in self.splits.values() if len(split.rows)]

    @property
    def main_split(self) -> Split | None:
        """The labelled split that pictures show: ``target`` where it has labels."""
        return next(iter(self.labelled_splits), None)

    @property
    def headline_split(self) -> Split | None:
        """The labelled split of the first line of the report: held-out images if there are any."""
        return next(reversed(self.labelled_splits), None)

    def labelled(self, method: str, split: Split) -> Numbers:
        """A method's probabilities (L, K) of the labelled images."""
        return self.outcomes[method].probabilities[split.name][split.rows]

    def right(self, method: str, split: Split) -> NDArray[np.bool_]:
        """Whether a method names the true class of each labelled image (L,)."""
        right: NDArray[np.bool_] = self.labelled(method, split).argmax(axis=1) == split.labels
        return right

    def difference(self, first: str, second: str, split: Split) -> tuple[float, float, float]:
        """How much more often one method is right than another: mean, and 95 % interval."""
        return scores.paired_difference(
            self.right(first, split),
            self.right(second, split),
            resamplings=self.config.evaluate.bootstrap,
            seed=self.config.seed,
            groups=split.groups,
        )


def ti_pairs(store: Store, models: Models, runtime: Runtime, seed: int) -> Pairs | None:
    """The TI pairs that score the epochs of bridge and transfer; None where there are no pairs."""
    if not store.count("ti"):
        return None
    trained, held_out = held_out_pairs(store, seed)
    rows = held_out[spread(len(held_out))]
    rgb = store["ti/rgb"][rows]
    features, logits = source_on_rgb(models, runtime).ask(rgb, runtime)
    unseen = not np.isin(held_out, trained).any()
    return Pairs(store["ti/target"][rows], rgb, features, logits, unseen)


def ask(
    predictor: Predictor, splits: dict[str, Split], pairs: Pairs | None, runtime: Runtime
) -> Outcome:
    """Let a model predict every split, and score it without labels."""
    outcome = Outcome(predictor)
    for name, split in splits.items():
        outcome.probabilities[name] = predictor.probabilities(split.target, runtime)
    if "target" in outcome.probabilities:
        outcome.label_free = without_labels(outcome.probabilities["target"])
    if pairs is not None:
        features, logits = predictor.ask(pairs.target, runtime)
        scored = label_free.pair_scores((features, logits), (pairs.features, pairs.logits))
        outcome.label_free |= {"ti_distance": -scored.pop("ti_closeness"), **scored}
    return outcome


def look_for_collapse(evaluation: Evaluation) -> None:
    """Warn of each student, and of the bridge, that names one class for nearly all images."""
    for method, outcome in evaluation.outcomes.items():
        probabilities = outcome.probabilities.get("target")
        if probabilities is not None and not method.startswith("source-"):
            logits = torch.from_numpy(probabilities).clamp_min(1e-12).log()
            warn_of_collapse(logits, evaluation.classes, method, "evaluate")


def without_labels(probabilities: Numbers) -> dict[str, float]:
    """Scores of predictions (N, K) on TR target images that need no labels."""
    sample = probabilities[spread(len(probabilities))]
    logits = torch.from_numpy(probabilities).clamp_min(1e-12).log()
    label_free_scores = {
        "tr_information": label_free.information(logits),
        "confidence": float(probabilities.max(axis=1).mean()),
        "classes_said": float(len(np.unique(probabilities.argmax(axis=1)))),
    }
    if len(sample) > 1:
        label_free_scores["density"] = scores.soft_neighbourhood_density(sample)
    return label_free_scores


def ensemble(student: Outcome, bridge: Outcome) -> Outcome:
    """Both views of a target image: the student on it, the source model on its translation."""
    first, second = student.predictor, bridge.predictor
    memory = max(first.peak_memory_mb or 0, second.peak_memory_mb or 0) or None
    joint = Outcome(
        replace(
            first, method=ENSEMBLE, parameters=first.parameters + second.parameters,
            peak_memory_mb=memory, note=first.note or second.note,
        )
    )  # fmt: skip
    for name, probabilities in student.probabilities.items():
        views = [probabilities, bridge.probabilities[name]]
        joint.probabilities[name] = scores.geometric_mean(views)
    if "target" in joint.probabilities:
        joint.label_free = without_labels(joint.probabilities["target"])
    return joint


def ask_rgb(split: Split, models: Models, runtime: Runtime) -> Outcome | None:
    """The source model on the RGB partners of held-out images, where there are such."""
    if split.rgb is None:
        return None
    outcome = Outcome(source_on_rgb(models, runtime))
    outcome.probabilities[split.name] = outcome.predictor.probabilities(split.rgb, runtime)
    return outcome


def measure_speeds(evaluation: Evaluation) -> None:
    """Time all models on the same images, in turns: what slows the machine slows all of them.

    The median of SPEED_ROUNDS rounds counts, after one for warming up.
    """
    split = next(iter(evaluation.splits.values()), None)
    if split is None or not len(split.target):
        return
    seconds: dict[str, list[float]] = {}
    images = dict.fromkeys(evaluation.outcomes, np.asarray(split.target[:SPEED_IMAGES]))
    rgb = evaluation.splits["test"].rgb if "test" in evaluation.splits else None
    if "source-rgb" in images and rgb is not None:
        images["source-rgb"] = np.asarray(rgb[:SPEED_IMAGES])
    for turn in range(1 + SPEED_ROUNDS):
        for method, outcome in evaluation.outcomes.items():
            if method == ENSEMBLE:
                continue
            evaluation.runtime.wait()
            began = time.perf_counter()
            outcome.predictor.ask(images[method], evaluation.runtime)
            if turn:
                seconds.setdefault(method, []).append(time.perf_counter() - began)
    for method, took in seconds.items():
        speed = len(images[method]) / max(float(np.median(took)), 1e-9)
        evaluation.outcomes[method].images_per_second = speed
    if ENSEMBLE in evaluation.outcomes:
        both = [evaluation.outcomes[name].images_per_second or np.inf for name in VIEWS]
        evaluation.outcomes[ENSEMBLE].images_per_second = 1 / sum(1 / speed for speed in both)


def rows_of(evaluation: Evaluation) -> tuple[Row, ...]:
    """The rows of the report: all methods on all labelled splits."""
    return tuple(
        row_of(evaluation, outcome, split)
        for outcome in evaluation.outcomes.values()
        for split in evaluation.labelled_splits
        if split.name in outcome.probabilities
    )


def row_of(evaluation: Evaluation, outcome: Outcome, split: Split) -> Row:
    """One method on one labelled split."""
    config, predictor = evaluation.config, outcome.predictor
    probabilities = outcome.probabilities[split.name][split.rows]
    confusion = scores.confusion_matrix(
        probabilities.argmax(axis=1), split.labels, len(evaluation.classes)
    )
    recall = scores.class_recall(confusion)
    seen_with_labels = predictor.method == "oracle" and split.name == "target"
    return Row(
        method=predictor.method,
        seed=config.seed,
        split=split.name,
        n=len(split.rows),
        accuracy=scores.accuracy(confusion),
        accuracy_ci95=scores.bootstrap_interval(
            probabilities.argmax(axis=1) == split.labels,
            resamplings=config.evaluate.bootstrap,
            seed=config.seed,
            groups=split.groups,
        ),
        balanced_accuracy=scores.balanced_accuracy(confusion),
        macro_f1=scores.macro_f1(confusion),
        ece=scores.calibration_error(probabilities, split.labels),
        train_seconds=_rounded(predictor.train_seconds),
        peak_memory_mb=_rounded(predictor.peak_memory_mb),
        images_per_second=_rounded(outcome.images_per_second),
        parameters=predictor.parameters,
        class_accuracy=tuple(None if np.isnan(r) else float(r) for r in recall),
        note=TRAINING_ACCURACY if seen_with_labels else predictor.note,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
