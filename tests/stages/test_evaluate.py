import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.data.sensor import prepared_sensor
from sfkt_cli.data.store import open_store
from sfkt_cli.data.store_writer import text_column, writing
from sfkt_cli.errors import ConfigError, DataError, RunError
from sfkt_cli.evaluation import figures
from sfkt_cli.evaluation.labelled import LISTS, list_to_label, match_own_labels, read_splits
from sfkt_cli.evaluation.models import Predictor, load_models, predictors_of
from sfkt_cli.evaluation.predictions import Evaluation, Outcome, add_ensemble
from sfkt_cli.evaluation.sections import headline, thresholds
from sfkt_cli.files import locking, write_record
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.scores import geometric_mean
from sfkt_cli.settings.config import Config, RuntimeConfig, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.evaluate import evaluate, measuring_runtime
from sfkt_cli.student import find_student
from sfkt_cli.training.predicting import View, adapt_batch_norms, predict_rows
from sfkt_cli.training.runtime import make_runtime
from tests.stages.evaluation_runs import (
    ARCHITECTURE,
    CLASSES,
    ENCODING,
    SIZE,
    finish,
    images,
    make_run,
    make_stores,
    save_classifier,
    settings,
)

ROW_KEYS = {
    "method", "seed", "split", "n", "accuracy", "accuracy_ci95", "balanced_accuracy", "macro_f1",
    "ece", "train_seconds", "peak_memory_mb",
}  # fmt: skip
PICTURES = {
    "confusion.png", "curves.png", "errors.png", "features.png", "gallery-ti.png",
    "gallery-tr.png", "reliability.png",
}  # fmt: skip


def _results(run: Run) -> dict[str, Any]:
    text = run.path("evaluate", "results.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _rows(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["split"]): row for row in _results(run)["rows"]}


def _oracle_digest(run: Run) -> bytes:
    return run.path("evaluate", "oracle", "done.json").read_bytes()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("run"), "tgkt", "shot")
    evaluate(settings(), run)
    return run


def test_leaves_exactly_these_files(evaluated: Run) -> None:
    names = {path.name for path in evaluated.path("evaluate").iterdir()}
    files = {
        "config.yaml", "done.json", "log.txt", "predictions.csv", "report.html", "report.md",
        "report.tex",
    }  # fmt: skip
    assert names == files | {"results.json", ".oracle.lock", "oracle"} | PICTURES
    unlisted = names - set(evaluated.record("evaluate")["outputs"])
    assert unlisted == {"done.json", "log.txt", "oracle", ".oracle.lock"}


