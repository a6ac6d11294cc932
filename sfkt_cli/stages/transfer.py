"""`sfkt transfer`: make the student for the target sensor, by TGKT or one of its peers."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sfkt_cli.console import say, warn
from sfkt_cli.data.images import Encoding, choose_encoding, sample_rows
from sfkt_cli.data.sensor import describe_images, prepared_sensor
from sfkt_cli.data.store import Store, open_store, spread
from sfkt_cli.errors import DataError, RunError
from sfkt_cli.evaluation.models import outdated
from sfkt_cli.evaluation.verdict import Judgement, Verdict, advice, verdict
from sfkt_cli.methods import find_method, label_free
from sfkt_cli.methods.label_free import Judge
from sfkt_cli.methods.objective import TeacherOutputs
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.frozen import fold_batch_norms
from sfkt_cli.models.saving import (
    Saved,
    check_classes,
    classifier_of,
    load_earlier,
    load_model,
    save_model,
    warm_start,
)
from sfkt_cli.models.translators import Front
from sfkt_cli.scores import fit_temperature
from sfkt_cli.settings.config import Config, method_settings
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.loop import Training
from sfkt_cli.training.pairs import held_out_pairs, settle_batches
from sfkt_cli.training.predicting import (
    FEWEST,
    View,
    adapt_batch_norms,
    look_for_collapse,
    predict_rows,
)
from sfkt_cli.training.recipes import SCHEDULES, classifier_optimizer
from sfkt_cli.training.runtime import Runtime, make_runtime, seed_all

BATCH_NORM_MOMENTUM = 0.1
"""Smallest share of a batch in the student's running statistics; torch's default."""
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
    own = method_settings(config, method)
    run.require("prepare", "sfkt prepare NAME")
    source_folder = run.require("source", "sfkt source")
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
        translator = load_model(run.require("bridge", "sfkt bridge"), runtime.device)
        inputs["bridge"] = translator.digest
    earlier = load_earlier(
        config.training.warm_start, f"transfer/{method}", f"sfkt transfer --method {method}",
        runtime.device,
    )  # fmt: skip
    if earlier is not None:
        inputs["warm start"] = earlier.digest
    with run.open(f"transfer/{method}", config, inputs) as stage:
        if stage is None:
            say(f"transfer: {method} is already done in {run.path('transfer', method)}")
            return
        if translator is not None:
            now = {name: inputs[name] for name in ("transfer.h5", "source")}
            if note := outdated("bridge", run.record("bridge"), now):
                raise RunError(f"{run.path('bridge')} was {note}")
        source = freeze(classifier_of(saved.module))
        encoding = choose_encoding(config.encoding, store.modality, sample_rows(store))
        architecture = dict(saved.card.architecture)
        front = translator if objective_class.translated else None
        if front is not None:
            encoding = front.encoding_of("bridge")
            architecture["front"] = front.card.architecture
        pairs = held_out_pairs(store)
        outputs = look_through_frozen(
            store, source, translator, encoding, runtime, pairs, ti=objective_class.needs_ti
        )
        judge = Judge(store, pairs[1], source, runtime)
        seed_all(config.seed, "transfer", method)
        student = start_student(source)
        if front is not None:
            student.front = Front(front.module, architecture["front"]["channels"])
        if earlier is not None:
            warm_start(earlier, student, architecture, saved)
        runtime.synchronised(student)
        view = View(runtime, student, encoding)
        objective = objective_class(student, outputs, config)
        runtime.place(objective)
        settings = config.transfer
        rates = own.rates(pretrained=saved.card.pretrained)
        batches = settle_batches(
            config, store, stage.folder, runtime, objective, ti_rgb=False, ti=objective.needs_ti
        )
        fitted = Training(
            batches.plan(stage, method, settings.epochs, objective.weights),
            objective,
            batches,
            classifier_optimizer(
                student, *rates, settings.weight_decay, objective.parameters(recurse=False)
            ),
            runtime,
            schedule=SCHEDULES[own.schedule],
            keep=student,
            begin_epoch=objective.begin_epoch,
            after_step=objective.after_step,
            scores=partial(judge.scores, view, stage.folder),
        ).fit()
        untouched = start_student(source).eval()
        untouched_features, untouched_logits = outputs.predict_all(untouched)
        judged = compare(
            store, student.eval(), untouched_logits, outputs, encoding.kind, config.seed
        )
        facts = objective.facts()  # every process takes part
        strangers = share_of_strangers(store, untouched, untouched_features, encoding, runtime)
        kept = judged.word != "worse" or not getattr(own, "keep_untouched", False)
        if not kept:
            student, view = untouched, View(runtime, untouched, encoding)
            warn(f"{method}: the student was judged worse, so the source model's weights are kept")
        else:
            look_for_collapse(store, view, "transfer")
        temperature = calibrated(judge, view)
        if not runtime.main:
            return
        save_model(
            stage.folder, student, kind="classifier", architecture=architecture,
            classes=saved.card.classes, encoding=encoding, inputs=inputs, seed=config.seed,
            method=method, temperature=temperature, sensor=asdict(sensor),
            images=describe_images(sample_rows(store), encoding.missing),
        )  # fmt: skip
        stage.finish(
            seconds=fitted.seconds,
            best_epoch=fitted.best_epoch + 1,
            strangers=strangers,
            untouched_kept=not kept,
            verdict=judged.word,
            **facts,
            peak_memory_mb=round(runtime.peak_memory_mb(), 1),
        )
        say(f"{method}: {judged.sentence}")


def start_student(source: Classifier) -> Classifier:
    """A copy of the frozen source model that may be trained.

    Its running statistics follow the target images within an epoch: some published networks keep
    99 % of the old ones in each step, so a student of a few hundred steps would be predicted with
    statistics that it has left behind.
    """
    student = copy.deepcopy(source)
    for module in student.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, BATCH_NORM_MOMENTUM)
    student.requires_grad_(True)
    return student.train()


def look_through_frozen(
    store: Store,
    source: Classifier,
    translator: Saved | None,
    encoding: Encoding,
    runtime: Runtime,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    ti: bool,
) -> TeacherOutputs:
    """Ask the frozen models once about all target images, with ``ti`` also about the pairs.

    ``pairs`` are the rows of the pairs that are trained on, and of those that only score. Where
    they overlap, nothing proves that the bridge sees well, and its lead is 0.
    """
    targets = store["target/target"]
    quick = fold_batch_norms(source, targets.shape[1])
    trained, held_out = pairs
    groups = np.array(store.strings("ti/group"))[held_out].tolist()

    def predict(images: NDArray[Any], student: Classifier) -> tuple[Tensor, Tensor]:
        training = student.training
        view = View(runtime, student.eval(), encoding)
        features, logits = predict_rows(images, view, flips=True)
        student.train(training)
        return features, logits

    def predict_all(student: Classifier) -> tuple[Tensor, Tensor]:
        features, logits = predict(targets, student)
        return features.to(runtime.device), logits.to(runtime.device)

    ti_features = bridged_logits = held_out_features = None
    if ti:
        partners, _ = predict_rows(store["ti/rgb"], View(runtime, quick), flips=True)
        ti_features = partners.to(runtime.device)
    if translator is not None:
        bridge = View(runtime, quick, translator.encoding_of("bridge"), freeze(translator.module))
        _, bridged = predict_rows(targets, bridge, flips=True)
        bridged_logits = bridged.to(runtime.device)
        if ti and not np.isin(held_out, trained).any():
            ti_target = store["ti/target"][held_out]
            held_out_features, _ = predict_rows(ti_target, bridge, flips=True)

    def adapt(student: Classifier) -> None:
        adapt_batch_norms(targets, View(runtime, student, encoding))

    def bridge_lead(student: Classifier) -> float:
        if held_out_features is None or ti_features is None:
            return 0.0
        features, _ = predict(store["ti/target"][held_out], student)
        partners = ti_features.cpu()[held_out]
        return label_free.bridge_lead(held_out_features, features, partners, groups)

    return TeacherOutputs(
        source=source,
        encoding=encoding,
        targets=len(targets),
        bridged_logits=bridged_logits,
        adapt=adapt,
        bridge_lead=bridge_lead,
        ti_features=ti_features,
        predict_all=predict_all,
    )


def compare(
    store: Store,
    student: Classifier,
    untouched_logits: Tensor,
    outputs: TeacherOutputs,
    encoding: str,
    seed: int,
) -> Judgement:
    """Whether the student is better than the untouched source model, by all target images.

    ``encoding`` is the name of that of target images.
    """
    groups, classes = store.strings("target/group"), untouched_logits.shape[1]
    bridged = outputs.bridged_logits
    word: Verdict = "cannot tell"
    ours, untouched = (
        logits.argmax(dim=1).cpu().numpy()
        for logits in (outputs.predict_all(student)[1], untouched_logits)
    )
    if bridged is not None:
        third = bridged.argmax(dim=1).cpu().numpy()
        word = verdict(ours, untouched, third, classes=classes, groups=groups, seed=seed)
    return Judgement(word, advice(word, encoding, ours, untouched, groups))


def share_of_strangers(
    store: Store, untouched: Classifier, features: Tensor, encoding: Encoding, runtime: Runtime
) -> float | None:
    """At most about how many target images show none of the classes; None for few images."""
    if not store.count("ti"):
        return None
    view = View(runtime, untouched, encoding)
    ti_target = store["ti/target"][spread(store.count("ti"), STRANGER_ROWS)]
    ti_features, _ = predict_rows(ti_target, view, flips=True)
    share = label_free.stranger_share(features.cpu(), ti_features)
    return None if share is None else round(share, 3)


def calibrated(judge: Judge, view: View) -> float:
    """The student's temperature; 1 where there are too few TI pairs to tell.

    What the source model says of the RGB image of a held-out TI pair stands for the truth, and
    counts as much as it is sure.
    """
    if judge.partners is None or len(judge.partners[0]) < FEWEST:
        return 1.0
    _, logits = judge.look_at_pairs(view)
    sure, partners = judge.partners[1].softmax(dim=1).max(dim=1)
    return fit_temperature(logits.numpy(), partners.numpy(), sure.numpy())
