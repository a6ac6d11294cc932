"""Exported files give what PyTorch gives, from the raw image on, and load without this program."""

from __future__ import annotations

import copy
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import sfkt_cli
from sfkt_cli.data.grid import Fit, fit_target
from sfkt_cli.data.sensor import Sensor, prepared_sensor
from sfkt_cli.data.store import open_store, spread
from sfkt_cli.errors import ConfigError, DataError, RunError
from sfkt_cli.evaluation import exported as files
from sfkt_cli.evaluation.exported import labels_told, open_openvino
from sfkt_cli.evaluation.models import KEPT
from sfkt_cli.files import locking, write_record
from sfkt_cli.machine import processor
from sfkt_cli.models import graph_files
from sfkt_cli.models.graph_files import FitTarget, SensorGraph, for_export, to_onnx
from sfkt_cli.models.onnx_files import open_session
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages import export as stage
from sfkt_cli.stages.doctor import doctor
from sfkt_cli.stages.evaluate import evaluate
from sfkt_cli.stages.export import ENDS, OPENERS, export
from sfkt_cli.stages.predict import predict
from sfkt_cli.student import ExportedStudent
from tests.stages.evaluation_runs import ENCODING, make_run, save_classifier, settings

LOAD_ALONE = """
import sys
import numpy as np
sys.modules["sfkt_cli"] = None
images = np.load(sys.argv[1])
if sys.argv[2].endswith(".onnx"):
    import onnxruntime
    _, probabilities = onnxruntime.InferenceSession(sys.argv[2]).run(None, {"images": images})
else:
    import torch
    program = torch.export.load(sys.argv[2]).module()
    probabilities = program(torch.from_numpy(images))[1].numpy()
np.save(sys.argv[3], probabilities)
"""


@pytest.fixture(scope="module")
def exported(untrained_run: Run, untrained_config: Config) -> Path:
    export(untrained_config, untrained_run)
    return untrained_run.path("export")


@pytest.fixture(scope="module")
def images(untrained_run: Run) -> Any:
    return np.array(open_store(untrained_run.transfer_store)["target/target"][:5])


@pytest.fixture(scope="module")
def expected(untrained_run: Run, images: Any) -> Any:
    student = sfkt_cli.load_student(untrained_run.folder)
    return student.probabilities(torch.from_numpy(images)).numpy()


def test_everything_is_written(exported: Path) -> None:
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    graphs = {f"{n}.{k}" for n in ("student", "bridged-source") for k in ("onnx", "pt2")}
    models = {
        f"{name}/model.{kind}"
        for name in ("student", "translator", "source")
        for kind in ("safetensors", "json")
    }
    assert files == graphs | models | {"README.md", "config.yaml", "done.json"}
    differences = json.loads((exported / "done.json").read_text())["largest_difference"]
    assert set(differences) == graphs
    assert max(differences.values()) < 1e-4


def test_every_kind_of_file_is_opened_and_the_model_card_has_code_for_it() -> None:
    assert {kind for kind, _ in ENDS.values()} == {*OPENERS}
    card = Path(files.__file__).with_name("model_card.md").read_text(encoding="utf-8")
    assert all(f'file.endswith("{Path(f"student{end}").suffix}")' in card for end in ENDS)


def test_a_changed_file_is_found(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "export")
    doctor(tmp_path)
    with (tmp_path / "export" / "bridged-source.onnx").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(RunError, match=r"1 of \d files"):
        doctor(tmp_path)


