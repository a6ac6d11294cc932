"""Data at the edge: right, or refused with the reason; never NaN, never a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfkt_cli import losses
from sfkt_cli.data.images import choose_encoding, encode
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.methods.objective import cluster_labels
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import transfer
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.runtime import Runtime

TINY: dict[str, Any] = {
    "image_size": 16,
    "synthetic": {"pairs": 60},
    "prepare": {"workers": 1},
    "training": {"min_steps": 2},
    "source": {"epochs": 1, "width": 4, "bottleneck": 8},
    "bridge": {"epochs": 1, "width": 4},
    "transfer": {"epochs": 2},
    "runtime": {"gpus": 0, "batch_size": 8, "threads": 1},
}


def tiny(**sections: dict[str, Any]) -> Config:
    return build(TINY, sections)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("numbers") / "run")
    prepare(tiny(), run)
    return run


def copy_of(prepared: Run, folder: Path) -> Run:
    run = Run(folder / "run")
    run.folder.mkdir()
    run.path("prepare").symlink_to(prepared.path("prepare").resolve())
    return run


def train_all(config: Config, run: Run) -> list[dict[str, Any]]:
    for stage in (source, bridge, transfer):
        stage(config, run)
    rows = []
    for path in sorted(run.folder.rglob("metrics.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


@pytest.mark.parametrize("batch_size", [2, 7, 4096])
def test_batches_that_do_not_fit_the_data(prepared: Run, tmp_path: Path, batch_size: int) -> None:
    """A rest of one, or fewer samples than a batch: batches are always full."""
    run = copy_of(prepared, tmp_path)
    config = tiny(runtime={**TINY["runtime"], "batch_size": batch_size})
    for row in train_all(config, run):
        assert all(math.isfinite(value) for value in row.values()), row


def test_deterministic_algorithms_train_every_stage_alike(prepared: Run, tmp_path: Path) -> None:
    config = tiny(runtime={**TINY["runtime"], "deterministic": True})
    weights = []
    try:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            run = copy_of(prepared, tmp_path / name)
            train_all(config, run)
            assert torch.are_deterministic_algorithms_enabled()
            files = sorted(run.folder.rglob("model.safetensors"))
            weights.append([path.read_bytes() for path in files])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(weights[0]) == 3
    assert weights[0] == weights[1]


def test_every_sample_comes_once_a_pass_whatever_the_batch() -> None:
    images = {"rgb": np.zeros((7, 8, 8, 3), np.uint8)}
    cpu = Runtime(torch.device("cpu"), torch.float32)
    stream = Stream(images, name="s", seed=0, batch_size=3, shift=0.0, flip=False, runtime=cpu)
    rows = np.concatenate([stream.draw(0, step)[0] for step in range(7)])
    assert len(rows) == 21
    assert np.bincount(rows).tolist() == [3] * 7


def constant(prepared: Run, value: int) -> tuple[Store, torch.Tensor]:
    store = open_store(prepared.transfer_store)
    stored = store["target/target"]
    return store, torch.from_numpy(np.full((4, *stored.shape[1:]), value, stored.dtype))


@pytest.mark.parametrize("kind", ["window", "relative", "colormap", "normals", "hha"])
@pytest.mark.parametrize("value", [0, 1500, 65_535])
def test_missing_and_constant_depth_stay_finite(prepared: Run, kind: str, value: int) -> None:
    store, images = constant(prepared, value)
    for measured_on in (np.asarray(store["target/target"]), images.numpy()):
        encoding = choose_encoding(kind, store.modality, measured_on)
        encoded = encode(images, encoding)
        assert torch.isfinite(encoded).all()
        assert encoded.min() >= 0
        assert encoded.max() <= 1


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_one_class_and_many(classes: int) -> None:
    torch.manual_seed(0)
    model = Classifier(
        backbone="small", classes=classes, width=4, bottleneck=8,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    features, logits = model(torch.rand(4, 3, 16, 16))
    labels, similarity = cluster_labels(features.detach(), logits.detach(), rounds=2)
    assert int(labels.max()) < classes
    assert torch.isfinite(similarity).all()
    total = losses.information_maximisation(logits) + losses.pseudo_label_cross_entropy(
        logits, labels
    )
    total = total + losses.distillation(logits, logits.detach().softmax(dim=1))
    total.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(total)
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_a_class_that_is_never_predicted_attracts_nothing() -> None:
    features = torch.eye(4)
    logits = torch.full((4, 5), -50.0)
    logits[:, 0] = 50.0
    labels, similarity = cluster_labels(features, logits, rounds=2)
    assert labels.tolist() == [0, 0, 0, 0]
    assert torch.isfinite(similarity).all()


def test_constant_images_train_without_nan(tmp_path: Path) -> None:
    model = Classifier(
        backbone="small", classes=3, width=4, bottleneck=8,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    _, logits = model(torch.zeros(4, 3, 16, 16))
    losses.information_maximisation(logits).backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)
