"""What is compared: every model of a run, how it sees a target image, and what it cost."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.console import warn
from sfkt_cli.data.images import Encoding, choose_encoding, sample_rows
from sfkt_cli.data.sensor import Sensor, prepared_sensor
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import DataError
from sfkt_cli.methods import ENCODED
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import CARD, Card, check_classes, load_model, read_card
from sfkt_cli.scores import geometric_mean, softmax
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run, main_student
from sfkt_cli.training.predicting import View, adapt_batch_norms, pictures_of, predict_rows
from sfkt_cli.training.runtime import Runtime

Numbers = NDArray[Any]
KEPT = "the source model's weights: the student was judged worse"
"""The note on a student whose own weights were not kept."""
UNTRANSLATED = "without the translator, which did not help the source model enough"
"""The note on a bridge whose translator was not kept."""


@dataclass(frozen=True)
class Predictor:
    """A model, from stored images to logits."""

    method: str  # its name in the report
    view: View
    train_seconds: float | None  # all that it cost beyond the source model; None: unknown
    peak_memory_mb: float | None  # largest of the stages that made it; None: nothing was trained
    note: str | None = None  # what a reader must know of it
    temperature: float = 1.0  # by which its logits are divided, as `sfkt predict` does
    beside: View | None = None  # a second view, whose probabilities are averaged with its own

    @property
    def parameters(self) -> int:
        """Number of parameters of all networks that a prediction runs through."""
        return self.view.parameters + (self.beside.parameters if self.beside else 0)

    def ask(self, images: Numbers) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, K) of stored images, of its own view."""
        return predict_rows(images, self.view)

    def probabilities(self, images: Numbers) -> Numbers:
        """Probabilities (N, K) of stored images."""
        own = softmax(self.ask(images)[1].numpy() / self.temperature)
        if self.beside is None:
            return own
        return geometric_mean([own, softmax(predict_rows(images, self.beside)[1].numpy())])


@dataclass(frozen=True)
class Models:
    """The models of a run, read back, frozen."""

    runtime: Runtime  # device and precision
    source: Classifier  # the frozen source model
    card: Card  # its card
    bridge: View | None  # the source model behind the translator; None where there is no bridge
    students: dict[str, View]  # by method

    def encoding(self, config: Config, store: Store) -> Encoding:
        """The encoding of the main student, else of the bridge, else that of the settings."""
        main = main_student([*self.students], config.transfer.method)
        view = self.bridge if main is None else self.students[main]
        if view is not None and view.encoding is not None:
            return view.encoding
        return choose_encoding(config.encoding, store.modality, sample_rows(store))


def finished_methods(run: Run) -> list[str]:
    """Names of the finished transfer methods, ``tgkt`` last."""
    names = [name for name in run.methods() if run.has(f"transfer/{name}")]
    return sorted(names, key=lambda name: (name == "tgkt", name))


def model_digests(run: Run) -> dict[str, str]:
    """SHA-256 of the weights of every finished model, by stage."""
    stages = ["source", *(["bridge"] if run.has("bridge") else [])]
    stages += [f"transfer/{name}" for name in finished_methods(run)]
    return {stage: model_digest(run, stage) for stage in stages}


def model_digest(run: Run, stage: str) -> str:
    """SHA-256 of the weights of a stage's model, as its card says."""
    return read_card(run.path(stage, CARD)).sha256


def load_models(run: Run, store: Store, runtime: Runtime) -> Models:
    """Read the finished models of a run; students that do not fit the others are left out.

    Raises DataError if a model is damaged, or the source model has other classes than the data.
    """
    first, bridge, students = load_model(run.path("source"), runtime.device), None, {}
    check_classes(first.card.classes, store)
    source, sensor = freeze(first.classifier), prepared_sensor(run)
    if run.has("bridge"):
        saved = load_model(run.path("bridge"), runtime.device)
        bridge = View(runtime, source, saved.encoding_of("bridge"), freeze(saved.module))
    for name in finished_methods(run):
        saved = load_model(run.path(stage := f"transfer/{name}"), runtime.device)
        if why := misfit(saved.card, first.card, sensor):
            again = f"`sfkt transfer --method {name} --force` trains it anew"
            warn(f"{name} is left out: it {why}: {again}")
            continue
        students[name] = View(runtime, freeze(saved.classifier), saved.encoding_of(stage))
    return Models(runtime, source, first.card, bridge, students)


def misfit(student: Card, source: Card, prepared: Sensor) -> str:
    """Why a student cannot be measured beside the source model on prepared images; "" if it can."""
    if student.classes != source.classes:
        return (
            f"names the {len(student.classes)} classes {', '.join(student.classes)}, the source "
            f"model the {len(source.classes)} classes {', '.join(source.classes)}"
        )
    changed = student.sensor.changes(prepared) if student.sensor else ""  # old cards have none
    return changed and f"was trained on other images than are prepared now: {changed}"


