"""`sfkt evaluate`: the only stage that sees target labels; tables and pictures of all methods."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from sfkt_cli.console import say, track, warn
from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import ConfigError, RunError, first_line
from sfkt_cli.evaluation import predictions
from sfkt_cli.evaluation.html import to_html
from sfkt_cli.evaluation.labelled import list_to_label, read_own_labels, read_splits
from sfkt_cli.evaluation.models import (
    Predictor,
    costs,
    finished_methods,
    load_models,
    model_digests,
    predictors_of,
    source_on_rgb,
)
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.evaluation.report import (
    Report,
    Results,
    read_results,
    show,
    to_csv,
    to_latex,
    to_markdown,
)
from sfkt_cli.evaluation.sections import facts, headline, images_to_label, judge, made, sections
from sfkt_cli.files import sha256_file, sha256_json, write_json, write_text
from sfkt_cli.methods import label_free
from sfkt_cli.models.classifier import freeze
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.settings.config import Config, RuntimeConfig, as_dict, fixed_batch_size
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import WRITES, Stage
from sfkt_cli.training.predicting import View
from sfkt_cli.training.recipes import fit_labels, start_student
from sfkt_cli.training.runtime import Runtime, make_runtime

COPIES = {
    ".md": "report.md", ".html": "report.html", ".json": "results.json", ".tex": "report.tex",
}  # fmt: skip
"""Suffix of ``--report`` to the file that is copied."""


def evaluate(config: Config, run: Run, report: Path | None = None) -> None:
    """Measure every finished model of a run; writes ``evaluate/``.

    A rerun starts anew if a model, the data or a setting has changed; it keeps the oracle. The
    report is also written to the path ``report``; its suffix chooses Markdown, HTML, JSON or LaTeX.

    Raises:
        ConfigError: The report's suffix is none of these.
        RunError: prepare or source has not been run.
        DataError: A store or a model is missing or damaged, or the source model has other classes.
    """
    if report is not None:
        check_suffix(report)
    run.require("prepare")
    run.require("source")
    stores = open_stores(run)
    with run.open("evaluate", config, inputs_of(config, run, *stores), renew=True) as stage:
        if stage is None:
            say(f"evaluate: nothing changed since {run.path('evaluate', 'report.md')}")
        else:
            _measure(config, run, stage, *stores)
    folder = run.path("evaluate")
    show(read_results(run).rows)
    say(f"evaluate: report and pictures are in {folder}")
    record = run.record("evaluate")
    if sentence := record.get("headline") or record.get("verdict"):
        say(f"evaluate: {sentence}")
    if report is not None:
        copy_report(run.output("evaluate", COPIES[report.suffix.lower()]), report)
    if record.get("to_label"):
        _ask_for_labels(run, record.get("main", ""), **record["to_label"])


def open_stores(run: Run) -> tuple[Store, Store]:
    """transfer.h5 and test.h5; raises DataError if one is missing or damaged."""
    return open_store(run.transfer_store), open_store(run.test_store)


def inputs_of(config: Config, run: Run, transfer: Store, test: Store) -> dict[str, str]:
    """Digests of everything that a report is made from.

    Raises:
        DataError: A model is missing or damaged, or a list of labels is.
    """
    models = model_digests(run)
    inputs = {store.path.name: store.digest for store in (transfer, test)} | models
    for stage in models:  # figures of a training that gave the same weights, such as its seconds
        inputs[f"{stage}/done.json"] = sha256_file(run.path(stage, "done.json"))
    labelled = test.count("labels") or (test.count("test") and "test/label" in test)
    for student in () if labelled else finished_methods(run):
        if own := read_own_labels(path := list_to_label(run, student)):
            inputs[path.name] = sha256_json(own)
    if config.evaluate.oracle:
        recipe = {
            "seed": config.seed,
            "source": as_dict(config.source),
            "epochs": oracle_epochs(config, run),
            "training": as_dict(config.training),
            "batch_size": fixed_batch_size(config.runtime),
        }
        inputs["oracle"] = sha256_json(recipe)
    return inputs


def check_suffix(report: Path) -> None:
    """Raise ConfigError if a report cannot be written under that name."""
    if report.suffix.lower() not in COPIES:
        raise ConfigError(
            f"--report {report}: the suffix chooses the format; use {', '.join(COPIES)}"
        )
    if report.is_dir():
        raise ConfigError(f"--report {report} is a folder: give the name of a file")


def copy_report(written: Path, report: Path) -> None:
    """Copy the finished report to the user's path, so that its links to pictures still work.

    Raises:
        RunError: The file cannot be written.
    """
    if report.resolve() == written.resolve():
        return
    text = written.read_text(encoding="utf-8")
    if report.suffix.lower() == ".md":
        here = Path(os.path.relpath(written.parent.resolve(), report.parent.resolve())).as_posix()
        text = re.sub(r"\]\(([\w-]+\.png)\)", rf"](<{here}/\1>)", text)
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        write_text(report, text)
    except OSError as error:
        raise RunError(f"--report {report} cannot be written: {first_line(error)}") from None


def _measure(config: Config, run: Run, stage: Stage, store: Store, test: Store) -> None:
    runtime = measuring_runtime(config.runtime)
    models = load_models(run, store, runtime)
    splits = {split.name: split for split in read_splits(store, test)}
    pairs = label_free.scoring_pairs(store, source_on_rgb(models).view)
    evaluation = _ask_all(
        Evaluation(config, run, stage.folder, store, models, splits, pairs), stage.inputs
    )
    outcomes = evaluation.outcomes
    predictions.add_ensemble(evaluation)
    predictions.look_for_collapse(evaluation)
    _add_bounds(evaluation, stage)
    predictions.measure_speeds(evaluation)
    judged = judge(evaluation)
    note = outcomes[evaluation.main_method].predictor.note
    if note and not evaluation.labelled_splits:  # with labels the first line says it
        warn(f"{evaluation.main_method}: {note}")
    answer, classes = headline(evaluation, judged), tuple(evaluation.classes)
    results = Results(dataset=store.dataset, classes=classes, rows=evaluation.rows)
    report = Report(
        dataset=store.dataset,
        rows=evaluation.rows,
        facts=facts(evaluation),
        headline=answer,
        made=made(evaluation),
        sections=sections(evaluation),
    )
    pictures = {section.picture for section in report.sections}
    for picture in {*WRITES["pictures"]} - pictures:  # an earlier report may have had more
        (stage.folder / picture).unlink(missing_ok=True)
    write_json(stage.folder / "results.json", results.model_dump(mode="json"))
    for name, text in (
        ("predictions.csv", predictions_csv(evaluation)),
        ("report.md", to_markdown(report)),
        ("report.html", to_html(report, stage.folder)),
        ("report.tex", to_latex(report)),
    ):
        write_text(stage.folder / name, text)
    path, to_label = evaluation.list_to_label, images_to_label(evaluation, judged)
    stage.finish(
        main=evaluation.main_method,
        headline=answer.text,
        tone=answer.tone,
        verdict=judged and judged.sentence,
        to_label={"name": path.name, "images": to_label} if path and to_label else None,
        methods=list(outcomes),
    )


def _ask_all(evaluation: Evaluation, inputs: Mapping[str, str]) -> Evaluation:
    """Ask all models; returns the evaluation that has their answers.

    If a student is left out, all are asked anew: what they are compared on depends on the students.
    """
    if count := len(evaluation.own_labels[0]):
        say(f"evaluate: {evaluation.list_to_label} has labels of {count} images")
    models, students = evaluation.models, len(evaluation.models.students)
    competing = predictors_of(evaluation.run, evaluation.store, models, inputs, evaluation.encoding)
    with track("evaluate", len(competing), "models") as tracker:
        for predictor in competing:
            evaluation.ask(predictor)
            tracker.advance(1, 1, predictor.method)
    if len(models.students) == students:
        return evaluation
    return _ask_all(replace(evaluation, outcomes={}), inputs)


def _ask_for_labels(run: Run, method: str, name: str, images: list[str]) -> None:
    """Name the list of images to label, unless some have labels; write it if it is missing."""
    path = run.path(name)
    if read_own_labels(path):
        return
    if not path.is_file():
        write_text(path, to_csv(("name", "label"), [(image, "") for image in images], "name"))
    say(
        f"evaluate: {path} lists images on which the student {method} and your RGB model differ: "
        "write the class behind each name (nothing if the image shows none of them), and run `sfkt "
        "evaluate` again once you have looked at all of them"
    )


def measuring_runtime(settings: RuntimeConfig, *, dry: bool = False) -> Runtime:
    """The runtime of `sfkt predict`: fp32, unless the settings name another precision."""
    changes = {"precision": "fp32"} if settings.precision == "auto" else {}
    return make_runtime(settings.model_copy(update=changes), dry=dry)


def _add_bounds(evaluation: Evaluation, stage: Stage) -> None:
    """The models that saw what no method may see: target labels, or RGB of the test images."""
    if evaluation.config.evaluate.oracle and len(evaluation.splits["target"].rows) > 1:
        try:
            evaluation.ask(oracle(evaluation, stage.inputs))
        except RunError as error:  # only a bound: the rest of the report does not wait for it
            warn(f"the oracle is left out: {error}")
    predictions.add_rgb_bound(evaluation)


def oracle(evaluation: Evaluation, inputs: Mapping[str, str]) -> Predictor:
    """The student's network trained on target images *with* labels; kept in evaluate/oracle.

    It is not a method but a bound: what the network could reach on this sensor. It starts from the
    source model's weights and is trained with its recipe, which also uses labels, for as many
    epochs as the students. ``inputs`` are those of ``evaluate``.
    """
    config, run, source = evaluation.config, evaluation.run, evaluation.models.card
    encoding = evaluation.encoding
    runtime = make_runtime(config.runtime)
    nested = Run(run.path("evaluate"))
    made_from = {name: inputs[name] for name in ("transfer.h5", "test.h5", "source")}
    made_from |= {"recipe": inputs["oracle"], "encoding": sha256_json(asdict(encoding))}
    with nested.open("oracle", config, made_from, renew=True) as stage:
        if stage is not None:
            saved = load_model(run.path("source"), runtime.device)
            model = start_student(saved.classifier)
            split = evaluation.splits["target"]
            everything = len(split.rows) == len(split.target)
            fitted = fit_labels(
                "oracle", stage, model,
                split.target if everything else split.target[split.rows], split.labels,
                lambda stored: as_rgb(encode(stored, encoding)), runtime,
                epochs=oracle_epochs(config, run),
                rates=config.source.rates(pretrained=source.pretrained),
                batch_size=fixed_batch_size(config.runtime),
            )  # fmt: skip
            save_model(
                stage, model, kind="classifier", architecture=source.architecture,
                classes=source.classes, encoding=encoding,
            )  # fmt: skip
            stage.finish(seconds=fitted.seconds, peak_memory_mb=round(runtime.peak_memory_mb(), 1))
    student = freeze(load_model(nested.path("oracle"), runtime.device).classifier)
    view = View(evaluation.models.runtime, student, encoding)  # measured as all others are
    return Predictor("oracle", view, *costs(nested.record("oracle")))


def oracle_epochs(config: Config, run: Run) -> int:
    """The largest number of epochs of the run's students; without any, that of the settings."""
    students = (run.record(f"transfer/{name}") for name in finished_methods(run))
    had = [student.get("settings", {}).get("transfer.epochs") for student in students]
    return max(filter(None, had), default=config.transfer.epochs)


def predictions_csv(evaluation: Evaluation) -> str:
    """All predictions as CSV: a line for each image, a class and a probability for each method."""
    classes, header = evaluation.classes, ["split", "id", "name", "label", "group"]
    for method in evaluation.outcomes:
        header += [method, f"{method} probability"]
    lines = []
    for name, split in evaluation.splits.items():
        for row, (sample, known_as) in enumerate(zip(split.ids, split.names, strict=True)):
            line: dict[str, str | float] = {"split": name, "id": sample, "name": known_as}
            if (label := split.truth.get(row)) is not None:
                line |= {"label": classes[label], "group": split.scenes[row]}
            for method, outcome in evaluation.outcomes.items():
                if name in outcome.probabilities:
                    answer = outcome.probabilities[name][row]
                    best = int(answer.argmax())
                    line[method] = classes[best]
                    line[f"{method} probability"] = round(float(answer[best]), 4)
            lines.append([line.get(column, "") for column in header])
    return to_csv(header, lines)