def test_onnx_gives_the_student_for_any_batch(exported: Path, images: Any, expected: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported / "student.onnx"))
    for count in (1, 5):
        _, probabilities = session.run(None, {"images": images[:count]})
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-5)
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert classes == list(sfkt_cli.load_student(exported / "student").classes)
    bridged = onnxruntime.InferenceSession(str(exported / "bridged-source.onnx"))
    logits, _ = bridged.run(None, {"images": images})
    assert logits.shape == expected.shape


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_every_test_image_gets_the_same_class_without_this_program(
    kind: str, untrained_run: Run, exported: Path, tmp_path: Path
) -> None:
    test = open_store(untrained_run.test_store)["test/target"]
    target = open_store(untrained_run.transfer_store)["target/target"]
    images = np.concatenate([np.array(test), np.array(target)])
    student = sfkt_cli.load_student(untrained_run.folder)
    expected = student.probabilities(torch.from_numpy(images)).numpy()
    np.save(tmp_path / "images.npy", images)
    arguments = [tmp_path / "images.npy", exported / f"student.{kind}", tmp_path / "out.npy"]
    subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, *map(str, arguments)], check=True, cwd=tmp_path
    )
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 1e-4  # ties may be broken either way
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])
    assert expected.std(axis=0).max() > 0.005  # the images do differ


