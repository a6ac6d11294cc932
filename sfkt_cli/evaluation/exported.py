"""Exported files on real images: how often they give PyTorch's class, and how accurate they are."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.console import printable
from sfkt_cli.data.store import Store
from sfkt_cli.errors import RunError
from sfkt_cli.evaluation.report import amount, markdown_table, percent
from sfkt_cli.models.graph_files import Predict
from sfkt_cli.settings.runs import Run

LARGEST_DIFFERENCE = 1e-3
"""Between the probabilities of an fp32 file and of PyTorch; more is refused."""
SAMPLES = 64
"""Images that files are compared on where all of them are in fp32."""
COMPARED = 1000
"""The same where one is in fp16 or int8."""
CALIBRATION = 256
"""Images that ranges of activations are measured on; those that files are compared on are others,
where there are enough."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TargetImages:
    """Unlabelled images of the sensor, as exported files take them.

    Attributes:
        stored: (N, S, S) or (N, S, S, C) of transfer.h5.
        ids: Of the samples.
        size: Height and width that files take; stored pixels are repeated to fill it.
        dtype: That files take.
        batch: Images at a time.
    """

    stored: NDArray[Any]
    ids: Sequence[str]
    size: tuple[int, int]
    dtype: torch.dtype
    batch: int

    def read(self, rows: Rows) -> Tensor:
        """(B, H, W) or (B, H, W, C)."""
        images = np.array(self.stored[rows])
        if images.shape[1:3] != self.size:
            down, across = (np.arange(side) * images.shape[1] // side for side in self.size)
            images = np.ascontiguousarray(images[:, down][:, :, across])
        return torch.from_numpy(images).to(self.dtype)

    def batches(self, rows: Rows) -> Iterator[Tensor]:
        """All rows; the last batch begins again to fill up."""
        for start in range(0, len(rows), self.batch):
            yield self.read(np.resize(rows[start : start + self.batch], self.batch))

    def ask(self, predict: Predict, rows: Rows) -> Tensor:
        """Probabilities (N, K) that a model gives the rows."""
        with torch.inference_mode():
            return torch.cat([predict(batch) for batch in self.batches(rows)])[: len(rows)]

    def choose(self, *, lowered: bool) -> tuple[Rows, Rows]:
        """Rows that ranges are measured on, and rows that files are compared on."""
        count = len(self.stored)
        if not lowered:
            rows = spread(np.arange(count), SAMPLES)
            return rows, rows
        measured = spread(np.arange(count), min(CALIBRATION, (count + 1) // 2))
        return measured, spread(np.setdiff1d(np.arange(count), measured), COMPARED)


@dataclass(frozen=True)
class Comparison:
    """A file beside PyTorch in fp32, on the same images.

    Attributes:
        file: Its name.
        precision: Of its weights.
        megabytes: Its size.
        images: How many.
        agreement: Share of images that get the same class.
        largest_difference: Of probabilities.
        labelled: Images with a label that `sfkt evaluate` has told.
        accuracy: On those; None where there are none.
        pytorch_accuracy: Of PyTorch, on the same.
    """

    file: str
    precision: str
    megabytes: float
    images: int
    agreement: float
    largest_difference: float
    labelled: int
    accuracy: float | None
    pytorch_accuracy: float | None


def compare(
    file: str,
    precision: str,
    content: bytes,
    probabilities: Tensor,
    expected: Tensor,
    ids: Sequence[str],
    labels: Mapping[str, int],
) -> Comparison:
    """Compare the probabilities (N, K) of a file with PyTorch's.

    Raises:
        RunError: An fp32 file gives some images other probabilities; they are named.
    """
    gaps = (probabilities - expected).abs().amax(1)
    predicted, wanted = probabilities.argmax(1), expected.argmax(1)
    # Two classes that are equally probable but for rounding may change places.
    wrong = ~(gaps <= LARGEST_DIFFERENCE)
    if precision == "fp32" and wrong.any():
        named = ", ".join(each for each, bad in zip(ids, wrong.tolist(), strict=True) if bad)
        raise RunError(
            f"{file} was not written: {int(wrong.sum())} of {len(ids)} images get other "
            f"probabilities than in PyTorch, by {float(gaps.max()):.2g} (more than "
            f"{LARGEST_DIFFERENCE:g}), and {int((predicted != wanted).sum())} another class: "
            f"{named[:300]}"
        )
    labelled = [row for row, name in enumerate(ids) if name in labels]
    truth = torch.tensor([labels[ids[row]] for row in labelled])

    def accuracy(classes: Tensor) -> float | None:
        return float((classes[labelled] == truth).double().mean()) if labelled else None

    return Comparison(
        file=file,
        precision=precision,
        megabytes=len(content) / 1e6,
        images=len(ids),
        agreement=float((predicted == wanted).double().mean()),
        largest_difference=float(gaps.max()),
        labelled=len(labelled),
        accuracy=accuracy(predicted),
        pytorch_accuracy=accuracy(wanted),
    )


def labels_told(run: Run, store: Store) -> dict[str, int]:
    """Class of the target images that `sfkt evaluate` has told in predictions.csv, by sample id.

    They are for the figures of what is finished: nothing is chosen by them.
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


def table(comparisons: Iterable[Comparison]) -> str:
    """What was written, as Markdown."""
    header = (
        "file", "precision", "MB", "PyTorch's class %", "of images",
        "accuracy %", "PyTorch's %", "of labelled",
    )  # fmt: skip
    cells = [
        (
            each.file, each.precision, amount(each.megabytes), percent(each.agreement),
            str(each.images), percent(each.accuracy), percent(each.pytorch_accuracy),
            str(each.labelled or "-"),
        )
        for each in comparisons
    ]  # fmt: skip
    return markdown_table(header, cells, left=2)


def spread(rows: Rows, count: int) -> Rows:
    """At most ``count`` of the rows, evenly apart."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(int))] if len(rows) else rows
