"""Prepared runs of random pictures, with untrained models: for timing, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfkt_cli.data.images import choose_encoding
from sfkt_cli.data.store import open_store
from sfkt_cli.data.store_writer import text_column, writing
from sfkt_cli.files import write_record, write_settings
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import save_model
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config, build, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage

CLASSES = [f"class {number}" for number in range(10)]
BLOCK = 1000


def settings(size: int, **more: Any) -> Config:
    """Settings of a run on the CPU that writes no state in between."""
    usual = {"image_size": size, "runtime": {"gpus": 0, "checkpoint_seconds": 1e9}}
    return build(usual, more)


def make_store(path: Path, size: int, pairs: int, targets: int) -> None:
    """A transfer.h5 of noise.

    Args:
        path: The file to be.
        size: Side of the images in pixels.
        pairs: TI pairs.
        targets: TR target images.
    """
    columns: dict[str, NDArray[Any]] = {
        "ti/rgb": _noise((pairs, size, size, 3), np.uint8, 256),
        "ti/target": _noise((pairs, size, size), np.uint16, 4000),
        "target/target": _noise((targets, size, size), np.uint16, 4000),
    }
    for group, count in (("ti", pairs), ("target", targets)):
        for name in ("id", "group"):
            columns[f"{group}/{name}"] = text_column([f"{name}{row:06}" for row in range(count)])
    attrs = {"dataset": "synthetic", "modality": "depth", "unit": "mm", "classes": CLASSES}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, attrs, columns):
        pass


def _noise(shape: tuple[int, ...], kind: Any, most: int) -> NDArray[Any]:
    """Noise, the same block over and over: what the numbers are does not matter for time."""
    block = np.random.default_rng(0).integers(1, most, (min(BLOCK, shape[0]), *shape[1:]), kind)
    return np.resize(block, shape)


def make_run(folder: Path, config: Config, *, pairs: int, targets: int) -> Run:
    """A run as ``prepare``, ``source`` and ``bridge`` leave it, but that nothing was learned."""
    run = Run(folder)
    make_store(run.transfer_store, config.image_size, pairs, targets)
    write_record(run.path("prepare", "done.json"), {"stage": "prepare"})
    store = open_store(run.transfer_store)
    encoding = choose_encoding(config.encoding, store.modality, store["target/target"][:256])
    torch.manual_seed(0)
    architecture: dict[str, Any] = {
        "backbone": config.source.backbone, "classes": len(CLASSES), "width": config.source.width,
        "bottleneck": config.source.bottleneck, "mean": (0.5,) * 3, "std": (0.2,) * 3,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "name": config.bridge.translator, "channels": encoding.encoded_channels,
        "width": config.bridge.channels(pretrained=False),
    }  # fmt: skip
    save_model(
        Stage("source", run.path("source"), config, {}), Classifier(**architecture),
        kind="classifier", architecture=architecture, classes=CLASSES, encoding=None,
    )  # fmt: skip
    save_model(
        Stage("bridge", run.path("bridge"), config, {}), make_translator(**sizes),
        kind="translator", architecture=sizes, classes=[], encoding=encoding,
    )  # fmt: skip
    for stage in ("source", "bridge"):
        write_settings(run.path(stage, "config.yaml"), to_yaml(config))
        write_record(run.path(stage, "done.json"), {"stage": stage, "settings": {}, "inputs": {}})
    return run
