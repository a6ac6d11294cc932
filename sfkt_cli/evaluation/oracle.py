"""The oracle: the student's network trained on target images *with* labels.

    L = cross-entropy with label smoothing

It is no method but a bound: what the network could reach on this sensor. ``evaluate`` trains it,
the only stage that may see target labels, and keeps it in evaluate/oracle for the next time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.models import Predictor, parameters
from sfkt_cli.files import sha256_json
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import Saved, classifier_of, load_model, save_model
from sfkt_cli.settings.config import Config, as_dict, fixed_batch_size
from sfkt_cli.settings.runs import Run, Stage
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.loop import Batch, Plan, fit
from sfkt_cli.training.optimizers import classifier_optimizer, cosine
from sfkt_cli.training.predicting import student_loader
from sfkt_cli.training.runtime import Runtime


class OracleObjective(nn.Module):
    """The objective of the oracle.

    Args:
        model: The classifier in training.
        encoding: Encoding of the target images.
        label_smoothing: Share of the label that is spread over all classes.
    """

    def __init__(self, model: Classifier, encoding: Encoding, *, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self._encoding = encoding
        self._label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``target`` (B, H, W[, C]) as stored and ``labels`` (B,)."""
        _, logits = self.model(as_rgb(encode(batch["target"], self._encoding)))
        loss = F.cross_entropy(
            logits.float(), batch["labels"], label_smoothing=self._label_smoothing
        )
        return {"cross_entropy": loss}


def recipe(config: Config) -> str:
    """Digest of the settings that decide how the oracle is trained."""
    return sha256_json(
        {
            "seed": config.seed,
            "source": as_dict(config.source),
            "epochs": config.transfer.epochs,
            "training": as_dict(config.training),
            "batch_size": fixed_batch_size(config.runtime),
        }
    )


def oracle(
    config: Config,
    run: Run,
    source: Saved,
    split: Split,
    encoding: Encoding,
    inputs: Mapping[str, str],
    runtime: Runtime,
) -> Predictor:
    """The trained oracle: from the cache where nothing changed, else trained now.

    Args:
        config: Settings; the recipe is that of the source model, because it, too, has labels, and
            the epochs are those of the students.
        run: The run.
        source: The source model, whose weights it starts from.
        split: The target images with their labels.
        encoding: Encoding of the target images, the student's.
        inputs: Digests of transfer.h5, test.h5 and the source model.
        runtime: Device and precision.
    """
    nested = Run(run.path("evaluate"))
    made_from = {**inputs, "recipe": recipe(config), "encoding": sha256_json(encoding.as_dict())}
    with nested.open("oracle", config, made_from, renew=True) as stage:
        if stage is not None:
            model = classifier_of(load_model(run.path("source"), runtime.device).module)
            model.requires_grad_(True)
            rates = config.source.rates(pretrained=source.pretrained)
            fitted = fit(
                plan(config, split, stage),
                OracleObjective(model, encoding, label_smoothing=config.source.label_smoothing),
                batches(config, split, runtime),
                classifier_optimizer(model, *rates, config.source.weight_decay),
                runtime,
                schedule=cosine,
                keep=model,
            )
            save_model(
                stage.folder, model, kind="classifier", architecture=source.card["architecture"],
                classes=source.classes, encoding=encoding, inputs=made_from, seed=config.seed,
            )  # fmt: skip
            stage.finish(seconds=fitted.seconds, peak_memory_mb=round(runtime.peak_memory_mb(), 1))
    saved = load_model(nested.path("oracle"), runtime.device)
    student: Classifier = freeze(classifier_of(saved.module))
    record = nested.record("oracle")
    return Predictor(
        "oracle",
        student,
        student_loader(runtime, encoding),
        parameters(student),
        record.get("seconds"),
        record.get("peak_memory_mb"),
    )


def plan(config: Config, split: Split, stage: Stage) -> Plan:
    """As many epochs as the students get."""
    batch_size = min(fixed_batch_size(config.runtime), len(split.rows))
    return Plan(
        title="oracle", seed=config.seed, epochs=config.transfer.epochs,
        steps=max(len(split.rows) // batch_size, config.training.min_steps), weights={},
        folder=stage.folder, images=batch_size, clip_norm=config.training.clip_norm,
        checkpoint_seconds=config.runtime.checkpoint_seconds, made_for=stage.digest,
    )  # fmt: skip


def batches(config: Config, split: Split, runtime: Runtime) -> Any:
    """(epoch, step) to stored target images and their labels."""
    everything = len(split.rows) == len(split.target)
    stream = Stream(
        {"target": split.target if everything else split.target[split.rows]},
        name="oracle", seed=config.seed,
        batch_size=min(fixed_batch_size(config.runtime), len(split.rows)),
        shift=config.training.shift, flip=config.training.flip, runtime=runtime,
    )  # fmt: skip

    def batch(epoch: int, step: int) -> Batch:
        images, rows = stream.batch(epoch, step)
        return {
            "target": images["target"],
            "labels": runtime.tensor(split.labels[rows]),
            "rows": torch.from_numpy(rows),
        }

    return batch
