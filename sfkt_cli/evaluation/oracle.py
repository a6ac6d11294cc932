"""The oracle: the student's network trained on target images *with* labels.

It is no method but a bound: what the network could reach on this sensor. ``evaluate`` trains it,
the only stage that may see target labels, and keeps it in evaluate/oracle for the next time.
"""

from collections.abc import Mapping
from dataclasses import asdict

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.evaluation.models import Predictor, costs, finished_methods, parameters
from sfkt_cli.evaluation.predictions import Evaluation
from sfkt_cli.files import sha256_json
from sfkt_cli.models.classifier import freeze
from sfkt_cli.models.saving import classifier_of, load_model, save_model
from sfkt_cli.settings.config import Config, as_dict, fixed_batch_size
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.predicting import student_loader
from sfkt_cli.training.recipes import fit_labels
from sfkt_cli.training.runtime import make_runtime


def epochs_of(config: Config, run: Run) -> int:
    """The most epochs that a student of the run had; without any, those of the settings."""
    students = (run.record(f"transfer/{name}") for name in finished_methods(run))
    had = [student.get("settings", {}).get("transfer.epochs") for student in students]
    return max(filter(None, had), default=config.transfer.epochs)


def recipe(config: Config, run: Run) -> str:
    """Digest of the settings that decide how the oracle is trained."""
    return sha256_json(
        {
            "seed": config.seed,
            "source": as_dict(config.source),
            "epochs": epochs_of(config, run),
            "training": as_dict(config.training),
            "batch_size": fixed_batch_size(config.runtime),
        }
    )


def oracle(evaluation: Evaluation, encoding: Encoding, inputs: Mapping[str, str]) -> Predictor:
    """The trained oracle: from the cache where nothing changed, else trained now.

    It starts from the source model's weights and has its recipe, because that, too, has labels, and
    the epochs of the students. ``inputs`` are digests of transfer.h5, test.h5 and the source
    model.
    """
    config, run, source = evaluation.config, evaluation.run, evaluation.models.card
    runtime = make_runtime(config.runtime)
    nested = Run(run.path("evaluate"))
    made_from = {**inputs, "recipe": recipe(config, run), "encoding": sha256_json(asdict(encoding))}
    with nested.open("oracle", config, made_from, renew=True) as stage:
        if stage is not None:
            model = classifier_of(load_model(run.path("source"), runtime.device).module)
            model.requires_grad_(True)
            split = evaluation.splits["target"]
            everything = len(split.rows) == len(split.target)
            fitted = fit_labels(
                "oracle", stage, model,
                split.target if everything else split.target[split.rows], split.labels,
                lambda stored: as_rgb(encode(stored, encoding)), runtime,
                epochs=epochs_of(config, run),
                rates=config.source.rates(pretrained=source.pretrained),
                batch_size=fixed_batch_size(config.runtime),
            )  # fmt: skip
            save_model(
                stage.folder, model, kind="classifier", architecture=source.card["architecture"],
                classes=source.classes, encoding=encoding, inputs=made_from, seed=config.seed,
            )  # fmt: skip
            stage.finish(seconds=fitted.seconds, peak_memory_mb=round(runtime.peak_memory_mb(), 1))
    student = freeze(classifier_of(load_model(nested.path("oracle"), runtime.device).module))
    load, cost = student_loader(runtime, encoding), costs(nested.record("oracle"))
    return Predictor("oracle", student, load, parameters(student), *cost)
