"""What every model predicts for every image, and the scores of these predictions."""

import functools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli import scores
from sfkt_cli.console import printable, warn
from sfkt_cli.data.images import Encoding
from sfkt_cli.data.store import Store
from sfkt_cli.evaluation.labelled import Split, list_to_label, match_own_labels, read_own_labels
from sfkt_cli.evaluation.models import Models, Predictor, source_on_rgb
from sfkt_cli.evaluation.report import BOUNDS, Row
from sfkt_cli.methods import label_free
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run, main_student
from sfkt_cli.training.predicting import warn_of_collapse

Numbers = NDArray[Any]
TRAINING_ACCURACY = "training accuracy: it was trained on these images and labels"
ENSEMBLE = "tgkt+bridge"
VIEWS = ("tgkt", "bridge-only")  # what the ensemble is made of
SPEED_IMAGES = 512
SPEED_ROUNDS = 3


@dataclass
class Outcome:
    """What one model predicts."""

    predictor: Predictor  # the model
    probabilities: dict[str, Numbers]  # (N, K) of each split, by name
    label_free: dict[str, float] = field(default_factory=dict)  # scores without labels, by name
    images_per_second: float | None = None  # speed of inference


@dataclass(frozen=True)
class Evaluation:
    """Everything that the report is made from."""

    config: Config  # settings
    run: Run
    folder: Path  # takes the pictures
    store: Store  # transfer.h5
    models: Models  # read back
    splits: dict[str, Split]  # by name; ``target`` is always there
    pairs: label_free.ScoringPairs | None  # those that score; None where there are none
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by method, bounds last

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the classes as they are shown; of the source model where the data have none."""
        return [printable(name) for name in self.store.classes or self.models.card.classes]

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the report: all methods on all labelled splits."""
        return tuple(
            _row_of(self, outcome, split)
            for outcome in self.outcomes.values()
            for split in self.labelled_splits
            if split.name in outcome.probabilities
        )

    @property
    def main_method(self) -> str:
        """The method that pictures show: the student, else the bridge, else the source model."""
        return self.student or ("bridge-only" if "bridge-only" in self.outcomes else "source-only")

    @property
    def student(self) -> str | None:
        """The main student; None where there is none."""
        return main_student([*self.models.students], self.config.transfer.method)

    @functools.cached_property
    def list_to_label(self) -> Path | None:
        """The file that takes the user's labels for this student and source model."""
        return None if self.student is None else list_to_label(self.run, self.student)

    @functools.cached_property
    def own_labels(self) -> tuple[Numbers, Numbers]:
        """Rows of target images that the user labelled (L,), and classes (L,).

        None where the data have labels: then these judge.

        Raises:
            DataError: The list cannot be read, or names other images or classes.
        """
        path = self.list_to_label
        own = {} if path is None or self.labelled_splits else read_own_labels(path)
        classes = self.store.classes or self.models.card.classes
        return match_own_labels(path or Path(), own, self.splits["target"], classes)

    @functools.cached_property
    def encoding(self) -> Encoding:
        """How target images are encoded for what is compared with the main student."""
        return self.models.encoding(self.config, self.store)

    @property
    def rivals(self) -> list[str]:
        """The methods beside the main one."""
        return [name for name in self.outcomes if name not in (self.main_method, *BOUNDS)]

    @property
    def labelled_splits(self) -> list[Split]:
        """The splits that have labels, ``target`` first."""
        return [split for split in self.splits.values() if len(split.rows)]

    @property
    def headline_split(self) -> Split | None:
        """The labelled split of first line and pictures: held-out images if there are any."""
        return next(reversed(self.labelled_splits), None)

    def said(self, method: str) -> NDArray[np.int64]:
        """Class indices (N,) that a method names for all target images."""
        said: NDArray[np.int64] = self.outcomes[method].probabilities["target"].argmax(axis=1)
        return said

    def labelled(self, method: str, split: Split) -> Numbers:
        """A method's probabilities (L, K) of the labelled images."""
        return self.outcomes[method].probabilities[split.name][split.rows]

    def right(self, method: str, split: Split) -> NDArray[np.bool_]:
        """Whether a method names the true class of each labelled image (L,)."""
        right: NDArray[np.bool_] = self.labelled(method, split).argmax(axis=1) == split.labels
        return right

    def features(self, method: str, stored: Numbers) -> Numbers:
        """A method's features (N, D) of stored target images."""
        features: Numbers = self.outcomes[method].predictor.ask(stored)[0].numpy()
        return features

    def ask(self, predictor: Predictor) -> None:
        """Let a model predict every split, and score it without labels.

        A student whose predictions are no numbers is left out, with a warning.
        """
        method = predictor.method
        probabilities = {
            name: predictor.probabilities(split.target) for name, split in self.splits.items()
        }
        finite = all(np.isfinite(part).all() for part in probabilities.values())
        if not finite and method in self.models.students:
            del self.models.students[method]
            warn(
                f"{method} is left out: its predictions are not finite numbers. Train it again "
                f"with a lower learning rate, `sfkt transfer --method {method} --force ...`"
            )
            return
        outcome = Outcome(predictor, probabilities, without_labels(probabilities["target"]))
        if self.pairs is not None and predictor.beside is None:  # two views have no common features
            outcome.label_free |= self.pairs.scores(*predictor.ask(self.pairs.target))
        self.outcomes[method] = outcome


