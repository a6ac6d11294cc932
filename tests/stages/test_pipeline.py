"""From an archive to a classifier for the new sensor, on small made pictures, on the CPU.

RGB: a bright shape on a dark, textured ground. Depth: the shape is nearer, with noise and holes. So
a model that has learnt bright shapes fails on depth, where near is dark.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.images import Encoding
from sfkt_cli.data.sensor import prepared_sensor
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import ConfigError, DataError, Interrupted, RunError
from sfkt_cli.files import write_record
from sfkt_cli.models.saving import Saved, load_model, save_model
from sfkt_cli.settings.config import Config, build, parse_assignments
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import resolve
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import transfer
from sfkt_cli.training.predicting import View, predict_rows
from sfkt_cli.training.runtime import Runtime
from tests.data.make_archives import save
from tests.stages.evaluation_runs import make_run, save_classifier

SIDE = 32
TR, TI = ("bars", "cross", "disc"), ("frame", "pair", "wedge")
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def shape_of(name: str, random: np.random.Generator) -> NDArray[np.bool_]:
    """A mask (SIDE, SIDE) of a shape of random place and size."""
    down, right = random.uniform(-3, 3, 2) + SIDE / 2
    size = random.uniform(8, 11)
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    y, x = (y - down) / size, (x - right) / size
    box = np.maximum(abs(x), abs(y))
    masks = {
        "bars": (box < 1) & (abs(abs(y) - 0.7) < 0.3),
        "cross": (box < 1) & (np.minimum(abs(x), abs(y)) < 0.3),
        "disc": np.hypot(x, y) < 0.9,
        "frame": (box < 1) & (box > 0.6),
        "pair": (np.hypot(abs(x) - 0.6, y) < 0.4) | (np.hypot(x, y - 0.6) < 0.3),
        "wedge": (box < 1) & (x + y > 0),
    }
    return np.asarray(masks[name], np.bool_)


def picture(name: str, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """RGB and millimetres of one scene."""
    random = np.random.default_rng([number, (*TR, *TI).index(name)])
    shape = shape_of(name, random)
    ground = random.uniform(0.05, 0.35, 3) + 0.1 * random.normal(size=(SIDE, SIDE, 1))
    rgb = np.where(shape[..., None], random.uniform(0.6, 1.0, 3), ground)
    rgb = 255 * (rgb + 0.03 * random.normal(size=rgb.shape)).clip(0, 1)
    away = random.uniform(1800, 2600) + np.linspace(0, random.uniform(-300, 300), SIDE)[:, None]
    depth = np.where(shape, random.uniform(900, 1300), away) + 25 * random.normal(size=shape.shape)
    depth[random.random(depth.shape) < 0.02] = 0
    return rgb.astype(np.uint8), depth.astype(np.uint16)


def write_archive(root: Path, tr_each: int, ti_each: int) -> None:
    for name in (*TR, *TI):
        below = root / "tr" / name if name in TR else root / "ti"
        for view in ("rgb", "target"):
            (below / view).mkdir(parents=True, exist_ok=True)
        for number in range(tr_each if name in TR else ti_each):
            rgb, depth_mm = picture(name, number)
            Image.fromarray(rgb).save(below / "rgb" / f"{name}{number}.png")
            Image.fromarray(depth_mm).save(below / "target" / f"{name}{number}.png")


def settings(root: Path, *assignments: str) -> Config:
    return build(
        {
            "dataset": "folders",
            "image_size": SIDE,
            "encoding": "window",
            "prepare": {"root": str(root), "workers": 1},
            "runtime": {"gpus": 0, "batch_size": 32},
            "training": {"min_steps": 20},
            "source": {"epochs": 6, "width": 8, "bottleneck": 32},
            "bridge": {"epochs": 3, "width": 8},
            "transfer": {"epochs": 4},
        },
        parse_assignments(assignments),
    )


FILES = (
    "config.yaml", "done.json", "log.txt", "metrics.jsonl", "model.json", "model.safetensors",
)  # fmt: skip
QUICK = (
    "training.min_steps=2",
    "bridge.epochs=2",
    "transfer.epochs=2",
    "tgkt.self_from=0",
    "bridge.keep_untouched=false",
)
"""Settings under which the stages do all they do, but learn nothing."""


class Prepared:
    """A run with a source model, its archive, and the labels, which no stage gets to see."""

    def __init__(self, folder: Path) -> None:
        self.archive = folder / "archive"
        write_archive(self.archive, tr_each=100, ti_each=50)
        self.run = Run(folder / "run")
        config = settings(self.archive)
        prepare(config, self.run)
        source(config, self.run)
        shutil.copytree(self.run.path("prepare"), folder / "kept")
        self.stores = folder / "kept"

    def copy(self, folder: Path) -> Run:
        shutil.copytree(self.run.folder, folder)
        return Run(folder)

    def accuracy(self, model: Saved, encoding: Encoding | None = None) -> float:
        """Share that a model gets right of the target images; without encoding, of the test RGB."""
        known = open_store(self.stores / "test.h5")
        if encoding is None:
            rows, labels = known["test/rgb"], known.labels("test")
        else:
            label_of = dict(zip(known.strings("labels/id"), known.labels("labels"), strict=True))
            seen = open_store(self.stores / "transfer.h5")
            rows = seen["target/target"]
            labels = np.array([label_of[name] for name in seen.strings("target/id")])
        view = View(RUNTIME, model.classifier, encoding)
        _, logits = predict_rows(rows, view)
        return float((logits.argmax(dim=1).numpy() == labels).mean())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("pipeline"))


def digests(folder: Path, *, times: bool = False) -> dict[str, Any]:
    """SHA-256 of every file below, locks left out; with ``times`` when it was written, too."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns if times else 0,
        )
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_without_source_images_and_labels_the_student_learns_to_see_depth(
    prepared: Prepared, tmp_path: Path
) -> None:
    run, config = prepared.copy(tmp_path / "run"), settings(prepared.archive)
    run.source_store.unlink()
    run.test_store.unlink()
    shutil.move(prepared.archive, tmp_path / "gone")
    try:
        before = digests(run.path("source"), times=True)
        bridge(config, run)
        transfer(config, run)
    finally:
        shutil.move(tmp_path / "gone", prepared.archive)
    assert digests(run.path("source"), times=True) == before

    ids = open_store(run.transfer_store).strings("target/id")
    assert len(ids) == 120
    model = set(FILES)
    student_files = model | {"epochs.npy"}
    pictures = {f"images/{name}.png" for name in ids}
    assert set(digests(run.path("bridge"))) == student_files | pictures
    assert set(digests(run.path("transfer"))) == {f"tgkt/{name}" for name in student_files}
    assert set(digests(run.path("source"))) == model
    for stage in ("prepare", "source", "bridge", "transfer/tgkt"):
        unlisted = {path.name for path in run.path(stage).iterdir()} - set(
            run.record(stage)["outputs"]
        )
        assert unlisted <= {"done.json", "log.txt", "images"}, "settings.stage.WRITES lacks a name"
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {
        "prepare",
        "source",
        "bridge",
        "transfer",
    }
    with Image.open(run.path("bridge", "images", f"{ids[0]}.png")) as shown:
        assert (shown.mode, shown.size) == ("RGB", (SIDE, SIDE))

    teacher, student = load_model(run.path("source")), load_model(run.path("transfer", "tgkt"))
    assert prepared.accuracy(teacher) >= 0.9
    source_only = prepared.accuracy(teacher, student.card.encoding)
    assert prepared.accuracy(student, student.card.encoding) >= source_only + 0.2


