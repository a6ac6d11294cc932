"""A run folder with tiny stores and untrained models, as the stages before evaluate leave it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfkt_cli.data.images import Encoding
from sfkt_cli.data.sensor import prepared_sensor
from sfkt_cli.data.store_writer import text_column, writing
from sfkt_cli.files import write_record, write_settings, write_text
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import read_card, save_model
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config, build, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage

CLASSES = ["disc", "<b>bar</b>", "=cross"]
SIZE = 16
ENCODING = Encoding("window", 500.0, 3000.0, 1, True)
ARCHITECTURE: dict[str, Any] = {
    "backbone": "small", "classes": 3, "width": 4, "bottleneck": 8,
    "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
}  # fmt: skip
Numbers = NDArray[Any]


def settings(**evaluate: Any) -> Config:
    """Settings under which nothing takes long."""
    return build(
        {
            "image_size": SIZE,
            "evaluate": evaluate,
            "source": {"epochs": 1},
            "training": {"min_steps": 2},
            "runtime": {"gpus": 0, "batch_size": 16, "threads": 1},
        }
    )


def images(random: np.random.Generator, labels: Numbers) -> tuple[Numbers, Numbers]:
    """RGB (N, H, W, 3) and depth (N, H, W) in which the class is a bright band."""
    count = len(labels)
    rgb = random.integers(0, 120, (count, SIZE, SIZE, 3)).astype(np.uint8)
    depth = random.integers(600, 1500, (count, SIZE, SIZE)).astype(np.uint16)
    for row, label in enumerate(labels):
        rgb[row, 5 * label : 5 * label + 5] = 250
        depth[row, 5 * label : 5 * label + 5] = 2800
    return rgb, depth


def make_stores(
    folder: Path, *, labelled: bool = True, shuffle: bool = True, recordings: int = 1
) -> None:
    """transfer.h5 and test.h5; the labels of the target images lie in another order.

    The pairs are of so many ``recordings``.
    """
    random = np.random.default_rng(0)
    attrs = {
        "dataset": "made", "modality": "depth", "unit": "mm", "classes": CLASSES,
        "registered": True,
    }  # fmt: skip
    labels = {part: np.arange(n) % 3 for part, n in (("ti", 12), ("target", 30), ("test", 18))}
    seen = {part: images(random, of) for part, of in labels.items()}
    ids = {part: [f"{part}-{i}" for i in range(len(of))] for part, of in labels.items()}
    columns: dict[str, dict[str, Numbers]] = {"transfer.h5": {}, "test.h5": {}}
    for part, name in (("ti", "transfer.h5"), ("target", "transfer.h5"), ("test", "test.h5")):
        rgb, depth = seen[part]
        texts = {
            "id": ids[part],
            "group": [
                f"g{i % recordings if part == 'ti' else i // 2}" for i in range(len(ids[part]))
            ],
            "path_target": ids[part],
        }
        columns[name] |= {f"{part}/{key}": text_column(value) for key, value in texts.items()}
        columns[name][f"{part}/target"] = depth
        if part != "target":
            columns[name][f"{part}/rgb"] = rgb
    order = random.permutation(30) if shuffle else np.arange(30)
    if not labelled:  # then `prepare` holds out no images
        order = order[:0]
        columns["test.h5"] = {name: column[:0] for name, column in columns["test.h5"].items()}
        labels["test"] = labels["test"][:0]
    columns["test.h5"] |= {
        "test/label": labels["test"],
        "labels/id": text_column([ids["target"][i] for i in order]),
        "labels/label": labels["target"][order],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in columns.items():
        with writing(folder / name, attrs, content):
            pass


def finish(
    run: Run, stage: str, inputs: dict[str, str], epochs: list[dict[str, float]], **figures: Any
) -> None:
    """Mark a stage done, and its curves with it."""
    lines = "".join(json.dumps(row) + "\n" for row in epochs)
    run.path(stage).mkdir(parents=True, exist_ok=True)
    write_text(run.path(stage, "metrics.jsonl"), lines)
    write_record(
        run.path(stage, "done.json"),
        {"stage": stage, "inputs": inputs, "seconds": 10.0, "peak_memory_mb": 100.0,
         "best_epoch": 1, "ti_agreement": 0.5, **figures},
    )  # fmt: skip


def save_classifier(run: Run, stage: str, seed: int, encoding: Encoding | None) -> None:
    """An untrained classifier."""
    run.path(stage).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    of_student = {} if encoding is None else {"sensor": asdict(prepared_sensor(run))}
    save_model(
        Stage(stage, run.path(stage), Config(), {}), Classifier(**ARCHITECTURE), kind="classifier",
        architecture=ARCHITECTURE, classes=CLASSES, encoding=encoding, **of_student,
    )  # fmt: skip


def save_weights(path: Path, *, classes: int, seed: int = 0) -> None:
    """The state dict of an untrained classifier, as somebody who trained it elsewhere brings it."""
    torch.manual_seed(seed)
    model = Classifier(**ARCHITECTURE | {"classes": classes, "bottleneck": 0})
    weights = {
        name.removeprefix("backbone."): value
        for name, value in model.state_dict().items()
        if name not in ("mean", "std")
    }
    torch.save(weights, path)


def make_run(
    folder: Path, *methods: str, bridge: bool = True, labelled: bool = True, recordings: int = 1
) -> Run:
    """A run with stores, source model, bridge and some methods."""
    run = Run(folder)
    make_stores(run.path("prepare"), labelled=labelled, recordings=recordings)
    write_record(run.path("prepare", "done.json"), {"stage": "prepare", "settings": {}})
    write_settings(run.path("prepare", "config.yaml"), to_yaml(settings()))
    save_classifier(run, "source", 0, None)
    epochs = [{"epoch": e, "seconds": 1.0, "learning_rate": 0.1, "f": 1.0 / e} for e in (1, 2)]
    finish(run, "source", {}, epochs)
    if bridge:
        torch.manual_seed(1)
        architecture = {"name": "pointwise", "channels": 1, "width": 4}
        save_model(
            Stage("bridge", run.path("bridge"), Config(), {}),
            make_translator("pointwise", channels=1, width=4), kind="translator",
            architecture=architecture, classes=[], encoding=ENCODING,
        )  # fmt: skip
        finish(run, "bridge", {}, [{**row, "ti_agreement": 0.5} for row in epochs])
    for number, method in enumerate(methods):
        save_classifier(run, f"transfer/{method}", 2 + number, ENCODING)
        digest = read_card(run.path("bridge", "model.json")).sha256 if bridge else ""
        uses = {"bridge": digest} if method == "tgkt" else {}
        trust = {"bridge_trust": 0.5, "bridge_trust_left": 0.25, "strangers": 0.125}
        finish(run, f"transfer/{method}", uses, epochs, **trust)
    return run
