"""What is compared: every model of a run, how it sees a target image, and what it cost."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.data.images import Encoding, choose_encoding, sample_rows
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import DataError
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import (
    CARD,
    Card,
    Saved,
    check_classes,
    classifier_of,
    load_model,
    read_card,
)
from sfkt_cli.scores import softmax
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.predicting import (
    View,
    adapt_batch_norms,
    predict_rows,
    translated,
)
from sfkt_cli.training.runtime import Runtime

Numbers = NDArray[Any]


KEPT = "the source model's weights: the student was judged worse"
"""The note on a student whose own weights were not kept."""


@dataclass(frozen=True)
class Predictor:
    """A model, from stored images to logits."""

    method: str  # its name in the report
    view: View
    parameters: int  # number of parameters of all networks that a prediction passes
    train_seconds: float | None  # all that it cost beyond the source model; None: unknown
    peak_memory_mb: float | None  # largest of the stages that made it; None: nothing was trained
    note: str | None = None  # what a reader must know of it
    temperature: float = 1.0  # by which its logits are divided, as `sfkt predict` does

    def ask(self, images: Numbers) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, K) of stored images."""
        return predict_rows(images, self.view)

    def probabilities(self, images: Numbers) -> Numbers:
        """Probabilities (N, K) of stored images."""
        return softmax(self.ask(images)[1].numpy() / self.temperature)


@dataclass(frozen=True)
class Models:
    """The models of a run, read back; each that sees target images with its encoding."""

    runtime: Runtime  # device and precision
    source: Classifier  # the frozen source model
    card: Card  # its card
    translator: tuple[nn.Module, Encoding] | None  # None where there is no bridge
    students: dict[str, tuple[Classifier, Encoding]]  # by method

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the first student, or of the bridge."""
        of_models = [*self.students.values(), *([self.translator] if self.translator else [])]
        return of_models[0][1] if of_models else None


def finished_methods(run: Run) -> list[str]:
    """Names of the finished transfer methods, ``tgkt`` last."""
    names = [name for name in run.methods() if run.has(f"transfer/{name}")]
    return sorted(names, key=lambda name: (name == "tgkt", name))


def main_student(config: Config, methods: Sequence[str]) -> str | None:
    """The student that counts: tgkt, else that of the settings, else the first."""
    wanted = ("tgkt", config.transfer.method, *methods)
    return next((name for name in wanted if name in methods), None)


def model_digests(run: Run) -> dict[str, str]:
    """SHA-256 of the weights of every finished model, by stage."""
    stages = ["source", *(["bridge"] if run.has("bridge") else [])]
    stages += [f"transfer/{name}" for name in finished_methods(run)]
    return {stage: model_digest(run, stage) for stage in stages}


def model_digest(run: Run, stage: str) -> str:
    """SHA-256 of the weights of a stage's model, as its card says."""
    return read_card(run.path(stage, CARD)).sha256


def load_models(run: Run, store: Store, runtime: Runtime) -> Models:
    """Read every finished model of a run; raises DataError if one has other classes."""

    def read(folder: Path) -> Saved:
        saved = load_model(folder, runtime.device)
        if saved.card.classes:
            check_classes(saved.card.classes, store)
        return saved

    source, translator = read(run.path("source")), None
    if run.has("bridge"):
        saved = read(run.path("bridge"))
        translator = freeze(saved.module), saved.encoding_of("bridge")
    students = {}
    for name in finished_methods(run):
        saved = read(run.path("transfer", name))
        encoding = saved.encoding_of(f"transfer/{name}")
        students[name] = freeze(classifier_of(saved.module)), encoding
    return Models(runtime, freeze(classifier_of(source.module)), source.card, translator, students)


def raw_encoding(store: Store) -> Encoding:
    """Target images as they are, in one fixed window: what ``source-only`` sees."""
    kind = "window" if store.modality == "depth" else "linear"
    return choose_encoding(kind, store.modality, sample_rows(store))