def test_neither_names_nor_rows_tell_the_class_of_a_target_image(tmp_path: Path) -> None:
    """Every byte that bridge and transfer read and write, of a set whose classes are odd words."""
    classes, others = ["quorvex", "blimfatch", "zunderpole"], "snarkwidget"
    for place, name in enumerate([*classes, others]):
        below = tmp_path / "archive" / ("ti" if name == others else f"tr/{name}")
        for number in range(60):
            rgb, depth_mm = picture((*TR, *TI)[place], number)
            for view, pixels in (("rgb", rgb), ("target", depth_mm)):
                save(below / view / f"{name}{number}.png", pixels)
    config = settings(
        tmp_path / "archive", *QUICK, "source.epochs=1", "training.min_steps=1", "split.source=0.1"
    )
    run = Run(tmp_path / "run")
    for stage in (prepare, source, bridge, transfer):
        stage(config, run)

    files = [run.transfer_store]
    files += [path for name in ("bridge", "transfer") for path in run.path(name).rglob("*")]
    listing = rb'\[\s*"blimfatch",\s*"quorvex",\s*"zunderpole"\s*\]'
    for path in filter(Path.is_file, files):
        told = path.read_bytes()
        if path == run.transfer_store or path.name == "model.json":  # one list of all classes
            told = re.sub(listing, b"", told, count=1)
        for name in (*classes, others):
            assert name.encode() not in told + str(path).encode(), f"{name} is in {path}"

    transfer_store, test = open_store(run.transfer_store), open_store(run.test_store)
    label_of = dict(zip(test.strings("labels/id"), test.labels("labels").tolist(), strict=True))
    labels = np.array([label_of[sample] for sample in transfer_store.strings("target/id")])
    assert len(labels) > 100
    for label in range(3):  # rows of a class against rows of the others, by rank
        ranks = np.flatnonzero(labels == label) + 1
        error = np.sqrt((len(labels) - len(ranks)) * (len(labels) + 1) / 12 / len(ranks))
        assert abs(ranks.mean() - (len(labels) + 1) / 2) < 4 * error
    assert (labels[1:] == labels[:-1]).mean() < 0.5  # neighbours are no likelier of one class
    assert all(test.classes[label] in test.names()[id_][0] for id_, label in label_of.items())


