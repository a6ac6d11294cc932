"""The model card of an export: README.md with the front matter of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor

from sfkt_cli.data.sensor import Sensor
from sfkt_cli.evaluation.models import model_digests
from sfkt_cli.evaluation.report import (
    Results,
    Row,
    interval,
    markdown_table,
    percent,
    plain,
    read_results,
)
from sfkt_cli.models.saving import Saved
from sfkt_cli.settings.runs import Run

LIMITS = """\
- Trained without labels of this sensor. It knows what the RGB source model knew, errors included.
- Valid for this sensor at these settings: another depth range, resolution or mounting needs a new
  `sfkt transfer`.
- Probabilities are not calibrated on labelled data. `sfkt predict` divides the logits by the
  temperature in model.json, fitted without labels; the other files do not. Look at the report
  before you set thresholds.
- Every image is given one of the classes above, also when it shows none of them."""


def model_card(
    run: Run,
    method: str,
    student: Saved,
    sensor: Sensor,
    images: Tensor,
    file: str,
    batch: int | None,
    tables: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        run: Results are taken from its ``evaluate/results.json``, if it was evaluated.
        method: Method of the student.
        student: Its classes and card.
        sensor: Sensor of its images.
        images: Samples as the exported files take them, (B, H, W) or (B, H, W, C).
        file: An ONNX file of the student.
        batch: Number of images that files take; None: any.
        tables: What was measured on the files, by heading.
    """
    results = _results(run, method)
    rows = [row for row in results.rows if row.method in (method, "bridge-only")] if results else []
    dataset = results.dataset if results else run.record("prepare")["settings"].get("dataset", "")
    front = {
        "library_name": "sfkt",
        "pipeline_tag": "image-classification",
        "tags": ["source-free", "cross-modal", sensor.modality, method],
        "model-index": [_index(method, dataset, rows)] if rows else [],
    }
    accuracies = "Not evaluated: `sfkt evaluate` does it where some target images have labels."
    if rows:
        header = ("method", "split", "n", "accuracy %", "95 % interval")
        cells = [
            (row.method, row.split, str(row.n), percent(row.accuracy), interval(row.accuracy_ci95))
            for row in rows
        ]
        accuracies = markdown_table(header, cells, left=2)
    dtype = str(images.dtype).removeprefix("torch.")
    shape = ", ".join(str(side) for side in images.shape[1:])
    lines = [
        "---",
        yaml.safe_dump({key: value for key, value in front.items() if value}).rstrip(),
        "---",
        f"# {sensor.modality} classifier ({method})",
        "",
        f"Recognises {', '.join(map(plain, student.classes))}",
        f"in images of a {sensor.modality} sensor.",
        "Made by source-free cross-modal knowledge transfer (arXiv:2401.05014) from an RGB",
        "classifier, unlabelled images of the sensor, and unlabelled pairs of other things.",
        "",
        "## Use",
        "",
        f"Input `images`: {dtype}, ({batch or 'batch'}, {shape}), {sensor.meaning}.",
        "Outputs: `logits` and `probabilities`, (batch, classes). Encoding and normalisation are",
        "inside.",
        "`student.*` is the transferred classifier; `bridged-source.*` is the translator in front",
        "of the untouched RGB model, with the same interface.",
        "",
        "```python",
        "import json, numpy as np, onnxruntime",
        f'session = onnxruntime.InferenceSession("{file}")',
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])',
        f"images = np.zeros(({batch or 1}, {shape}), np.{dtype})  # from the sensor",
        '_, probabilities = session.run(None, {"images": images})',
        "print(classes[probabilities[0].argmax()])",
        "```",
        "",
        "## Data",
        "",
        f"Data set {plain(dataset)}; {len(student.classes)} classes; seed {student.card['seed']}.",
        "",
        "## Results",
        "",
        accuracies,
        "",
        *(line for title, text in tables.items() for line in (f"## {title}", "", text, "")),
        "## Limits",
        "",
        LIMITS,
    ]
    return "\n".join(lines) + "\n"


def _results(run: Run, method: str) -> Results | None:
    """What evaluate said of these very models; nothing where they are newer."""
    if not run.has("evaluate"):
        return None
    seen, now = run.record("evaluate").get("inputs", {}), model_digests(run)
    if any(seen.get(name) != now.get(name) for name in ("source", "bridge", f"transfer/{method}")):
        return None
    return read_results(run)


def _index(method: str, dataset: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Results in the form that Hugging Face shows beside the model."""
    return {
        "name": f"{dataset}-{method}",
        "results": [
            {
                "task": {"type": "image-classification"},
                "dataset": {"name": dataset, "type": dataset, "split": row.split},
                "metrics": [{"type": "accuracy", "value": row.accuracy}],
            }
            for row in rows
            if row.method == method
        ],
    }