def student_encoding(name: str, store: Store, models: Models) -> Encoding:
    """The encoding that students see: that of existing models, else the one of ``encoding``."""
    return models.encoding or choose_encoding(name, store.modality, sample_rows(store))


def predictors_of(
    run: Run,
    store: Store,
    models: Models,
    inputs: Mapping[str, str],
    encoding: Encoding,
) -> list[Predictor]:
    """Everything that predicts from a target image, the oracle apart.

    ``inputs`` are digests of the stores and of every model as they are now; students see
    ``encoding``.
    """
    runtime = models.runtime
    source, untrained = models.source, (parameters(models.source), 0.0, None)
    adapted = copy.deepcopy(source)
    view = View(runtime, adapted, encoding)
    adapt_batch_norms(store["target/target"], view)
    predictors = [
        Predictor("source-only", View(runtime, source, raw_encoding(store)), *untrained),
        Predictor("source-encoded", View(runtime, source, encoding), *untrained),
        Predictor("source-adapted", view, *untrained),
    ]
    bridge = run.record("bridge") if models.translator else {}
    if models.translator:
        translator, its_own = models.translator
        view = View(runtime, source, its_own, translator)
        size, note = parameters(translator, source), outdated("bridge", bridge, inputs)
        predictors.append(Predictor("bridge-only", view, size, *costs(bridge), note))
    for name, (student, its_own) in models.students.items():
        record = run.record(f"transfer/{name}")
        records = [record, bridge] if "bridge" in record.get("inputs", {}) else [record]
        note = outdated(f"transfer --method {name}", record, inputs)
        if record.get("untouched_kept"):
            note = note or KEPT
        temperature = read_card(run.path("transfer", name, CARD)).temperature
        view, size = View(runtime, student, its_own), parameters(student)
        predictors.append(Predictor(name, view, size, *costs(*records), note, temperature))
    return predictors


def source_on_rgb(models: Models) -> Predictor:
    """The source model on RGB images: the bound of all that imitates it."""
    view, size = View(models.runtime, models.source), parameters(models.source)
    return Predictor("source-rgb", view, size, 0.0, None)


def parameters(*modules: nn.Module) -> int:
    """Trainable and frozen parameters of some modules, buffers left out."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def translate(models: Models, images: Numbers) -> Numbers:
    """Translated pictures (N, H, W, 3) in [0, 1] of stored target images; there is a bridge."""
    assert models.translator is not None
    translator, encoding = models.translator
    bridged = translated(images, translator, encoding, models.runtime)
    return np.concatenate([pictures.numpy() for pictures in bridged])


def outdated(command: str, record: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """A note where a stage was made from something that has changed since.

    ``command`` is what makes it, such as ``bridge``, ``record`` its done.json, and ``inputs`` are
    digests as they are now.
    """
    used = record.get("inputs", {})
    changed = [name for name in used if name in inputs and used[name] != inputs[name]]
    if not changed:
        return None
    return f"made from an earlier {' and '.join(changed)}: run `sfkt {command} --force` to renew it"


def outdated_student(run: Run, method: str) -> str | None:
    """A note where a run's student was made from data or models that have changed since.

    The student works without them: where they are gone or damaged, nothing is said.
    """
    record = run.record(f"transfer/{method}")
    try:
        used = [name for name in ("source", "bridge") if name in record.get("inputs", {})]
        digests = {stage: model_digest(run, stage) for stage in used if run.has(stage)}
        if run.transfer_store.is_file():
            digests["transfer.h5"] = open_store(run.transfer_store).digest
    except DataError:
        return None
    return outdated(f"transfer --method {method}", record, digests)


def costs(*records: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Seconds of some stages together, where all of them tell, and their largest memory in MB."""
    complete = all("seconds" in record for record in records)
    memory = filter(None, (record.get("peak_memory_mb") for record in records))
    return sum(r["seconds"] for r in records) if complete else None, max(memory, default=None)