def look_for_collapse(evaluation: Evaluation) -> None:
    """Warn about each student, and the bridge, if it names one class for nearly all images."""
    for method, outcome in evaluation.outcomes.items():
        if not method.startswith("source-"):
            logits = _logits(outcome.probabilities["target"])
            warn_of_collapse(logits, method, "evaluate", evaluation.classes)


def without_labels(probabilities: Numbers) -> dict[str, float]:
    """Scores of predictions (N, K) on TR target images that need no labels."""
    return label_free.target_scores(_logits(probabilities)) | {
        "confidence": float(probabilities.max(axis=1).mean()),
        "classes_said": float(len(np.unique(probabilities.argmax(axis=1)))),
    }


def _logits(probabilities: Numbers) -> Tensor:
    return torch.from_numpy(probabilities).clamp_min(1e-12).log()


def add_ensemble(evaluation: Evaluation) -> None:
    """Add the mean of both views: the student on the image, the source model on its translation."""
    if not evaluation.outcomes.keys() >= set(VIEWS):
        return
    first, second = (evaluation.outcomes[name].predictor for name in VIEWS)
    both = replace(
        first,
        method=ENSEMBLE,
        beside=second.view,
        peak_memory_mb=max(first.peak_memory_mb or 0, second.peak_memory_mb or 0) or None,
        note=first.note or second.note,
    )
    evaluation.ask(both)


def add_rgb_bound(evaluation: Evaluation) -> None:
    """Add the source model on the RGB partners of held-out images, if there are any."""
    test = evaluation.splits.get("test")
    if test is not None and test.rgb is not None:
        on_rgb = source_on_rgb(evaluation.models)
        probabilities = on_rgb.probabilities(test.rgb)
        evaluation.outcomes[on_rgb.method] = Outcome(on_rgb, {"test": probabilities})


def measure_speeds(evaluation: Evaluation) -> None:
    """Time all models on the same images, in turns, so that a slow machine slows all of them.

    The median of SPEED_ROUNDS rounds counts, after one for warming up.
    """
    outcomes, splits = evaluation.outcomes, evaluation.splits
    target = np.asarray(splits["target"].target[:SPEED_IMAGES])
    images = dict.fromkeys(outcomes, target)
    if "source-rgb" in images:
        images["source-rgb"] = np.asarray(splits["test"].rgb)[:SPEED_IMAGES]
    seconds: dict[str, list[float]] = {method: [] for method in images}
    for _ in range(1 + SPEED_ROUNDS):
        for method, stored in images.items():
            evaluation.models.runtime.wait()
            began = time.perf_counter()
            outcomes[method].predictor.probabilities(stored)
            seconds[method].append(time.perf_counter() - began)
    for method, (_, *took) in seconds.items():
        speed = len(images[method]) / max(float(np.median(took)), 1e-9)
        outcomes[method].images_per_second = speed


def _row_of(evaluation: Evaluation, outcome: Outcome, split: Split) -> Row:
    """One method on one labelled split."""
    predictor = outcome.predictor
    probabilities = evaluation.labelled(predictor.method, split)
    predicted, classes = probabilities.argmax(axis=1), len(evaluation.classes)
    confusion = scores.confusion_matrix(predicted, split.labels, classes)
    recall = scores.class_recall(confusion)
    seen_with_labels = predictor.method == "oracle" and split.name == "target"
    return Row(
        method=predictor.method,
        seed=evaluation.config.seed,
        split=split.name,
        n=len(split.rows),
        accuracy=scores.accuracy(confusion),
        accuracy_ci95=scores.share_interval(predicted == split.labels, split.groups),
        balanced_accuracy=scores.balanced_accuracy(confusion),
        macro_f1=scores.macro_f1(confusion),
        ece=scores.calibration_error(probabilities, split.labels),
        train_seconds=_rounded(predictor.train_seconds),
        peak_memory_mb=_rounded(predictor.peak_memory_mb),
        images_per_second=_rounded(outcome.images_per_second),
        parameters=predictor.parameters,
        class_accuracy=tuple(None if np.isnan(share) else float(share) for share in recall),
        note=TRAINING_ACCURACY if seen_with_labels else predictor.note,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
