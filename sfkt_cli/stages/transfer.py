"""`sfkt transfer`: make the student for the target sensor, by TGKT or one of its peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sfkt_cli.console import say, warn
from sfkt_cli.data.images import Encoding, choose_encoding, sample_rows
from sfkt_cli.data.sensor import describe_images
from sfkt_cli.data.store import Store, open_store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.evaluation.verdict import Verdict, advice, verdict
from sfkt_cli.methods import find_method, label_free
from sfkt_cli.methods.teacher_outputs import TeacherOutputs
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
from sfkt_cli.training.loop import fit
from sfkt_cli.training.optimizers import SCHEDULES, classifier_optimizer
from sfkt_cli.training.pairs import held_out_pairs, plan_of, remember, settle_streams
from sfkt_cli.training.predicting import (
    adapt_batch_norms,
    look_for_collapse,
    predict_rows,
    rgb_loader,
    student_loader,
    target_loader,
    through,
)
from sfkt_cli.training.runtime import Runtime, make_runtime, seed_all

BATCH_NORM_MOMENTUM = 0.1
"""Smallest share of a batch in the student's running statistics; torch's default."""


def transfer(config: Config, run: Run) -> None:
    """Train the student; writes ``transfer/<method>/model.*``.

    Raises:
        ConfigError: The method is unknown, or has no section of settings.
        RunError: A stage before it has not been run.
        DataError: The method needs TI pairs and there are none.
    """
    method = config.transfer.method
    objective_class = find_method(method)
    own = method_settings(config, method)
    run.require("prepare", "sfkt prepare NAME")
    source_folder = run.require("source", "sfkt source")
    store = open_store(run.transfer_store)
    if objective_class.needs_ti and store.count("ti") == 0:
        raise DataError(
            f"{store.path} holds no TI pairs, and {method} needs them: record some, or use "
            "`sfkt transfer --method shot`"
        )
    runtime = make_runtime(config.runtime, dry=run.dry)
    saved = load_model(source_folder, runtime.device)
    check_classes(saved.classes, store)
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
        source = freeze(classifier_of(saved.module))
        encoding = choose_encoding(config.encoding, store.modality, sample_rows(store))
        architecture = dict(saved.card["architecture"])
        front = translator if getattr(objective_class, "translated", False) else None
        if front is not None:
            encoding = front.encoding or encoding
            architecture["front"] = front.card["architecture"]
        outputs = look_through_frozen(store, source, translator, encoding, runtime, config.seed)
        seed_all(config.seed, "transfer", method)
        student = start_student(source)
        if front is not None:
            student.front = Front(front.module, architecture["front"]["channels"])
        if earlier is not None:
            warm_start(earlier, student, architecture, saved)
        runtime.synchronised(student)
        objective = objective_class(student, outputs, config)
        runtime.place(objective)
        settings = config.transfer
        rates = own.rates(pretrained=saved.pretrained)
        needs_ti = bool(objective.needs_ti)
        streams, batches = settle_streams(
            config, store, stage.folder, runtime, objective, ti_rgb=False, ti=needs_ti
        )
        plan = plan_of(
            config, streams, title=method, epochs=settings.epochs, weights=objective.weights,
            stage=stage, kinds=1 + needs_ti, ti=needs_ti,
        )  # fmt: skip
        fitted = fit(
            plan,
            objective,
            batches,
            classifier_optimizer(
                student, *rates, settings.weight_decay, objective.parameters(recurse=False)
            ),
            runtime,
            schedule=SCHEDULES[own.schedule],
            keep=student,
            begin_epoch=objective.begin_epoch,
            after_step=getattr(objective, "after_step", lambda: None),
            scores=student_scores(store, student, outputs, runtime, config.seed, stage.folder),
        )
        untouched = start_student(source).eval()
        untouched_features, untouched_logits = outputs.predict_all(untouched)
        judged = judge(student.eval(), untouched_logits, outputs, config.seed)
        facts: dict[str, float] = getattr(objective, "facts", dict)()
        strangers = share_of_strangers(store, untouched, untouched_features, encoding, runtime)
        kept = judged != "worse" or not getattr(own, "keep_untouched", False)
        if not kept:
            student = untouched
            warn(f"{method}: the student was judged worse, so the source model's weights are kept")
        load, model = student_loader(runtime, encoding), student.eval()
        look_for_collapse(store, load, model, runtime, "transfer")
        temperature = calibrated(store, student, outputs, runtime, config.seed)
        if not runtime.main:
            return
        save_model(
            stage.folder, student, kind="classifier", architecture=architecture,
            classes=saved.classes, encoding=encoding, inputs=inputs, seed=config.seed,
            method=method, temperature=temperature,
            images=describe_images(sample_rows(store), encoding.missing),
        )  # fmt: skip
        stage.finish(
            seconds=fitted.seconds,
            best_epoch=fitted.best_epoch + 1,
            strangers=strangers,
            untouched_kept=not kept,
            verdict=judged,
            **facts,
            peak_memory_mb=round(runtime.peak_memory_mb(), 1),
        )
        say(f"{method}: {advice(judged, encoding.kind)}")


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
    seed: int,
) -> TeacherOutputs:
    """Look at everything once through the frozen models."""
    targets = store["target/target"]
    quick = fold_batch_norms(source, targets.shape[1])
    load = student_loader(runtime, encoding)

    def predict(images: NDArray[Any], student: Classifier) -> tuple[Tensor, Tensor]:
        training = student.training
        features, logits = predict_rows(images, load, student.eval(), runtime, flips=True)
        student.train(training)
        return features, logits

    def predict_all(student: Classifier) -> tuple[Tensor, Tensor]:
        features, logits = predict(targets, student)
        return features.to(runtime.device), logits.to(runtime.device)

    ti_features = ti_logits = bridged_logits = None
    if store.count("ti"):
        partners = predict_rows(store["ti/rgb"], rgb_loader(runtime), quick, runtime, flips=True)
        ti_features, ti_logits = (part.to(runtime.device) for part in partners)
    held_out_features = None
    _, held_out = held_out_pairs(store, seed)
    if translator is not None:
        if translator.encoding is None:
            raise DataError("the model in bridge/ has no encoding: run `sfkt bridge --force`")
        model = through(freeze(translator.module), quick)
        bridge_load = target_loader(runtime, translator.encoding)
        _, bridged = predict_rows(targets, bridge_load, model, runtime, flips=True)
        bridged_logits = bridged.to(runtime.device)
        if ti_features is not None:
            held_out_features, _ = predict_rows(
                store["ti/target"][held_out], bridge_load, model, runtime, flips=True
            )

    def adapt(student: Classifier) -> None:
        adapt_batch_norms(targets, load, student, runtime)

    def bridge_lead(student: Classifier) -> float:
        if held_out_features is None or ti_features is None:
            return 0.0
        features, _ = predict(store["ti/target"][held_out], student)
        partners = ti_features.cpu()[held_out]
        return label_free.bridge_lead(held_out_features, features, partners)

    return TeacherOutputs(
        source=source,
        encoding=encoding,
        targets=len(targets),
        bridged_logits=bridged_logits,
        adapt=adapt,
        bridge_lead=bridge_lead,
        ti_features=ti_features,
        ti_logits=ti_logits,
        predict_all=predict_all,
    )


def judge(
    student: Classifier, untouched_logits: Tensor, outputs: TeacherOutputs, seed: int
) -> Verdict:
    """Whether the student is better than the untouched source model, by all target images."""
    if outputs.bridged_logits is None:
        return "cannot tell"
    views = (outputs.predict_all(student)[1], untouched_logits, outputs.bridged_logits)
    predicted = (logits.argmax(dim=1).cpu().numpy() for logits in views)
    return verdict(*predicted, classes=outputs.bridged_logits.shape[1], seed=seed)


def share_of_strangers(
    store: Store, untouched: Classifier, features: Tensor, encoding: Encoding, runtime: Runtime
) -> float | None:
    """At most about how many target images show none of the classes; None for few images."""
    if not store.count("ti"):
        return None
    load = student_loader(runtime, encoding)
    ti_features, _ = predict_rows(store["ti/target"], load, untouched, runtime, flips=True)
    share = label_free.stranger_share(features.cpu(), ti_features)
    return None if share is None else round(share, 3)


def calibrated(
    store: Store, student: Classifier, outputs: TeacherOutputs, runtime: Runtime, seed: int
) -> float:
    """The student's temperature; 1 without TI pairs.

    What the source model says of the RGB image of a held-out TI pair stands for the truth, and
    counts as much as it is sure.
    """
    if outputs.ti_logits is None:
        return 1.0
    _, held_out = held_out_pairs(store, seed)
    load = student_loader(runtime, outputs.encoding)
    _, logits = predict_rows(store["ti/target"][held_out], load, student, runtime)
    sure, partners = outputs.ti_logits.cpu()[held_out].softmax(dim=1).max(dim=1)
    return fit_temperature(logits.numpy(), partners.numpy(), sure.numpy())


def student_scores(
    store: Store,
    student: nn.Module,
    outputs: TeacherOutputs,
    runtime: Runtime,
    seed: int,
    folder: Path,
) -> Callable[[int], dict[str, float]]:
    """A function of the epoch that gives the label-free scores of the student."""
    load = student_loader(runtime, outputs.encoding)
    tr_target = store["target/target"][spread(store.count("target"))]
    _, held_out = held_out_pairs(store, seed)
    ti_target = partners = None
    if store.count("ti"):  # as the student is looked at: without mirror images
        ti_target = store["ti/target"][held_out]
        partners = predict_rows(
            store["ti/rgb"][held_out], rgb_loader(runtime), outputs.source, runtime
        )

    def scores(epoch: int) -> dict[str, float]:
        _, tr_logits = predict_rows(tr_target, load, student, runtime)
        _, mirrored = predict_rows(tr_target[:, :, ::-1], load, student, runtime)
        if runtime.main:
            remember(folder, epoch, tr_logits)
        values = label_free.target_scores(tr_logits, mirrored)
        if ti_target is not None and partners is not None:
            seen = predict_rows(ti_target, load, student, runtime)
            values |= label_free.pair_scores(seen, partners)
        return values

    return scores