def test_predict_takes_an_onnx_file(
    untrained_run: Run, untrained_config: Config, exported: Path, images: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "0.npy", images[0])
    np.save(tmp_path / "1.npy", np.kron(images[1], np.ones((3, 4), images.dtype)))
    files = [str(tmp_path / f"{number}.npy") for number in range(2)]
    rows = []
    device = tmp_path / "device"
    device.mkdir()
    shutil.copy(exported / "student.onnx", device / "student-int8.onnx")
    for model in (exported, exported / "student.onnx", device):
        predict(untrained_config, untrained_run, files, output=tmp_path / "rows.csv", model=model)
        with (tmp_path / "rows.csv").open(newline="") as file:
            rows.append(
                [{**r, "probability": float(r["probability"])} for r in csv.DictReader(file)]
            )
    for student, *others in zip(*rows, strict=True):
        probability = pytest.approx(student["probability"], abs=1e-4)
        assert all(other == {**student, "probability": probability} for other in others)
    assert ExportedStudent(exported / "student.onnx").predict_stored([]) == []
    (tmp_path / "cut.onnx").write_bytes((exported / "student.onnx").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut\.onnx is damaged"):
        predict(
            untrained_config, untrained_run, files, output=tmp_path / "no.csv",
            model=tmp_path / "cut.onnx",
        )  # fmt: skip


def test_the_exported_folder_knows_its_sensor(exported: Path, images: Any, expected: Any) -> None:
    student = sfkt_cli.load_student(exported / "student")
    assert student.sensor.modality == "depth"
    assert student.predict(images[0]).probability == pytest.approx(expected[0].max(), abs=1e-5)


def test_the_model_card_has_front_matter_and_code_that_runs(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    text = (exported / "README.md").read_text()
    monkeypatch.chdir(exported)
    exec(text.split("```python")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() in sfkt_cli.load_student(exported / "student").classes
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-classification"
    assert "uint16, (batch, 16, 16)" in text


@pytest.mark.parametrize("bridge", [False, True])
def test_the_model_card_describes_what_is_there(bridge: bool, tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "tgkt", bridge=bridge), settings()
    source = load_model(run.path("source"))
    turned = source.card.classes[::-1]
    save_model(
        Stage("source", run.path("source"), Config(), {}), source.module, kind="classifier",
        classes=turned, encoding=None, architecture=source.card.architecture,
    )  # fmt: skip
    done = run.path("transfer/tgkt/done.json")
    for kept in (False, True):
        write_record(done, {**run.record("transfer/tgkt"), "untouched_kept": kept})
        export(config, replace(run, force=True), formats=["pt2"])
        card = run.path("export/README.md").read_text()
        assert ("bridged-source" in card) == bridge
        assert ("the RGB model with its own weights" in card) == kept
        assert "Probabilities are not calibrated." in card
        assert "depth range" not in card
        assert "model.json" not in card
        assert "{" not in card.split("```")[0]
    if bridge:
        pytest.importorskip("onnxscript")
        export(config, run, formats=["onnx"])
        for name, classes in (("student", turned[::-1]), ("bridged-source", turned)):
            session = open_session(run.path(f"export/{name}.onnx").read_bytes())
            told = session.get_modelmeta().custom_metadata_map["classes"]
            assert json.loads(told) == classes


@pytest.mark.parametrize("names", ["student", "student student-fp16", "student-fp16"])
def test_the_model_card_opens_files_in_fp16_as_they_must_be(names: str, untrained_run: Run) -> None:
    store, sensor = open_store(untrained_run.transfer_store), prepared_sensor(untrained_run)
    ids, written = store.strings("target/id"), [f"{name}.onnx" for name in names.split()]
    images = files.TargetImages(store["target/target"], ids, (16, 16), "crop", "uint16", None)
    student = load_model(untrained_run.path("transfer/tgkt"))
    card = files.model_card(untrained_run, "tgkt", student, sensor, images, written, [])
    assert ("ORT_ENABLE_EXTENDED" in card) == ("fp16" in names)
    assert all(f'InferenceSession("{name}"' in card for name in written)
    compile(card.split("```python")[1].split("```")[0], "README.md", "exec")


@pytest.mark.parametrize("kind", ["pt2", "safetensors"])
def test_an_export_without_onnx_has_code_that_runs_and_nothing_of_an_interrupted_one(
    kind: str, untrained_run: Run, untrained_config: Config, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "LONGEST_S", 0)
    monkeypatch.chdir(tmp_path)
    for name in ("bridged-source-int8.onnx", "notes.onnx"):
        (tmp_path / name).touch()
    (tmp_path / ".export.a.partial").mkdir()
    (tmp_path / ".export.a.partial/student.onnx").touch()
    (tmp_path / "README.md").write_text(files.FIRST_LINES)
    export(untrained_config, untrained_run, formats=[kind], benchmark=True, output=tmp_path)
    left = {path.name for path in tmp_path.iterdir() if "onnx" in path.name}
    assert left == {"notes.onnx"}
    assert json.loads((tmp_path / "done.json").read_text())["precisions"] == ["fp32"]
    capsys.readouterr()
    exec((tmp_path / "README.md").read_text().split("```python")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() in sfkt_cli.load_student(untrained_run.folder).classes


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [{}, {"input_type": "float32", "batch": 4}], ids=str)
def test_the_recipes_of_the_export_page_run(
    runtime: str, options: dict[str, Any], untrained_run: Run, untrained_config: Config,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip(runtime)
    export(untrained_config, untrained_run, formats=["onnx"], output=tmp_path / "out", **options)
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = [block for block in blocks if f"import {runtime}\n" in block]
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(recipe, {})
    assert capsys.readouterr().out.strip()


def test_openvino_gives_the_student(exported: Path, images: Any, expected: Any) -> None:
    pytest.importorskip("openvino")
    predict = open_openvino((exported / "student.onnx").read_bytes())
    np.testing.assert_allclose(predict(torch.from_numpy(images)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(37, 53, 16), (20, 30, 48)]
    + [(h, w, s) for h, w in ((480, 640), (640, 480), (1080, 1920)) for s in (48, 64, 224)],
)
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_resampling_in_the_graph_is_that_of_prepare_to_the_last_digit(
    height: int, width: int, size: int, fit: Fit
) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(1, 65536, (1, height, width), dtype=np.uint16)
    images[generator.random(images.shape) < 0.3] = 0
    missing = size != 64
    module = FitTarget(height, width, size, fit, missing=missing)
    found = module(torch.from_numpy(images)).numpy()
    expected = np.stack([fit_target(image, size, fit, missing=missing) for image in images])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(48, 48), (33, 33, 3)])
@pytest.mark.parametrize("size", [(480, 640), (424, 240), (100, 100), (48, 57)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_files_that_crop_are_measured_on_the_stored_images(
    shape: tuple[int, ...], size: tuple[int, int], fit: Fit
) -> None:
    stored = np.random.default_rng(0).integers(0, 3, (2, *shape), dtype=np.uint16)
    images = files.TargetImages(stored, ["a", "b"], size, fit, "uint16", 2)
    batch = images.read(np.arange(2))
    assert batch.shape == (2, *images.shape)
    cropped = FitTarget(*size, shape[0], fit, missing=True)(batch)
    np.testing.assert_array_equal(cropped.numpy(), stored)


@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, 48), (1080, 1920, 224)])
def test_resampling_in_onnxruntime_is_that_of_prepare(height: int, width: int, size: int) -> None:
    pytest.importorskip("onnxscript")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 65536, (2, height, width), dtype=np.uint16)
    module = for_export(FitTarget(height, width, size, "crop", missing=True))
    session = open_session(to_onnx(module, torch.from_numpy(images), {}, outputs=["fitted"]))
    (found,) = session.run(None, {"images": images})
    expected = np.stack([fit_target(image, size, "crop", missing=True) for image in images])
    np.testing.assert_array_equal(found, expected)


