"""Exported files on real images: how often they give PyTorch's class, how accurate, how fast.

The module also writes these figures into the model card, a README.md with Hugging Face front
matter.
"""

import csv
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.console import printable
from sfkt_cli.data.grid import Fit, place_targets
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import RunError, installed
from sfkt_cli.evaluation.models import evaluated
from sfkt_cli.evaluation.report import (
    TEMPLATES,
    Line,
    Row,
    Section,
    amount,
    interval,
    markdown_section,
    percent,
    plain,
    read_results,
    table_of,
)
from sfkt_cli.evaluation.verdict import counted
from sfkt_cli.machine import processor
from sfkt_cli.methods import ENCODED
from sfkt_cli.models.graph_files import Predict, open_graph, open_onnx
from sfkt_cli.models.saving import Saved
from sfkt_cli.settings.runs import Run

LARGEST_DIFFERENCE = 1e-3
"""Between the probabilities of an fp32 file and of PyTorch; more is refused."""
BATCH = 16  # images at a time, where a file takes any number
SAMPLES = 64  # images that files are compared on where all of them are in fp32
COMPARED = 1000  # the same where one is in fp16 or int8
CALIBRATION = 256  # images, others than those if possible, that ranges of activations come from
ROUNDS = 50
LEAST_ROUNDS = 10
LONGEST_S = 3.0  # no more rounds than LEAST_ROUNDS after that
FIRST_LINES = "---\nlibrary_name: sfkt\n"
"""Of each model card."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TargetImages:
    """Unlabelled images of the sensor, as exported files take them."""

    stored: NDArray[Any]  # (N, S, S) or (N, S, S, C) of transfer.h5
    ids: Sequence[str]  # of the samples
    size: tuple[int, int]  # height and width that files take
    fit: Fit  # how the stored images were made of such
    dtype: str  # that files take, such as ``uint16``
    batch: int | None  # images that files take at a time; None: any number

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (H, W, C) of one image."""
        return (*self.size, *self.stored.shape[3:])

    def read(self, rows: Rows) -> Tensor:
        """(B, H, W) or (B, H, W, C)."""
        images = np.array(self.stored[rows])
        if images.shape[1:3] != self.size:
            images = place_targets(images, *self.size, self.fit)
        return torch.from_numpy(images).to(getattr(torch, self.dtype))

    def batches(self, rows: Rows) -> Iterator[Tensor]:
        """All rows; the last batch begins again to fill up."""
        size = self.batch or BATCH
        for start in range(0, len(rows), size):
            yield self.read(np.resize(rows[start : start + size], size))

    def ask(self, predict: Predict, rows: Rows) -> Tensor:
        """Probabilities (N, K) of the rows from a model."""
        with torch.inference_mode():
            return torch.cat([predict(batch) for batch in self.batches(rows)])[: len(rows)]

    def choose(self, *, lowered: bool) -> tuple[Rows, Rows]:
        """Rows to calibrate files on, and rows to compare them on."""
        count = len(self.stored)
        if not lowered or count == 1:
            rows = spread(count, SAMPLES)
            return rows, rows
        measured = spread(count, min(CALIBRATION, (count + 1) // 2))
        others = np.setdiff1d(np.arange(count), measured)
        return measured, others[spread(len(others), COMPARED)]


@dataclass(frozen=True)
class Comparison:
    """A file beside PyTorch in fp32, on the same images."""

    file: str  # its name
    precision: str  # of its weights
    megabytes: float  # its size
    images: int  # how many
    agreement: float  # share of images that get the same class
    largest_difference: float  # of probabilities
    labelled: int  # images with a label that `sfkt evaluate` has told
    accuracy: float | None  # on those; None where there are none
    pytorch_accuracy: float | None  # of PyTorch, on the same


def compare(
    file: str,
    precision: str,
    content: bytes,
    probabilities: Tensor,
    expected: Tensor,
    ids: Sequence[str],
    labels: Mapping[str, int],
) -> Comparison:
    """Compare probabilities (N, K) with PyTorch's.

    Raises RunError if those of an fp32 file differ, or those of a lowered one are not finite.
    """
    broken = int((~probabilities.isfinite()).any(1).sum())
    if broken and precision != "fp32":
        raise RunError(
            f"{file} was not written: in {precision} the probabilities of {broken} of {len(ids)} "
            f"images are not finite numbers: export without --precision {precision}"
        )
    gaps = (probabilities - expected).abs().amax(1)
    predicted, of_pytorch = probabilities.argmax(1), expected.argmax(1)
    wrong = ~(gaps <= LARGEST_DIFFERENCE)  # classes equal but for rounding may change places
    if precision == "fp32" and wrong.any():
        named = ", ".join(name for name, bad in zip(ids, wrong.tolist(), strict=True) if bad)
        raise RunError(
            f"{file} was not written: {int(wrong.sum())} of {len(ids)} images get other "
            f"probabilities than in PyTorch, by {float(gaps.max()):.2g} (more than "
            f"{LARGEST_DIFFERENCE:g}), and {int((predicted != of_pytorch).sum())} another class: "
            f"{named[:300]}"
        )
    truth = torch.tensor([labels.get(name, -1) for name in ids])

    def share(right: Tensor) -> float | None:
        return float(right.double().mean()) if len(right) else None

    return Comparison(
        file=file,
        precision=precision,
        megabytes=len(content) / 1e6,
        images=len(ids),
        agreement=float((predicted == of_pytorch).double().mean()),
        largest_difference=float(gaps.max()),
        labelled=int((truth >= 0).sum()),
        accuracy=share((predicted == truth)[truth >= 0]),
        pytorch_accuracy=share((of_pytorch == truth)[truth >= 0]),
    )


def labels_told(run: Run, store: Store) -> dict[str, int]:
    """Class of the target images by sample id, from the predictions.csv of `sfkt evaluate`.

    It only describes finished files: nothing is chosen by it.
    """
    inputs = run.record("evaluate").get("inputs", {}) if run.has("evaluate") else {}
    if inputs.get("transfer.h5") != store.digest:
        return {}
    path = run.output("evaluate", "predictions.csv")
    names = [printable(name) for name in store.classes]
    numbers = {text: row for row, name in enumerate(names) for text in (name, f"'{name}")}
    with path.open(encoding="utf-8", newline="") as file:
        return {
            line["id"]: numbers[line["label"]]
            for line in csv.DictReader(file)
            if line["split"] == "target" and line["label"] in numbers
        }


@dataclass(frozen=True)
class Latency:
    """Time that one model takes in one runtime."""

    runtime: str  # PyTorch, onnxruntime or OpenVINO
    file: str  # what it runs
    batch: int  # images at a time
    median_ms: float  # half of the batches take longer
    p95_ms: float  # one batch of twenty takes longer


def time_all(
    name: str, graph: nn.Module, files: Mapping[str, bytes], batches: Sequence[Tensor]
) -> list[Latency]:
    """Time a graph in PyTorch and its ONNX files in every runtime that is installed.

    The graph is in inference mode, the batches are real images.
    """
    runners: dict[tuple[str, str], Predict] = {("PyTorch", name): open_graph(graph)}
    for file, content in files.items():
        runners["onnxruntime", file] = open_onnx(content)
        if installed("openvino"):
            runners["OpenVINO", file] = open_openvino(content)
    return [
        Latency(*runner, len(images), *_measure(predict, images))
        for runner, predict in runners.items()
        for images in batches
    ]


def open_openvino(content: bytes) -> Predict:
    """An ONNX file in OpenVINO, on the CPU, in the precision that the file has."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino.Core()
    compiled: Any = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())["probabilities"])


def tables(comparisons: Iterable[Comparison], latencies: Iterable[Latency]) -> list[Section]:
    """Tables of the measurements of the files; none without files."""
    written = [
        {
            "file": one.file,
            "precision": one.precision,
            "MB": amount(one.megabytes),
            "PyTorch's class %": percent(one.agreement),
            "of images": str(one.images),
            "accuracy %": percent(one.accuracy),
            "PyTorch's %": percent(one.pytorch_accuracy),
            "of labelled": str(one.labelled or "-"),
        }
        for one in comparisons
    ]
    timed = [
        {
            "runtime": one.runtime,
            "file": one.file,
            "batch": str(one.batch),
            "median ms": amount(one.median_ms),
            "p95 ms": amount(one.p95_ms),
            "images/s": amount(1000 * one.batch / one.median_ms),
        }
        for one in latencies
    ]
    threads = counted(torch.get_num_threads(), "thread")
    lines = {"Files": written, f"Speed on {processor()}, {threads}": timed}
    return [Section(title, lines=those, left=2) for title, those in lines.items() if those]


def _result(row: Row) -> Line:
    return {
        "method": row.method,
        "split": row.split,
        "n": str(row.n),
        "accuracy %": percent(row.accuracy),
        "95 % interval": interval(row.accuracy_ci95),
    }


def _measure(predict: Predict, images: Tensor) -> tuple[float, float]:
    """Median and 95th percentile in milliseconds, after three rounds that do not count."""
    times_ms: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            predict(images)
        began = time.perf_counter()
        for _ in range(ROUNDS):
            start = time.perf_counter()
            if len(times_ms) >= LEAST_ROUNDS and start - began >= LONGEST_S:
                break
            predict(images)
            times_ms.append(1000 * (time.perf_counter() - start))
    median, late = np.percentile(times_ms, (50, 95))
    return float(median), float(late)


def model_card(
    run: Run,
    method: str,
    student: Saved,
    sensor: Sensor,
    images: TargetImages,
    files: Sequence[str],
    measured: Sequence[Section],
) -> str:
    """The text of README.md, with the results of ``evaluate`` if there are any.

    ``images`` are those that the exported ``files`` take; the student's files come first.
    ``measured`` holds the measurements of the files.
    """
    told = evaluated(run, method, student.card.encoding)
    results = read_results(run) if told else None
    shown = (method, ENCODED, "bridge-only")
    rows = [row for row in results.rows if row.method in shown] if results else []
    dataset = results.dataset if results else run.record("prepare")["settings"].get("dataset", "")
    front = {
        "library_name": "sfkt",
        "pipeline_tag": "image-classification",
        "tags": ["source-free", "cross-modal", sensor.modality, method],
        **({"model-index": [_index(method, dataset, rows)]} if rows else {}),
    }
    sentence = "" if rows else "No accuracy is known: no target image has a label."
    if told.get("main") == method:
        sentence = told["headline"]
    elif not told:
        sentence = "Not evaluated: sfkt evaluate does this if some target images have labels."
    accuracies = table_of("Results", rows, _result, left=2)
    accuracies = replace(accuracies, text=tuple(filter(None, [sentence])))
    untouched = method == ENCODED or run.record(f"transfer/{method}").get("untouched_kept")
    sections = (accuracies, *measured)
    return TEMPLATES.get_template("model_card.md").render(
        front=yaml.safe_dump(front).rstrip(),
        sensor=sensor,
        method=method,
        names=", ".join(map(plain, student.card.classes)),
        classes=json.dumps(student.card.classes),
        untouched=untouched,
        file=next(iter(files), ""),
        fp16=next((name for name in files if name.endswith("-fp16.onnx")), ""),
        bridged=any(name.startswith("bridged-source") for name in files),
        dtype=images.dtype,
        batch=images.batch,
        shape=", ".join(map(str, images.shape)),
        data=f"{plain(dataset)}; {len(student.card.classes)} classes; seed {student.card.seed}",
        measured="\n\n".join(part for one in sections for part in markdown_section(one)),
        temperature=student.card.temperature,
    )


def _index(method: str, dataset: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Results in the form that Hugging Face shows beside the model."""
    measured = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": row.split},
            "metrics": [{"type": "accuracy", "value": row.accuracy}],
        }
        for row in rows
        if row.method == method
    ]
    return {"name": f"{dataset}-{method}", "results": measured}