def made(run: Run, config: Config) -> dict[str, Any]:
    """Digests of the weights that bridge and transfer make."""
    bridge(config, run)
    transfer(config, run)
    found = digests(run.folder)
    return {name: found[name] for name in found if name.endswith("model.safetensors")}


def test_labels_never_reach_training(prepared: Prepared, tmp_path: Path) -> None:
    blind, told = (prepared.copy(tmp_path / name) for name in ("blind", "told"))
    config = settings(prepared.archive, *QUICK)
    blind.test_store.unlink()
    blind.source_store.unlink()
    with h5py.File(told.test_store, "r+") as file:
        for name in ("labels/label", "test/label"):
            file[name][...] = np.roll(file[name][...], 7)[::-1] % 2
    assert made(blind, config) == made(told, config)


@pytest.mark.parametrize("method", ["shot", "socket", "distill"])
def test_other_methods_leave_the_same_files(
    prepared: Prepared, tmp_path: Path, method: str
) -> None:
    run = prepared.copy(tmp_path / "run")
    config = settings(prepared.archive, *QUICK, f"transfer.method={method}")
    if method == "distill":
        with pytest.raises(RunError, match="sfkt bridge"):
            transfer(config, run)
        bridge(config, run)
    transfer(config, run)
    assert set(digests(run.path("transfer"))) == {
        f"{method}/{name}" for name in (*FILES, "epochs.npy")
    }
    card = load_model(run.path("transfer", method)).card
    assert card.method == method
    assert card.sensor == prepared_sensor(run)