def raw_encoding(store: Store) -> Encoding:
    """Target images as they are, in one fixed window: what ``source-only`` sees."""
    kind = "window" if store.modality == "depth" else "linear"
    return choose_encoding(kind, store.modality, sample_rows(store))


def predictors_of(
    run: Run, store: Store, models: Models, inputs: Mapping[str, str], encoding: Encoding
) -> list[Predictor]:
    """Everything that predicts from a target image, except for the oracle.

    ``inputs`` are digests of the stores and of every model as they are now; students see
    ``encoding``.
    """
    runtime, source = models.runtime, models.source
    adapted = View(runtime, copy.deepcopy(source), encoding)
    adapt_batch_norms(store["target/target"], adapted)
    untrained = {
        "source-only": View(runtime, source, raw_encoding(store)),
        "source-encoded": View(runtime, source, encoding),
        "source-adapted": adapted,
    }
    predictors = [Predictor(name, view, 0.0, None) for name, view in untrained.items()]

    def note_on(command: str, record: Mapping[str, Any], unkept: str, view: View) -> str | None:
        if note := outdated(command, record, inputs):
            return note
        if not weights_kept(record):
            return unkept
        if view.encoding is None or view.encoding.kind == encoding.kind:
            return None
        return (
            f"sees images encoded as {view.encoding.kind}; source-encoded and source-adapted see "
            f"{encoding.kind}"
        )

    bridge = run.record("bridge") if models.bridge else {}
    if models.bridge:
        note = note_on("bridge", bridge, UNTRANSLATED, models.bridge)
        predictors.append(Predictor("bridge-only", models.bridge, *costs(bridge), note))
    for name, view in models.students.items():
        record = run.record(f"transfer/{name}")
        records = [record, bridge] if "bridge" in record.get("inputs", {}) else [record]
        note = note_on(f"transfer --method {name}", record, KEPT, view)
        temperature = read_card(run.path("transfer", name, CARD)).temperature
        predictors.append(Predictor(name, view, *costs(*records), note, temperature))
    return predictors


def source_on_rgb(models: Models) -> Predictor:
    """The source model on RGB images: the bound of all that imitates it."""
    return Predictor("source-rgb", View(models.runtime, models.source), 0.0, None)


def translate(models: Models, images: Numbers) -> Numbers:
    """Translated pictures (N, H, W, 3) in [0, 1] of stored target images; there is a bridge."""
    assert models.bridge is not None
    return np.concatenate([batch.numpy() for batch in pictures_of(images, models.bridge)])


def outdated(command: str, record: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """A note if a stage was made from something that has changed since.

    ``command`` is the command that makes it, such as ``bridge``, ``record`` its done.json, and
    ``inputs`` are the present digests.
    """
    used = record.get("inputs", {})
    changed = [name for name in used if name in inputs and used[name] != inputs[name]]
    if not changed:
        return None
    return f"made from an earlier {' and '.join(changed)}: run `sfkt {command} --force` to renew it"


def outdated_student(run: Run, method: str) -> str | None:
    """A note if a run's student was made from data or models that have changed since.

    The student works without them, so there is no note if they are gone or damaged.
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


def evaluated(run: Run, method: str, encoding: Encoding | None = None) -> dict[str, Any]:
    """The done.json of `evaluate` if it measured a method's models as they are now; else empty.

    ``encoding`` is that of ``source-encoded``, which is measured with the main student's. Raises
    RunError if an output of a finished stage is missing, and DataError if one is damaged.
    """
    record, now = run.record("evaluate") if run.has("evaluate") else {}, model_digests(run)
    used = record.get("inputs", {})
    names = ["source", "bridge", f"transfer/{method}"]
    if method == ENCODED:
        names, card = [*now], run.path("transfer", record.get("main", ""), CARD)
        if not card.is_file() or read_card(card).encoding != encoding:
            return {}
    return record if all(used.get(name) == now.get(name) for name in names) else {}


def weights_kept(record: Mapping[str, Any]) -> bool:
    """Whether a bridge or a student, by its done.json, has its trained weights."""
    return record.get("trained", True) and not record.get("untouched_kept")


def costs(*records: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Total seconds of some stages, if all are known, and their largest memory in MB."""
    complete = all("seconds" in record for record in records)  # a bridge may be gone
    memory = filter(None, (record.get("peak_memory_mb") for record in records))
    return sum(r["seconds"] for r in records) if complete else None, max(memory, default=None)