def test_results_hold_every_method_on_every_split(evaluated: Run) -> None:
    results = _results(evaluated)
    assert set(results) == {"dataset", "classes", "rows"}
    assert results["dataset"] == "made"
    assert results["classes"] == CLASSES
    methods = [
        "source-only",
        "source-encoded",
        "source-adapted",
        "bridge-only",
        "shot",
        "tgkt",
        "tgkt+bridge",
        "oracle",
    ]
    rows = [(row["method"], row["split"]) for row in results["rows"]]
    both = [(name, split) for name in methods for split in ("target", "test")]
    assert rows == [*both, ("source-rgb", "test")]
    for row in results["rows"]:
        assert row.keys() >= ROW_KEYS
        assert row["n"] == (30 if row["split"] == "target" else 18)
        low, high = row["accuracy_ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1


def test_cost_of_a_method_holds_that_of_the_bridge_where_it_uses_it(evaluated: Run) -> None:
    rows = _rows(evaluated)
    seconds = {name: rows[name, "test"]["train_seconds"] for name, _ in rows}
    assert seconds["source-only"] == seconds["source-rgb"] == 0
    assert seconds["bridge-only"] == seconds["shot"] == 10
    assert seconds["tgkt"] == seconds["tgkt+bridge"] == 20
    parameters = {name: rows[name, "test"]["parameters"] for name, _ in rows}
    assert parameters["tgkt+bridge"] == parameters["tgkt"] + parameters["bridge-only"]


def test_accuracy_is_that_of_labels_matched_by_id(evaluated: Run) -> None:
    transfer = open_store(evaluated.transfer_store)
    test = open_store(evaluated.test_store)
    student = load_model(evaluated.path("transfer", "tgkt")).module
    truth = dict(zip(test.strings("labels/id"), test.labels("labels").tolist(), strict=True))
    hits = []
    for row, name in enumerate(transfer.strings("target/id")):
        stored = torch.from_numpy(np.array(transfer["target/target"][row : row + 1]))
        with torch.inference_mode():
            _, logits = student(as_rgb(encode(stored, ENCODING)))
        hits.append(int(logits.argmax()) == truth[name])
    assert test.strings("labels/id") != transfer.strings("target/id")
    assert _rows(evaluated)["tgkt", "target"]["accuracy"] == pytest.approx(np.mean(hits))


def test_the_start_of_the_students_is_the_source_model_on_their_encoding(evaluated: Run) -> None:
    test = open_store(evaluated.test_store)
    source = load_model(evaluated.path("source")).module
    stored = torch.from_numpy(np.array(test["test/target"]))
    with torch.inference_mode():
        _, logits = source(as_rgb(encode(stored, ENCODING)))
    said = logits.argmax(dim=1).numpy()
    expected = float((said == test.labels("test")).mean())
    assert _rows(evaluated)["source-encoded", "test"]["accuracy"] == pytest.approx(expected)


def test_the_adapted_source_model_has_the_statistics_of_target_images(evaluated: Run) -> None:
    store = open_store(evaluated.transfer_store)
    test = open_store(evaluated.test_store)
    source = load_model(evaluated.path("source")).classifier
    runtime = make_runtime(RuntimeConfig(gpus=0, precision="fp32"))
    view = View(runtime, source.eval(), ENCODING)
    adapt_batch_norms(store["target/target"], view)
    _, logits = predict_rows(test["test/target"], view)
    expected = float((logits.argmax(dim=1).numpy() == test.labels("test")).mean())
    assert _rows(evaluated)["source-adapted", "test"]["accuracy"] == pytest.approx(expected)


def test_models_are_measured_in_the_precision_of_predict() -> None:
    assert measuring_runtime(settings().runtime).precision == torch.float32
    asked = build({"runtime": {"gpus": 0, "precision": "bf16"}})
    assert measuring_runtime(asked.runtime).precision == torch.bfloat16


def test_predictions_agree_with_the_table_and_are_no_formulas(evaluated: Run) -> None:
    text = evaluated.path("evaluate", "predictions.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == 48
    assert {line["label"] for line in lines} == {"disc", "<b>bar</b>", "'=cross"}
    here = [line for line in lines if line["split"] == "test"]
    share = np.mean([line["shot"] == line["label"] for line in here])
    assert _rows(evaluated)["shot", "test"]["accuracy"] == pytest.approx(share)


def test_every_row_is_measured_in_that_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where models are trained in another: on processors with bf16."""
    seen: set[torch.dtype] = set()

    def look(images: Any, view: View, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.add(view.runtime.precision)
        return predict_rows(images, view, **how)

    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("sfkt_cli.evaluation.models.predict_rows", look)
    run = make_run(tmp_path / "run")
    evaluate(settings(oracle=True), run)
    assert ("oracle", "test") in _rows(run)
    assert seen == {torch.float32}


def test_the_oracle_is_marked_where_it_saw_the_labels(evaluated: Run) -> None:
    rows = _rows(evaluated)
    assert "training accuracy" in rows["oracle", "target"]["note"]
    assert rows["oracle", "test"]["note"] is None
    text = evaluated.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "oracle (1)" in text
    assert "## Accuracy by class, test split" in text, "not of images that the oracle has seen"
    assert "\n(1) training accuracy: it was trained on these images" in text


def test_the_report_shows_what_the_training_measured(evaluated: Run) -> None:
    text = evaluated.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "Trust in the bridge, 0 to 1: 0.50 before the training" in text
    assert "Measured again with the finished student: 0.25" in text
    assert "About 12.5 % of the target images may show none" in text


def test_models_are_compared_on_the_main_students_encoding(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tgkt", "shot")
    save_classifier(run, "transfer/shot", 3, replace(ENCODING, high=9000.0))
    store = open_store(run.transfer_store)
    models = load_models(run, store, measuring_runtime(settings().runtime))
    assert [*models.students] == ["shot", "tgkt"]
    assert models.encoding(settings(), store) == ENCODING
    alone = replace(models, students={"shot": models.students["shot"]})
    assert alone.encoding(settings(), store).high == 9000.0


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "change",
    [{"classes": CLASSES[::-1]}, {"classes": [*CLASSES, "lamp"]}, {"image_size": 2 * SIZE}],
    ids=str,
)
def test_a_student_that_does_not_fit_is_left_out_and_named(
    change: dict[str, Any], labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as after another source model, or after `sfkt prepare --force`."""
    run = make_run(tmp_path / "run", "tgkt", "shot", labelled=labelled)
    sensor = asdict(prepared_sensor(run))
    for method, other in (("tgkt", {}), ("shot", change)):
        classes = other.get("classes", CLASSES)
        architecture = ARCHITECTURE | {"classes": len(classes)}
        save_model(
            Stage(method, run.path("transfer", method), Config(), {}), Classifier(**architecture),
            kind="classifier", architecture=architecture, classes=classes, encoding=ENCODING,
            sensor=sensor | {k: v for k, v in other.items() if k in sensor},
        )  # fmt: skip
    evaluate(settings(oracle=False, pictures=False), run)
    methods = run.record("evaluate")["methods"]
    assert "tgkt" in methods
    assert "shot" not in methods
    told = " ".join(capsys.readouterr().err.split())
    assert "shot is left out" in told
    assert "`sfkt transfer --method shot --force`" in told


def test_weights_that_were_not_kept_are_not_described(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tgkt")
    record = run.record("bridge") | {"trained": False, "ti_rank": 0.25, "untouched_rank": 0.75}
    write_record(run.path("bridge", "done.json"), record)
    record = run.record("transfer/tgkt") | {"settings": {"tgkt.trust": "full"}}
    write_record(run.path("transfer", "tgkt", "done.json"), record)
    evaluate(settings(), run)
    text = run.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "The translator was not kept" in text
    assert "than to 25.0 % of the others; without it, than to 75.0 %." in text
    assert "without the translator, which did not help" in text
    assert "Trust in the bridge" not in text  # nothing was measured


@pytest.mark.parametrize(
    ("students", "wanted", "method"),
    [
        ("aad shot", "shot", "shot"),
        ("aad shot", "aad", "aad"),
        ("aad shot", "tgkt", "aad"),
        ("tgkt shot", "shot", "shot"),
        ("tgkt shot", "nrc", "tgkt"),
    ],
)
def test_the_student_that_is_judged_is_the_one_that_is_shipped(
    tmp_path: Path, students: str, wanted: str, method: str
) -> None:
    run = make_run(tmp_path / "run", *students.split(), bridge=False)
    transfer = settings().transfer.model_copy(update={"method": wanted})
    config = settings(oracle=False, pictures=False).model_copy(update={"transfer": transfer})
    evaluate(config, run)
    assert f"transfer/{method}/" in run.path("evaluate", "report.md").read_text("utf-8")
    assert find_student(run.folder, None, wanted).name == method


def _evaluation(run: Run) -> Evaluation:
    """What the report of a run is made from, before any model is asked."""
    config, store = settings(), open_store(run.transfer_store)
    models = load_models(run, store, measuring_runtime(config.runtime))
    splits = {split.name: split for split in read_splits(store, open_store(run.test_store))}
    return Evaluation(config, run, run.path("evaluate"), store, models, splits, None)


def _answers(run: Run, right: Mapping[str, Any], sure: Any = 1.0) -> Evaluation:
    """The same, with these answers: whether each method is ``right`` on each of 18 test images."""
    evaluation = _evaluation(run)
    labels, view = evaluation.splits["test"].labels, evaluation.models.students["tgkt"]
    for method, hits in right.items():
        said = np.where(hits, labels, (labels + 1) % 3)
        probabilities = np.eye(3)[said] * np.reshape(sure, (-1, 1))
        outcome = Outcome(Predictor(method, view, 0.0, None), {"test": probabilities})
        evaluation.outcomes[method] = outcome
    return evaluation


def test_the_box_compares_with_the_model_that_would_be_kept(tmp_path: Path) -> None:
    """One image of each of nine scenes is right, all are, or every image of a single scene."""
    run = make_run(tmp_path, "tgkt")
    half, most, few = np.arange(18) % 2 == 0, np.ones(18, bool), np.arange(18) < 2
    for student, encoded, tone in (
        (half, most, "worse"),
        (most, half, "better"),
        (few, ~most, "open"),
    ):
        right = {"source-only": ~most, "source-encoded": encoded, "tgkt": student}
        assert headline(_answers(run, right), None).tone == tone


def test_a_better_rival_is_named_after_correction_for_their_number(tmp_path: Path) -> None:
    """It alone is right on all nine scenes: p is 1/256, of 15 rivals 15/256."""
    run, none = make_run(tmp_path, "tgkt"), np.zeros(18, bool)
    alone = {"source-only": none, "source-encoded": none, "tgkt": none, "shot": ~none}
    assert "shot" in headline(_answers(run, alone), None).detail
    alike = dict.fromkeys("abcdefghijklm", none)
    assert "shot" not in headline(_answers(run, alone | alike), None).detail


def test_a_student_whose_predictions_are_no_numbers_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "shot", "tgkt")
    saved = load_model(run.path("transfer/shot"), torch.device("cpu"))
    for weight in saved.module.parameters():
        weight.data.fill_(torch.nan)
    architecture, classes = saved.card.architecture, saved.card.classes
    save_model(
        Stage("transfer/shot", run.path("transfer/shot"), Config(), {}), saved.module,
        kind="classifier", architecture=architecture, classes=classes, encoding=ENCODING,
    )  # fmt: skip
    evaluate(settings(), run)
    said = " ".join(capsys.readouterr().err.split())
    assert "shot is left out" in said
    assert "sfkt transfer --method shot --force" in said
    assert {name for name, _ in _rows(run)} >= {"tgkt", "oracle"}
    assert "shot" not in {name for name, _ in _rows(run)}


@pytest.mark.parametrize("labelled", [True, False])
def test_without_the_main_student_another_one_is_compared_and_judged(
    labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its encoding, and by the labels that its own list has."""
    run = make_run(tmp_path, "shot", "tgkt", bridge=False, labelled=labelled)
    save_classifier(run, "transfer/shot", 3, replace(ENCODING, kind="relative"))
    saved = load_model(run.path("transfer/tgkt"), torch.device("cpu"))
    for weight in saved.module.parameters():
        weight.data.fill_(torch.nan)
    save_model(
        Stage("transfer/tgkt", run.path("transfer/tgkt"), Config(), {}), saved.module,
        kind="classifier", architecture=ARCHITECTURE, classes=CLASSES, encoding=ENCODING,
    )  # fmt: skip
    for student, count in (("tgkt", 5), ("shot", 3)):
        lines = [f"target-{row},{CLASSES[row % 3]}" for row in range(count)]
        list_to_label(run, student).write_text("\n".join(["name,label", *lines]), "utf-8")
    evaluate(settings(oracle=False, pictures=False), run)
    assert run.record("evaluate")["main"] == "shot"
    assert all(row["note"] is None for row in _rows(run).values()), "all see one encoding"
    told = " ".join(capsys.readouterr().err.split())
    assert told.rpartition("labels of ")[2].startswith("3 images") != labelled


def test_thresholds_of_a_sure_model_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt")
    some = {"tgkt": np.arange(18) % 3 > 0}
    section = thresholds(_answers(run, some, 1 - 1e-4 * (1 + np.arange(18)) / 18))
    assert section is not None
    assert len({line["threshold"] for line in section.lines}) == 5
    unknown = [float(line["unknown %"]) for line in section.lines]
    assert unknown == pytest.approx([5, 10, 20, 30, 50], abs=6)
    section = thresholds(_answers(run, some))  # as sure as can be
    assert section is not None
    assert [line["unknown %"] for line in section.lines] == ["0.0"]
    assert "fitted" not in " ".join(section.text), "the temperature is that of nothing fitted"


def test_class_names_are_escaped(evaluated: Run) -> None:
    page = evaluated.path("evaluate", "report.html").read_text(encoding="utf-8")
    assert "<b>bar" not in page
    assert "&lt;b&gt;bar" in page
    text = evaluated.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "\\<b>bar" in text


def test_rerun_does_nothing_and_copies_the_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/made"), "tgkt")
    evaluate(settings(), run)
    done, oracle = run.path("evaluate", "done.json").stat(), _oracle_digest(run)
    capfd.readouterr()
    for name in ("deep/table.md", "table.html", "table.json", "table.tex"):
        evaluate(settings(), run, Path(name))
    assert run.path("evaluate", "done.json").stat().st_mtime_ns == done.st_mtime_ns
    shown = capfd.readouterr().err
    assert "nothing changed" in shown
    assert "| source-only" in shown
    text = Path("deep/table.md").read_text(encoding="utf-8")
    assert "(<../runs/made/evaluate/confusion.png>)" in text
    assert Path("table.html").read_text(encoding="utf-8").count("data:image/png") == 7
    assert json.loads(Path("table.json").read_text(encoding="utf-8")) == _results(run)

    save_classifier(run, "transfer/shot", 9, ENCODING)
    finish(run, "transfer/shot", {}, [])
    evaluate(settings(), run)
    assert ("shot", "test") in _rows(run)
    assert _oracle_digest(run) == oracle

    of_student = {"transfer.epochs": 3}
    finish(run, "transfer/shot", {}, [], settings=of_student)
    evaluate(settings(), run)
    assert len(run.metrics("evaluate/oracle")) == 3
    oracle = _oracle_digest(run)

    save_classifier(run, "source", 5, None)
    evaluate(settings(), run)
    assert _oracle_digest(run) != oracle


def test_a_report_that_is_copied_onto_itself_stays_whole(evaluated: Run) -> None:
    report = evaluated.path("evaluate", "report.md")
    before = report.read_bytes()
    evaluate(settings(), evaluated, report)
    assert report.read_bytes() == before
    assert evaluated.has("evaluate")


def test_what_another_evaluation_works_on_is_not_unmarked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(settings(oracle=False), run)
    before = run.path("evaluate", "done.json").read_bytes()
    with (
        locking(run.path(".evaluate.lock"), ""),
        pytest.raises(RunError, match="another sfkt process works on"),
    ):
        evaluate(settings(oracle=False, pictures=False), run)
    assert run.path("evaluate", "done.json").read_bytes() == before


def test_speeds_are_taken_on_the_same_images(evaluated: Run) -> None:
    rows = _rows(evaluated)
    speed = {
        name: row["images_per_second"] for (name, split), row in rows.items() if split == "test"
    }
    assert all(value > 0 for value in speed.values())
    tables = evaluated.path("evaluate", "report.tex").read_text(encoding="utf-8")
    assert r"\%" in tables
    assert (
        tables.count(r"\begin{tabular}") == tables.count("\n\\resizebox{\\linewidth}{!}{%\n") == 2
    )


def test_the_ensemble_averages_its_two_views(evaluated: Run) -> None:
    store = open_store(evaluated.transfer_store)
    evaluation = _evaluation(evaluated)
    for predictor in predictors_of(evaluated, store, evaluation.models, {}, ENCODING):
        evaluation.ask(predictor)
    add_ensemble(evaluation)
    probabilities = {
        name: outcome.predictor.probabilities(store["target/target"])
        for name, outcome in evaluation.outcomes.items()
    }
    views = [probabilities["tgkt"], probabilities["bridge-only"]]
    both = probabilities["tgkt+bridge"]
    np.testing.assert_allclose(both, geometric_mean(views), rtol=1e-6)
    np.testing.assert_array_equal(both, evaluation.outcomes["tgkt+bridge"].probabilities["target"])
    assert "tr_information" in evaluation.outcomes["tgkt+bridge"].label_free


def test_a_student_of_an_earlier_bridge_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt", "shot")
    finish(run, "transfer/tgkt", {"bridge": "another"}, [])
    evaluate(settings(oracle=False), run)
    rows = _rows(run)
    assert "earlier bridge" in rows["tgkt", "test"]["note"]
    assert rows["tgkt+bridge", "test"]["note"] == rows["tgkt", "test"]["note"]
    assert rows["shot", "test"]["note"] is None


def test_a_score_without_a_full_name_is_shown_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(figures.TERMS, "tr_information")
    run = make_run(tmp_path, bridge=False)
    evaluate(settings(oracle=False), run)
    assert "information (nats)" in run.path("evaluate", "report.md").read_text(encoding="utf-8")


def test_a_student_that_sees_another_encoding_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt", "shot")
    save_classifier(run, "transfer/shot", 3, replace(ENCODING, kind="relative"))
    evaluate(settings(oracle=False), run)
    notes = {method: row["note"] for (method, _), row in _rows(run).items()}
    assert "relative" in notes["shot"]
    assert ENCODING.kind in notes["shot"]
    assert notes["tgkt"] is notes["bridge-only"] is notes["source-encoded"] is None


def test_without_labels_there_is_no_accuracy(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt", labelled=False)
    evaluate(settings(), run)
    assert _results(run)["rows"] == []
    text = run.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "test.h5 holds no labels" in text
    first = text.partition("\n## ")[0]
    assert "RGB model, encoded" in first, "what the student is compared with"
    assert "RGB model " not in first.partition("RGB partner: ")[2]
    assert "TI agreement %" in text
    tables = run.path("evaluate", "report.tex").read_text(encoding="utf-8")
    assert r"TI agreement \%" in tables
    assert "source-adapted" in tables
    assert not run.path("evaluate", "oracle").exists()
    assert not run.path("evaluate", "confusion.png").exists()
    assert run.path("evaluate", "gallery-tr.png").is_file()


def test_with_labels_the_last_line_is_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "tgkt")
    digest = load_model(run.path("bridge")).digest
    finish(run, "transfer/tgkt", {"bridge": digest}, [], verdict="better")
    for _ in range(2):  # also where nothing has changed
        evaluate(settings(oracle=False, pictures=False), run)
        last = " ".join(capsys.readouterr().err.split()).rpartition("evaluate: ")[2]
        accuracy = f"{100 * _rows(run)['tgkt', 'test']['accuracy']:.1f}"
        assert last.startswith(f"The student recognises {accuracy} % of the depth images; your RGB")
    assert "ship the student" in run.record("evaluate")["verdict"]


def test_with_labels_nothing_is_listed_to_label(evaluated: Run) -> None:
    assert not list(evaluated.folder.glob(LISTS))


def _list(run: Run) -> Path:
    return list_to_label(run, "tgkt")


def _listed(run: Run) -> list[dict[str, str]]:
    with _list(run).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_few_labels_of_the_user_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "tgkt", labelled=False)
    evaluate(settings(pictures=False), run)
    told = " ".join(capsys.readouterr().err.split())
    assert "lists images on which the student tgkt and your RGB model differ" in told
    assert "Run `sfkt evaluate`." not in run.record("evaluate")["headline"], "it runs"
    report = run.path("evaluate", "report.md").read_text(encoding="utf-8")
    assert "Label the whole list before" in report
    with run.path("evaluate", "predictions.csv").open(encoding="utf-8", newline="") as file:
        predicted = {row["name"]: row for row in csv.DictReader(file) if row["split"] == "target"}
    listed = _listed(run)
    differ = [name for name, row in predicted.items() if row["tgkt"] != row["source-encoded"]]
    assert {row["name"] for row in listed} == set(differ)
    assert all(row["label"] == "" for row in listed)

    for winner, word in (("tgkt", "ship the student"), ("source-encoded", "keep your RGB model")):
        labels = {name: predicted[name][winner].removeprefix("'") for name in differ}
        lines = [f"{name};{label}\r\n" for name, label in labels.items()]  # as a spreadsheet does
        text = "\ufeffname;label\r\n" + "".join(lines[1:]) + f"{differ[0]};\r\n"
        _list(run).write_text(text, encoding="utf-8", newline="")
        evaluate(settings(pictures=False), run)
        sentence = run.record("evaluate")["verdict"]
        assert f"Of {len(differ) - 1} images that you labelled" in sentence
        report = run.path("evaluate", "report.md").read_text(encoding="utf-8")
        assert "holds only if you labelled the whole list" in report
        assert word in sentence
        assert sentence.replace("<", "\\<") in run.path("evaluate", "report.md").read_text("utf-8")
        assert _list(run).read_bytes().decode() == text
        assert _results(run)["rows"] == []
        done = run.path("evaluate", "done.json").stat().st_mtime_ns
        evaluate(settings(pictures=False), run)
        assert run.path("evaluate", "done.json").stat().st_mtime_ns == done
        assert word in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,label\ntarget-0,disk\n", "target-0 has the label 'disk', expected one of disc, "),
        ("name,label\nother-0,disc\n", "other-0 is none of the 30 target images"),
        ("name,label\ntarget-0,disc\ntarget-0,=cross\n", "target-0 has the labels disc, =cross"),
        ("image,label\ntarget-0,disc\n", "columns image, label, expected name, label"),
        ("name,label\ntarget-0\n", "line 2: 1 columns, the first line has 2"),
        ("name,label\ntarget-0,\xe9\n", "is not in UTF-8: save it as UTF-8"),
        ("name,label\n".encode("utf-16").decode("latin-1"), "is not in UTF-8: save it as UTF-8"),
    ],
)
def test_wrong_labels_of_the_user_are_refused(tmp_path: Path, text: str, told: str) -> None:
    run = make_run(tmp_path, "tgkt", labelled=False)
    _list(run).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=told) as error:
        evaluate(settings(pictures=False), run)
    assert _list(run).name in str(error.value)
    assert _list(run).read_text(encoding="latin-1") == text
    assert not run.path("evaluate", "done.json").exists()


def test_labels_in_other_capitals_count_where_one_class_is_meant(tmp_path: Path) -> None:
    split = _evaluation(make_run(tmp_path, labelled=False)).splits["target"]
    own = {"target-3": "MUG", "target-5": "cup"}
    rows, labels = match_own_labels(Path("list.csv"), own, split, ["Cup", "Mug", "cup"])
    assert (rows.tolist(), labels.tolist()) == ([3, 5], [1, 2])
    with pytest.raises(DataError, match="target-4 has the label 'CUP', expected one of Cup, Mug"):
        match_own_labels(Path("list.csv"), {"target-4": "CUP"}, split, ["Cup", "Mug", "cup"])


def test_labels_for_one_student_do_not_judge_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "tgkt", labelled=False), settings(pictures=False)
    evaluate(config, run)
    first = _list(run)
    first.unlink()
    evaluate(config, run)
    assert _listed(run), "a list that was deleted is written again"
    names = [f"target-{row}" for row in range(30)]
    text = "name,label\n" + "".join(f"{name},disc\n" for name in names)
    first.write_text(text, encoding="utf-8")
    capsys.readouterr()
    evaluate(config, run)
    assert "lists images on which" not in capsys.readouterr().err, "all have a label"
    assert "that you labelled" in run.record("evaluate")["verdict"]

    digest = load_model(run.path("bridge")).digest
    save_classifier(run, "transfer/tgkt", 77, ENCODING)
    finish(run, "transfer/tgkt", {"bridge": digest}, [])
    evaluate(config, run)
    assert "that you labelled" not in run.record("evaluate")["verdict"]
    assert _list(run) != first
    assert all(row["label"] == "" for row in _listed(run))
    assert first.read_text(encoding="utf-8") == text
    for path in (first, _list(run)):
        path.write_text("name\nx\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"{_list(run).name}: columns name, expected name, label"):
        evaluate(config, run)
    assert run.path("evaluate", "done.json").exists(), "the earlier report stays"
    _list(run).unlink()
    evaluate(config, run)  # the list of the earlier student stops nothing


def test_where_the_data_have_labels_those_of_the_user_are_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt")
    for text in ("name,label\nnobody,disc\n", "name\nnobody\n"):
        _list(run).write_text(text, encoding="utf-8")
        evaluate(settings(pictures=False, oracle=False), run)
        assert "that you labelled" not in run.record("evaluate")["verdict"]


def test_the_files_of_images_are_listed_and_ids_are_taken_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "tgkt", labelled=False), settings(pictures=False)
    ids = [f"target-{row}" for row in range(30)]
    files = [f"tr/target/hall {row // 2}/IMG {row}.png " for row in range(30)]
    attrs = {"dataset": "made", "modality": "depth", "unit": "mm", "classes": CLASSES}
    names = {"id": ids, "name": [f"tr_{row}-5d75e7" for row in range(30)], "path_target": files}
    names |= {"group": [f"hall {row // 2}" for row in range(30)]}
    columns = {f"names/{name}": text_column(texts) for name, texts in names.items()}
    with writing(run.test_store, attrs, columns):
        pass
    evaluate(config, run)
    assert {row["name"] for row in _listed(run)} <= set(files)
    rows = [(files[3], "disc"), (names["name"][4], "disc"), (ids[5], "=cross")]
    lines = [f"{name.strip()},{label}\n" for name, label in rows]
    _list(run).write_text("name,label\n" + "".join(lines), encoding="utf-8")
    evaluate(config, run)
    assert "Of 3 images that you labelled" in run.record("evaluate")["verdict"]
    capsys.readouterr()
    rest = [f"{name},\n" for name in files if name not in (files[3], files[4], files[5])]
    _list(run).write_text("name,label\n" + "".join(lines + rest), encoding="utf-8")
    evaluate(config, run)
    told = capsys.readouterr().err
    assert "may be chance" in told or "are needed" in told
    assert "lists images on which" not in told, "the others show none of the classes"


def test_a_verdict_on_what_has_changed_since_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "tgkt", labelled=False), settings(pictures=False)
    digest = load_model(run.path("bridge")).digest
    for used, kept, word, note in (
        (digest, False, "ship the student", None),
        (digest, True, "ship the student", "the student was judged worse"),
        ("another", False, "cannot tell", "made from an earlier bridge"),
    ):
        inputs = {"bridge": used}
        finish(run, "transfer/tgkt", inputs, [], verdict="better", untouched_kept=kept)
        run.path("evaluate", "done.json").unlink(missing_ok=True)
        capsys.readouterr()
        evaluate(config, run)
        assert word in run.record("evaluate")["verdict"]
        warned = " ".join(capsys.readouterr().err.split())
        report = run.path("evaluate", "report.md").read_text(encoding="utf-8")
        assert ("warning: tgkt: " in warned) == (note is not None)
        if note:
            assert note in warned
            assert note in report.partition("\n## ")[0]


@pytest.mark.parametrize(
    ("method", "figures"), [("distill", {}), ("tgkt", {"follows_bridge": True})]
)
def test_that_a_student_of_the_bridge_is_better_is_not_believed(
    tmp_path: Path, method: str, figures: dict[str, bool]
) -> None:
    run = make_run(tmp_path, method, labelled=False)
    digest = load_model(run.path("bridge")).digest
    finish(run, f"transfer/{method}", {"bridge": digest}, [], verdict="better", **figures)
    evaluate(settings(pictures=False), run)
    assert "the bridge taught it to the end" in run.record("evaluate")["verdict"]


@pytest.mark.parametrize("used", ["the same", "another"])
@pytest.mark.parametrize("method", ["distill", "tgkt"])
def test_a_student_that_the_bridge_taught_to_the_end_is_not_judged_by_it(
    tmp_path: Path, method: str, used: str
) -> None:
    """Neither by the verdict of its training, nor by a new one after the bridge has changed."""
    run = make_run(tmp_path, method, labelled=False)
    inputs = {"bridge": load_model(run.path("bridge")).digest if used == "the same" else used}
    finish(run, f"transfer/{method}", inputs, [], follows_bridge=True)
    evaluate(settings(pictures=False), run)
    assert "the bridge taught it to the end" in run.record("evaluate")["verdict"]


def test_a_report_of_an_earlier_version_ends_with_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "tgkt", labelled=False), settings(pictures=False)
    evaluate(config, run)
    record = run.record("evaluate")
    for name in ("headline", "to_label"):
        del record[name]
    write_record(run.path("evaluate", "done.json"), record)
    capsys.readouterr()
    evaluate(config, run)
    assert "evaluate: Without labels, sfkt cannot tell" in " ".join(capsys.readouterr().err.split())


def test_a_single_label_is_enough_for_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, "tgkt")
    attrs = {"dataset": "made", "modality": "depth", "unit": "mm", "classes": CLASSES}
    label = {"labels/id": text_column(["target-0"]), "labels/label": np.array([0])}
    with writing(run.test_store, attrs, label):
        pass
    evaluate(settings(), run)
    assert _rows(run)["tgkt", "target"]["n"] == 1
    assert _rows(run)["tgkt", "target"]["accuracy_ci95"] == [0, 1]
    assert 'class="box open"' in run.path("evaluate", "report.html").read_text(encoding="utf-8")
    assert "1 training image of 1 group" in run.path("evaluate", "report.md").read_text("utf-8")


def test_an_oracle_that_fails_leaves_the_rest_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*args: object) -> None:
        raise RunError("oracle: the loss is nan")

    monkeypatch.setattr("sfkt_cli.stages.evaluate.oracle", diverge)
    run = make_run(tmp_path, "tgkt")
    evaluate(settings(), run)
    assert "the oracle is left out" in capsys.readouterr().err
    assert {name for name, _ in _rows(run)} >= {"tgkt", "source-rgb"}


def test_pairs_that_were_trained_on_are_called_so(tmp_path: Path) -> None:
    usual = settings(oracle=False)
    for recordings, inputs, told in (
        (1, {}, "trained on them, too"),  # none can be held out
        (12, {}, "Nothing was trained on these pairs"),
        (12, {"warm start": "a digest"}, "started from may have been trained on some of them"),
    ):
        run = make_run(tmp_path / told, "tgkt", recordings=recordings)
        finish(run, "bridge", inputs, [])
        evaluate(usual, run)
        assert told in run.path("evaluate", "report.md").read_text(encoding="utf-8")


def test_source_alone_can_be_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path, bridge=False)
    evaluate(settings(oracle=False), run)
    assert {name for name, _ in _rows(run)} == {
        "source-only",
        "source-encoded",
        "source-adapted",
        "source-rgb",
    }
    assert not run.path("evaluate", "gallery-ti.png").exists()


def test_pictures_of_an_earlier_state_do_not_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    evaluate(settings(oracle=False), run, run.path("evaluate", "table.md"))
    own = run.path("evaluate", "poster.png")
    own.write_text("the user's own")
    run.path("bridge", "done.json").unlink()
    evaluate(settings(oracle=False), run)
    assert own.is_file()
    assert run.path("evaluate", "table.md").is_file()
    assert not {own.name, "table.md"} & set(run.record("evaluate")["outputs"])
    assert not run.path("evaluate", "gallery-ti.png").exists()
    assert run.path("evaluate", "gallery-tr.png").is_file()


@pytest.mark.parametrize("name", ["table.txt", "table"])
def test_an_unknown_suffix_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"\.md, \.html, \.json, \.tex"):
        evaluate(settings(), run, tmp_path / name)
    assert not run.path("evaluate").exists()


def test_stages_that_are_missing_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match="sfkt prepare"):
        evaluate(settings(), run)
    make_stores(run.path("prepare"))
    write_record(run.path("prepare", "done.json"), {"stage": "prepare"})
    with pytest.raises(RunError, match="sfkt source"):
        evaluate(settings(), run)


def test_stores_of_two_runs_are_refused(tmp_path: Path) -> None:
    make_stores(tmp_path)
    make_stores(tmp_path / "other", labelled=False)
    both = read_splits(open_store(tmp_path / "transfer.h5"), open_store(tmp_path / "test.h5"))
    assert [split.name for split in both] == ["target", "test"]
    assert both[0].labels.tolist() == [row % 3 for row in range(30)]
    with pytest.raises(DataError, match="does not belong"):
        read_splits(_renamed(tmp_path), open_store(tmp_path / "test.h5"))
    transfer = open_store(tmp_path / "transfer.h5")
    other = replace(transfer, attrs={**transfer.attrs, "parts_sha256": "of another split"})
    with pytest.raises(DataError, match="prepared from other data or with other settings"):
        read_splits(other, open_store(tmp_path / "test.h5"))


def _renamed(folder: Path) -> Any:
    """transfer.h5 with other sample ids."""
    store = open_store(folder / "transfer.h5")
    _, depth = images(np.random.default_rng(1), np.zeros(2, np.int64))
    columns = {
        "target/target": depth,
        "target/id": text_column(["a", "b"]),
        "target/group": text_column(["a", "b"]),
    }
    attrs = {k: store.attrs[k] for k in ("dataset", "modality", "unit", "classes")}
    with writing(folder / "renamed.h5", attrs, columns):
        pass
    return open_store(folder / "renamed.h5")