def test_a_model_that_was_trained_elsewhere_is_changed_gently(
    prepared: Prepared, tmp_path: Path
) -> None:
    def bottleneck_rate(name: str, *assignments: str, pretrained: bool) -> float:
        run = prepared.copy(tmp_path / name)
        config = settings(prepared.archive, *QUICK, *assignments)
        card = run.path("source", "model.json")
        told = json.loads(card.read_text(encoding="utf-8"))
        assert told["pretrained"] is False
        write_record(card, {**told, "pretrained": pretrained})
        write_record(run.path("source", "done.json"), run.record("source") | {"outputs": {}})
        bridge(config, run)
        transfer(config, run)
        lines = run.path("transfer", "tgkt", "metrics.jsonl").read_text(encoding="utf-8")
        return float(json.loads(lines.splitlines()[0])["learning_rate"])

    from_here = bottleneck_rate("here", pretrained=False)
    assert bottleneck_rate("elsewhere", pretrained=True) == pytest.approx(from_here / 3)
    gentler = ("tgkt.learning_rate=0.003", "tgkt.backbone_rate=0.5")
    assert bottleneck_rate("asked", *gentler, pretrained=True) == pytest.approx(from_here / 10)


def test_with_more_images_later_the_models_go_on_from_those_that_are_there(
    prepared: Prepared, tmp_path: Path
) -> None:
    before = prepared.copy(tmp_path / "before")
    config = settings(prepared.archive, *QUICK)
    bridge(config, before)
    transfer(config, before)
    larger = tmp_path / "larger"
    write_archive(larger, tr_each=110, ti_each=60)
    no_step = ("bridge.learning_rate=1e-9", "tgkt.learning_rate=1e-9")
    warm = settings(larger, *QUICK, *no_step, f"training.warm_start={before.folder}")
    run = Run(tmp_path / "after")
    for stage in (prepare, source, bridge, transfer):
        stage(warm, run)
    for name in ("source", "bridge", "transfer/tgkt"):
        old, new = (load_model(each.path(name)).module.state_dict() for each in (before, run))
        weights = [key for key in old if key.endswith("weight")]
        assert weights
        assert all(torch.allclose(old[key], new[key], atol=1e-4) for key in weights)
    before.folder.rename(away := tmp_path / "away")
    for stage in (source, bridge, transfer):
        stage(warm, run)  # done already, whatever became of the earlier run
    with pytest.raises(RunError, match="before"):
        bridge(warm, Run(run.folder, force=True))
    away.rename(before.folder)
    with pytest.raises(ConfigError, match="the run itself"):
        source(settings(larger, f"training.warm_start={run.folder}"), Run(run.folder, force=True))
    other = prepared.copy(tmp_path / "other")
    retrained = settings(prepared.archive, *QUICK, "seed=1", "source.epochs=1")
    source(retrained, Run(other.folder, force=True))
    with pytest.raises(DataError, match="another source model"):
        bridge(settings(prepared.archive, *QUICK, f"training.warm_start={before.folder}"), other)


def test_a_warm_start_may_be_changed_and_what_it_began_from_deleted(tmp_path: Path) -> None:
    first, second, run = (make_run(tmp_path / name, bridge=False) for name in "abc")
    save_classifier(second, "source", 7, None)
    shutil.rmtree(run.path("source"))

    def start(**options: Any) -> str:
        told = resolve(Options(run=run.folder, assignments=["runtime.gpus=0"], **options), "source")
        source(told.config, told.run)
        return load_model(run.path("source")).digest

    assert start(warm_start=first.folder) == load_model(first.path("source")).digest
    with pytest.raises(RunError, match=r"warm_start: was .*, now "):
        start(warm_start=second.folder)
    taken = start(warm_start=second.folder, force=True)
    assert taken == load_model(second.path("source")).digest
    shutil.rmtree(second.folder)
    assert start() == taken


def test_a_rerun_does_nothing_and_other_settings_are_refused(
    prepared: Prepared, tmp_path: Path
) -> None:
    run, config = prepared.copy(tmp_path / "run"), settings(prepared.archive, *QUICK)
    made(run, config)
    before = digests(run.folder, times=True)
    for stage in (prepare, source, bridge, transfer):
        stage(settings(prepared.archive) if stage in (prepare, source) else config, run)
        assert digests(run.folder, times=True) == before
    for stage, setting in ((bridge, "bridge.alpha_f=9"), (transfer, "tgkt.beta_f=9")):
        with pytest.raises(RunError, match=setting.partition("=")[0]):
            stage(settings(prepared.archive, *QUICK, setting), run)
    assert digests(run.folder, times=True) == before

    again = settings(prepared.archive, *QUICK, "bridge.alpha_f=9")
    bridge(again, Run(run.folder, force=True))
    with pytest.raises(RunError, match="bridge"):  # the student was made with the old bridge
        transfer(again, run)