def test_a_file_that_differs_from_pytorch_is_refused(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_pt2 = graph_files.open_pt2

    def open_wrongly(content: bytes) -> Any:
        program = open_pt2(content)

        def predict(images: Any) -> Any:
            probabilities = program(images)
            probabilities[3] = probabilities[3].flip(0) + 0.01
            return probabilities

        return predict

    monkeypatch.setitem(OPENERS, "pt2", open_wrongly)
    monkeypatch.setattr(files, "BATCH", 64)
    store = open_store(untrained_run.transfer_store)
    name = store.strings("target/id")[spread(store.count("target"), 64)[3]]
    with pytest.raises(RunError, match=rf"student\.pt2 was not written: 1 of .* class: {name}"):
        export(untrained_config, untrained_run, formats=["pt2"], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_says_why_and_leaves_the_earlier_one(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    export(untrained_config, untrained_run, formats=["safetensors"], output=tmp_path)
    assert (tmp_path / "README.md").read_text().startswith(files.FIRST_LINES)
    before, half = content(), graph_files.halved

    def overflowing(graph: SensorGraph) -> torch.nn.Module:
        graph = copy.deepcopy(graph)
        graph.model.backbone.stem.weight.mul_(1e7)  # type: ignore[operator, union-attr]
        return half(graph)

    monkeypatch.setattr(graph_files, "halved", overflowing)
    with pytest.raises(RunError, match=r"student-fp16\.onnx was not written: in fp16 .* finite"):
        export(untrained_config, untrained_run, precisions=["fp16"], output=tmp_path)
    forward = SensorGraph.forward

    def branching(graph: SensorGraph, images: torch.Tensor) -> Any:
        return forward(graph, images if images.float().sum() > 0 else images.flip(1))

    monkeypatch.setattr(SensorGraph, "forward", branching)
    with pytest.raises(RunError, match=r"student\.pt2 was not written: .* data-dependent"):
        export(untrained_config, untrained_run, formats=["pt2"], output=tmp_path)
    assert content() == before


@pytest.mark.parametrize("named", [False, True])
def test_two_exports_into_a_folder_do_not_disturb_each_other(
    untrained_run: Run, untrained_config: Config, exported: Path, tmp_path: Path, named: bool
) -> None:
    target, output = (tmp_path, tmp_path) if named else (exported, None)
    unfinished = target / ".export.other.partial"
    unfinished.mkdir()
    forced = replace(untrained_run, force=True)
    with (
        locking(target, ""),
        pytest.raises(RunError, match="another sfkt process exports"),
    ):
        export(untrained_config, forced, formats=["safetensors"], output=output)
    assert unfinished.is_dir()
    unfinished.rmdir()


def test_files_of_other_origin_are_not_replaced(
    untrained_run: Run, untrained_config: Config, tmp_path: Path
) -> None:
    for name in ("README.md", "student.onnx"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds README\.md, student\.onnx, which"):
        export(untrained_config, untrained_run, formats=["safetensors"], output=tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_a_bridge_of_an_earlier_source_model_is_warned_of(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(untrained_run.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    saved = load_model(run.path("bridge"))
    for digest, warned in ((load_model(run.path("source")).digest, False), ("0" * 64, True)):
        save_model(
            Stage("bridge", run.path("bridge"), Config(), {"source": digest}), saved.module,
            kind="translator", architecture=saved.card.architecture, classes=[],
            encoding=saved.card.encoding,
        )  # fmt: skip
        export(untrained_config, replace(run, force=True), formats=["safetensors"])
        assert ("sfkt bridge --force" in capsys.readouterr().err) is warned


def test_other_precisions_types_and_batches(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 and int8 files of two float32 images each, timed and compared with PyTorch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(files, "LONGEST_S", 0)
    export(
        untrained_config, untrained_run, formats=["onnx"], precisions=["fp16", "int8"],
        input_type="float32", input_size="20x24", batch=2, benchmark=True, output=tmp_path,
    )  # fmt: skip
    done = json.loads((tmp_path / "done.json").read_text())
    compared = {each["file"]: each for each in done["files"]}
    names = {f"{n}-{p}.onnx" for n in ("student", "bridged-source") for p in ("fp16", "int8")}
    assert set(compared) == names
    assert {path.name for path in tmp_path.glob("*.onnx")} == names
    assert compared["student-fp16.onnx"]["agreement"] > 0.95
    assert compared["student-int8.onnx"]["agreement"] > 0.8
    assert compared["student-int8.onnx"]["accuracy"] is None
    session = onnxruntime.InferenceSession(str(tmp_path / "student-int8.onnx"))
    (taken,) = session.get_inputs()
    assert (taken.type, taken.shape) == ("tensor(float)", [2, 20, 24])
    graph = pytest.importorskip("onnx").load(tmp_path / "student-int8.onnx").graph
    scales = {each.name: each.dims for each in graph.initializer if "_scale" in each.name}
    weights = [
        scales[node.input[1]] for node in graph.node
        if node.op_type == "DequantizeLinear" and "weight" in node.input[0]
    ]  # fmt: skip
    assert weights
    assert all(list(dims) != [] for dims in weights), "one scale for each output channel"
    resizing = [node for node in graph.node if node.op_type == "MatMul"]
    assert resizing
    assert not any("DequantizeLinear" in name for node in resizing for name in node.input)
    timed = {(each["runtime"], each["file"]) for each in done["latencies"]}
    assert ("PyTorch", "student") in timed
    assert ("onnxruntime", "student-int8.onnx") in timed
    assert {each["batch"] for each in done["latencies"]} == {2}
    student = ExportedStudent(tmp_path / "student-int8.onnx")
    for size in ((20, 24), (24, 20)):
        np.save(tmp_path / f"{size[0]}.npy", np.full(size, 900, np.uint16))
    image = student.read(tmp_path / "20.npy")
    assert len(student.predict_stored([image] * 3)) == 3
    with pytest.raises(DataError, match="24 x 20 pixels, the model takes 20 x 24"):
        student.read(tmp_path / "24.npy")
    card = (tmp_path / "README.md").read_text()
    assert "float32, (2, 20, 24)" in card
    assert "| student-int8.onnx" in card


def test_a_single_image_is_measured_and_compared() -> None:
    images = files.TargetImages(np.ones((1, 4, 4), np.uint16), ["a"], (4, 4), "crop", "uint16", 2)
    for lowered in (False, True):
        assert [rows.tolist() for rows in images.choose(lowered=lowered)] == [[0], [0]]


def test_a_machine_whose_processor_has_no_name_is_told_by_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor() == platform.machine()


def test_the_model_card_tells_no_results_of_earlier_weights(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "shot"), settings(oracle=False, pictures=False)
    done = {**run.record("transfer/shot"), "untouched_kept": True}
    write_record(run.path("transfer/shot/done.json"), done)

    def card() -> str:
        export(config, run, method="shot", formats=("safetensors",))
        return run.path("export", "README.md").read_text(encoding="utf-8")

    assert "Not evaluated" in card()
    assert r"Recognises disc, \<b>bar\</b>, =cross" in card()
    evaluate(config, run)
    assert re.search(r"\| shot \(1\) +\| target +\| +30 \|", card())
    assert f"\n\n(1) {KEPT}\n" in card()
    store = open_store(run.transfer_store)
    labels = labels_told(run, store)
    assert sorted(labels) == sorted(store.strings("target/id"))
    assert set(labels.values()) == {0, 1, 2}
    save_classifier(run, "transfer/shot", 9, ENCODING)
    assert "Not evaluated" in card()


@pytest.mark.parametrize("labelled", [True, False])
def test_a_student_that_was_judged_worse_is_not_shipped_in_silence(
    labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "tgkt", labelled=labelled), settings(oracle=False)
    evaluate(config, run)
    for tone in ("open", "worse"):
        told = {**run.record("evaluate"), "tone": tone, "headline": "The answer."}
        write_record(run.path("evaluate/done.json"), told)
        capsys.readouterr()
        export(config, replace(run, force=True), formats=["safetensors"])
        sfkt_cli.load_student(run.folder)
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.count("which --method source-encoded takes in its place: The answer.") == (
            2 if tone == "worse" else 0
        )
    card = run.path("export/README.md").read_text(encoding="utf-8")
    assert "The answer." in card
    assert ("| source-encoded" in card) == labelled
    run.path("evaluate/report.md").unlink()
    assert sfkt_cli.load_student(run.folder).classes


def test_the_source_model_is_shipped_with_the_encoding_of_the_student(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "tgkt", "shot"), settings(oracle=False, pictures=False)
    store, name = open_store(run.transfer_store), "source-encoded"
    evaluate(config, run)
    export(config, run, method=name, formats=["pt2", "safetensors"])
    student = sfkt_cli.load_student(run.folder, method=name)
    stored = torch.from_numpy(np.array(store["target/target"]))
    expected = student.probabilities(stored)
    exported = sfkt_cli.load_student(run.path("export"))
    assert torch.equal(exported.probabilities(stored), expected)
    assert student.encoding == ENCODING
    assert exported.sensor == student.sensor
    with run.path("evaluate/predictions.csv").open(encoding="utf-8", newline="") as file:
        said = {r["id"]: r[name].removeprefix("'") for r in csv.DictReader(file)}
    for sample, row in zip(store.strings("target/id"), expected.argmax(1).tolist(), strict=True):
        assert said[sample] == student.classes[row]
    assert "the RGB model with its own weights" in run.path("export/README.md").read_text()
    done = run.path("export/done.json")
    before = done.stat().st_mtime_ns
    export(config, run, method=name, formats=["pt2", "safetensors"])
    assert done.stat().st_mtime_ns == before
    save_classifier(run, "transfer/tgkt", 2, replace(ENCODING, high=9000.0))
    export(config, run, method=name, formats=["pt2", "safetensors"])
    assert sfkt_cli.load_student(run.path("export")).encoding.high == 9000.0
    with pytest.raises(RunError, match="there is no method 'shott': choose from"):
        export(config, run, method="shott")


def test_a_model_card_shows_no_accuracy_of_another_encoding(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "tgkt", "shot"), settings(oracle=False, pictures=False)
    save_classifier(run, "transfer/shot", 2, replace(ENCODING, high=9000.0))
    transfer = config.transfer.model_copy(update={"method": "shot"})
    evaluate(config.model_copy(update={"transfer": transfer}), run)
    for student, known in (("tgkt", False), ("shot", True)):
        transfer = config.transfer.model_copy(update={"method": student})
        chosen = config.model_copy(update={"transfer": transfer})
        export(chosen, run, method="source-encoded", formats=["safetensors"])
        card = run.path("export/README.md").read_text(encoding="utf-8")
        assert ("Not evaluated" not in card) == known


def test_the_graph_divides_logits_by_the_temperature() -> None:
    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images.mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0])

    graph = SensorGraph(Network(), ENCODING, temperature=4.0)
    logits, probabilities = graph(torch.full((1, 8, 8), 2800))
    assert torch.allclose(probabilities, torch.softmax(logits / 4, dim=1))


def test_a_file_says_what_its_values_are_and_how_raw_ones_become_such() -> None:
    def meaning(modality: str, unit: str, **more: Any) -> str:
        dtype = more.pop("dtype", "uint16")
        return Sensor(modality, unit, dtype, 1, 16, "crop", **more).meaning

    own = "; if the sensor itself gives floats, they are"
    lost, rounded = "; NaN and infinity become", "; round the others"
    alike = f"{lost} 0, as do values below 0 or beyond 65535{rounded}"
    metres, median = (
        f"{own} metres: multiply them by 1000{alike}",
        f"{lost} the median of the others",
    )
    shares = f"{own} 0..1: multiply them by 65535{median}{rounded}"
    assert meaning("depth", "auto") == f"mm, 0 = no reading{metres}"
    assert meaning("depth", "raw") == f"raw, 0 = no reading{lost} 0{rounded}"
    assert meaning("thermal", "auto") == f"raw{shares}"
    assert meaning("thermal", "raw") == f"raw{median}{rounded}"
    scaled = meaning("depth", "auto", scale=0.2, no_reading=(65535,))
    first = "first set 65535 to 0, then multiply by 0.2"
    assert scaled == f"mm, 0 = no reading; {first}{alike}"
    bordered = meaning("thermal", "auto", no_reading=(0, 65535))
    assert bordered == f"raw; first set 0 and 65535 to the median of the others{shares}"
    assert meaning("depth", "m") == f"mm, 0 = no reading; first multiply by 1000{alike}"
    rotated = meaning("depth", "auto", rotated=True)
    assert rotated == f"mm, 0 = no reading; first set more than 8000 to 8000{metres}"
    assert meaning("other", "auto", dtype="uint8") == "raw"


def test_a_second_export_does_nothing_until_something_changed(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(*formats: str, force: bool = False) -> str:
        run = replace(untrained_run, force=force)
        export(untrained_config, run, formats=formats, output=tmp_path)
        return capsys.readouterr().err

    weights = tmp_path / "student/model.safetensors"
    assert "student/model.safetensors" in again("safetensors")
    for file in (weights, tmp_path / "README.md"):
        os.truncate(file, 100)
        assert "already done" not in again("safetensors")
    before = weights.stat().st_mtime_ns
    assert "already done" in again("safetensors")
    assert weights.stat().st_mtime_ns == before
    assert "already done" not in again("safetensors", force=True)
    assert weights.stat().st_mtime_ns > before
    weights.unlink()
    assert "already done" not in again("safetensors")
    assert weights.is_file()
    assert "student.pt2" in again("safetensors", "pt2")
    (tmp_path / "notes.txt").write_text("mine")
    again("pt2")
    assert not weights.exists()
    assert (tmp_path / "notes.txt").is_file()
    again("safetensors", "pt2")
    done = json.loads((tmp_path / "done.json").read_text())
    write_record(tmp_path / "done.json", {**done, "inputs": {"student": "another"}})
    assert "already done" not in again("safetensors", "pt2")


def test_wrong_requests_are_refused(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="onnx, pt2, safetensors"):
        export(untrained_config, untrained_run, formats=["tflite"], output=tmp_path)
    with pytest.raises(ConfigError, match="480x640"):
        export(untrained_config, untrained_run, input_size="640", output=tmp_path)
    monkeypatch.setattr(stage, "ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"pip install '\.\[onnx\]'"):
        export(untrained_config, untrained_run, formats=["onnx"], output=tmp_path)
