"""`sfkt transfer`: make the student for the target sensor, by TGKT or one of its peers."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sfkt_cli.console import say, warn
from sfkt_cli.data.images import choose_encoding, sample_rows
from sfkt_cli.data.sensor import describe_images, prepared_sensor
from sfkt_cli.data.store import Store, open_store, spread
from sfkt_cli.errors import DataError, RunError
from sfkt_cli.evaluation.models import outdated
from sfkt_cli.evaluation.verdict import TO_LABEL, Judgement, Verdict, advice, rows_to_label, verdict
from sfkt_cli.methods import find_method, label_free
from sfkt_cli.methods.objective import TeacherOutputs, TransferObjective
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import (
    Saved,
    check_classes,
    load_earlier,
    load_model,
    save_model,
    warm_start,
)
from sfkt_cli.models.translators import Front
from sfkt_cli.scores import fit_temperature
from sfkt_cli.settings.config import Config, method_settings
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.batches import settle_batches
from sfkt_cli.training.loop import Progress, Training
from sfkt_cli.training.predicting import FEWEST, View, predict_rows, warn_of_collapse
from sfkt_cli.training.recipes import SCHEDULES, classifier_optimizer, start_student
from sfkt_cli.training.runtime import make_runtime, seed_all

STRANGER_ROWS = 2000
"""TI images, at most, that tell which target images look like them."""


def transfer(config: Config, run: Run) -> None:
    """Train the student; writes ``transfer/<method>/model.*``.

    Raises:
        ConfigError: The method is unknown, or has no section of settings.
        RunError: A stage before it has not been run, or the bridge was made from other data or
            another source model.
        DataError: The method needs TI pairs and there are none.
    """
    method = config.transfer.method
    objective_class = find_method(method)
    run.require("prepare")
    source_folder = run.require("source")
    store, sensor = open_store(run.transfer_store), prepared_sensor(run)
    if objective_class.needs_ti and store.count("ti") == 0:
        raise DataError(
            f"{store.path} holds no TI pairs, and {method} needs them: record some, or use "
            "`sfkt transfer --method shot`"
        )
    runtime = make_runtime(config.runtime, dry=run.dry)
    saved = load_model(source_folder, runtime.device)
    check_classes(saved.card.classes, store)
    inputs = {"transfer.h5": store.digest, "source": saved.digest}
    translator: Saved | None = None
    if objective_class.needs_bridge:
        translator = load_model(run.require("bridge"), runtime.device)
        inputs["bridge"] = translator.digest
    start = config.training.warm_start
    earlier, digest = load_earlier(start, run, f"transfer/{method}", runtime.device)
    inputs |= digest
    with run.open(f"transfer/{method}", config, inputs) as stage:
        if stage is None:
            say(f"transfer: {method} is already done in {run.path('transfer', method)}")
            return
        if translator is not None:
            now = {name: inputs[name] for name in ("transfer.h5", "source")}
            if note := outdated("bridge", run.record("bridge"), now):
                raise RunError(f"{run.path('bridge')} was {note}")

        source = freeze(saved.classifier)
        front = translator if objective_class.translated else None
        encoding = choose_encoding(config.encoding, store.modality, sample_rows(store))
        if front is not None:
            encoding = front.encoding_of("bridge")
        pairs = label_free.scoring_pairs(store, View(runtime, source))
        began = time.monotonic()
        outputs = TeacherOutputs(
            store, source, translator, encoding, runtime, pairs, ti=objective_class.needs_ti
        )
        seed_all(config.seed, "transfer", method)
        student, architecture = _student(source, saved, front, earlier)
        runtime.synchronised(student)
        objective = objective_class(student, outputs, config)
        runtime.place(objective)
        preparing = time.monotonic() - began  # outputs of teachers, statistics, banks

        view, pretrained = View(runtime, student, encoding), saved.card.pretrained
        progress = _fit(stage, store, objective, view, pairs, pretrained=pretrained)

        untouched = start_student(source).eval()
        judged, logits, strangers = _judge(store, objective, untouched, config)
        facts = objective.facts()  # every process takes part
        kept = judged.word != "worse" or not objective.keep_untouched
        if not kept:
            student, view = untouched, View(runtime, untouched, encoding)
            warn(f"{method}: the student was judged worse, so the source model's weights are kept")
        else:
            warn_of_collapse(logits.cpu(), "the student", "transfer")
        temperature = calibrated(pairs, view)

        if not runtime.main:
            return
        save_model(
            stage, student, kind="classifier", architecture=architecture,
            classes=saved.card.classes, encoding=encoding, method=method, temperature=temperature,
            sensor=asdict(sensor), images=describe_images(sample_rows(store), encoding.missing),
        )  # fmt: skip
        stage.finish(
            seconds=preparing + progress.seconds,
            best_epoch=progress.best_epoch + 1,
            strangers=strangers,
            untouched_kept=not kept,
            verdict=judged.word,
            follows_bridge=objective.follows_bridge,
            **facts,
            peak_memory_mb=round(runtime.peak_memory_mb(), 1),
        )
        say(f"{method}: {judged.sentence}")


def _student(
    source: Classifier,  # frozen
    saved: Saved,  # the source model, as it was read
    front: Saved | None,  # the translator that is to stand in front
    earlier: Saved | None,  # the student of the run ``training.warm_start``
) -> tuple[Classifier, dict[str, Any]]:
    """The student before its training, and the arguments of its class."""
    architecture, student = dict(saved.card.architecture), start_student(source)
    if front is not None:
        architecture["front"] = front.card.architecture
        student.front = Front(front.module, architecture["front"]["channels"])
    if earlier is not None:
        warm_start(earlier, student, architecture, saved)
    return student, architecture


def _fit(
    stage: Stage,
    store: Store,
    objective: TransferObjective,
    view: View,
    pairs: label_free.ScoringPairs | None,
    *,
    pretrained: bool,  # whether the source model's weights are
) -> Progress:
    """Train the student of an objective; the scores of each epoch look at it through ``view``."""
    config, runtime, student = stage.config, view.runtime, objective.student
    method, settings = config.transfer.method, config.transfer
    own = method_settings(config, method)
    batches = settle_batches(stage, store, objective.needs_images, runtime, objective)
    rates = own.rates(pretrained=pretrained, bottleneck=student.has_bottleneck)
    optimizer = classifier_optimizer(
        student, *rates, settings.weight_decay, objective.parameters(recurse=False)
    )
    return Training(
        method, stage, objective, batches, optimizer, runtime, epochs=settings.epochs,
        steps=batches.steps, images_per_step=batches.images_per_step,
        schedule=SCHEDULES[own.schedule], keep=student,
        scores=label_free.epoch_scorer(store, pairs, view, stage.folder),
        select=label_free.selector(config, ti=batches.paired),
    ).fit()  # fmt: skip


def _judge(
    store: Store, objective: TransferObjective, untouched: Classifier, config: Config
) -> tuple[Judgement, Tensor, float | None]:
    """Compare an objective's student, in inference mode from now on, with the untouched model.

    Returns:
        The judgement, the student's logits (N, K), and the share of strangers.
    """
    outputs, follows_bridge = objective.outputs, objective.follows_bridge
    seed = config.seed
    features, untouched_logits = outputs.predict_all(untouched)
    _, logits = outputs.predict_all(objective.student.eval())
    ours, before = (part.argmax(dim=1).cpu().numpy() for part in (logits, untouched_logits))
    groups = store.strings("target/group")
    word: Verdict = "cannot tell"
    if objective.needs_bridge:
        word = verdict(
            ours, before, outputs.bridged_logits.argmax(dim=1).cpu().numpy(),
            classes=logits.shape[1], groups=groups, seed=seed, follows_bridge=follows_bridge,
        )  # fmt: skip
    told = advice(word, outputs.encoding.kind, ours, before, groups, follows_bridge=follows_bridge)
    if word == "cannot tell" and len(rows_to_label(ours, before, groups, seed=seed)):
        told += (
            f" Run `sfkt evaluate --method {config.transfer.method}`. If you have no labels, it "
            f"lists up to {TO_LABEL} images to label."
        )
    strangers = share_of_strangers(store, untouched, features, outputs)
    return Judgement(word, told), logits, strangers


def share_of_strangers(
    store: Store, untouched: Classifier, features: Tensor, outputs: TeacherOutputs
) -> float | None:
    """About how many target images show none of the classes; None for few images."""
    if not store.count("ti"):
        return None
    ti_target = store["ti/target"][spread(store.count("ti"), STRANGER_ROWS)]
    ti_features, _ = outputs.predict(ti_target, untouched)
    share = label_free.stranger_share(features.cpu(), ti_features)
    return None if share is None else round(share, 3)


def calibrated(pairs: label_free.ScoringPairs | None, view: View) -> float:
    """The student's temperature; 1 if too few TI pairs were held out.

    The class that the source model names for the RGB image of a held-out pair stands for the truth,
    weighted by the model's confidence.
    """
    if pairs is None or not pairs.unseen or len(pairs.rows) < FEWEST:
        return 1.0
    _, logits = predict_rows(pairs.target, view)
    sure, partners = pairs.logits.softmax(dim=1).max(dim=1)
    return fit_temperature(logits.numpy(), partners.numpy(), sure.numpy())