@pytest.mark.parametrize("stage", [bridge, transfer])
def test_a_stage_that_was_stopped_ends_like_one_that_was_not(
    prepared: Prepared, tmp_path: Path, stage: Callable[[Config, Run], None]
) -> None:
    steps = (*QUICK, "training.min_steps=10")
    config = settings(prepared.archive, *steps)
    whole = prepared.copy(tmp_path / "whole")
    if stage is transfer:
        bridge(config, whole)
    shutil.copytree(whole.folder, tmp_path / "parts")
    parts = Run(tmp_path / "parts")
    stage(config, whole)
    folder = parts.path("bridge" if stage is bridge else "transfer/tgkt")

    def stop() -> None:
        while not (folder / "checkpoint" / "state.pt").is_file():
            time.sleep(0.005)
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # else the stage was faster
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    with pytest.raises(Interrupted):
        stage(settings(prepared.archive, *steps, "runtime.checkpoint_seconds=0"), parts)
    watcher.join()
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "done.json").exists()
    stage(config, parts)
    place = (folder / "model.safetensors").relative_to(parts.folder)
    assert parts.path(str(place)).read_bytes() == whole.path(str(place)).read_bytes()
    assert not (folder / "checkpoint").exists()
    assert set(digests(parts.folder)) == set(digests(whole.folder))


def test_stages_out_of_order_name_the_one_that_is_missing(
    prepared: Prepared, tmp_path: Path
) -> None:
    config = settings(prepared.archive)
    empty = Run(tmp_path / "empty")
    for stage in (source, bridge, transfer):
        with pytest.raises(RunError, match="sfkt prepare"):
            stage(config, empty)
    run = prepared.copy(tmp_path / "run")
    shutil.rmtree(run.path("source"))
    for stage in (bridge, transfer):
        with pytest.raises(RunError, match="sfkt source"):
            stage(config, run)
    run.source_store.unlink()
    with pytest.raises(RunError, match=r"source\.checkpoint"):
        source(config, run)
    run.transfer_store.unlink()
    shutil.copytree(prepared.run.path("source"), run.path("source"))
    with pytest.raises(RunError, match=r"transfer\.h5 is missing: first run `sfkt prepare"):
        bridge(config, run)


@pytest.mark.parametrize("earlier", ["source", "transfer.h5"])
def test_a_bridge_of_another_source_model_or_other_data_is_refused(
    earlier: str, prepared: Prepared, tmp_path: Path
) -> None:
    run, config = prepared.copy(tmp_path / "run"), settings(prepared.archive, *QUICK)
    bridge(config, run)
    record = run.record("bridge")
    write_record(
        run.path("bridge/done.json"),
        {**record, "inputs": {**record["inputs"], earlier: "another"}},
    )
    told = rf"made from an earlier {earlier}: run `sfkt bridge --force`"
    with pytest.raises(RunError, match=told):
        transfer(config, run)
    assert not run.path("transfer/tgkt/model.json").exists()
    transfer(settings(prepared.archive, *QUICK, "transfer.method=shot"), run)  # which needs none


def test_a_source_model_of_other_classes_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    run, config = prepared.copy(tmp_path / "run"), settings(prepared.archive, *QUICK)
    saved = load_model(run.path("source"))
    save_model(
        Stage("source", run.path("source"), Config(), {}), saved.module, kind="classifier",
        encoding=None, architecture=saved.card.architecture,
        classes=["crosses", *saved.card.classes[1:]],
    )  # fmt: skip
    write_record(run.path("source", "done.json"), run.record("source") | {"outputs": {}})
    for stage in (bridge, transfer):
        with pytest.raises(DataError, match="crosses"):
            stage(config, run)
    assert not run.finished("bridge")
