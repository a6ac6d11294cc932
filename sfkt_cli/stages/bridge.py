"""`sfkt bridge`: train the translator (TGMB) on transfer.h5, and translate the target images."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sfkt_cli.console import say, track, warn
from sfkt_cli.data.images import Encoding, choose_encoding, sample_rows
from sfkt_cli.data.store import Store, open_store, spread
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import replacing
from sfkt_cli.methods import label_free
from sfkt_cli.methods.tgmb import Tgmb
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.frozen import FeatureMaps, fold_batch_norms
from sfkt_cli.models.saving import (
    check_classes,
    load_earlier,
    load_model,
    save_model,
    warm_start,
)
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.batches import settle_batches
from sfkt_cli.training.loop import Progress, Training
from sfkt_cli.training.predicting import (
    FEW,
    View,
    pictures_of,
    predict_rows,
    rows_measured_at_once,
    warn_of_collapse,
)
from sfkt_cli.training.recipes import cosine
from sfkt_cli.training.runtime import Runtime, make_runtime, seed_all

CLEAR = 0.5
"""Lead over the encoded images, in standard errors, at which a trained translator is kept."""


def bridge(config: Config, run: Run) -> None:
    """Train the translator; writes ``bridge/model.*`` and ``bridge/images/<sample id>.png``.

    Raises:
        RunError: prepare or source has not been run.
        ConfigError: All terms that could train T are switched off.
        DataError: transfer.h5 has no TI pairs, or does not fit the source model.
    """
    run.require("prepare")
    source_folder = run.require("source")
    store = open_store(run.transfer_store)
    if store.count("ti") == 0:
        raise DataError(
            f"{store.path} holds no TI pairs, and the bridge learns from nothing else: "
            "record some, or use `sfkt transfer --method shot`, which needs none"
        )
    runtime = make_runtime(config.runtime, dry=run.dry)
    saved = load_model(source_folder)
    check_classes(saved.card.classes, store)
    inputs = {"transfer.h5": store.digest, "source": saved.digest}
    earlier, digest = load_earlier(config.training.warm_start, run, "bridge")
    inputs |= digest
    with run.open("bridge", config, inputs) as stage:
        if stage is None:
            say(f"bridge: already done in {run.path('bridge')}")
            return

        source = fold_batch_norms(freeze(saved.classifier), store["ti/rgb"].shape[1])
        runtime.place(source)
        weights = loss_weights(config, store.registered)
        encoding = choose_encoding(config.encoding, store.modality, sample_rows(store))
        architecture = translator_architecture(config, encoding, pretrained=saved.card.pretrained)
        seed_all(config.seed, "bridge")
        translator = make_translator(**architecture)
        if earlier is not None and earlier.card.architecture["name"] != "identity":
            warm_start(earlier, translator, architecture, saved)
        objective = Tgmb(
            translator, source, encoding, weights=weights, rec_loss=config.bridge.rec_loss,
            d_on=config.bridge.d_on,
            feature_maps=feature_maps_of(source, weights, store["ti/rgb"], runtime),
        )  # fmt: skip
        runtime.place(runtime.synchronised(objective))
        runtime.cast_frozen(source, objective)

        pairs = label_free.scoring_pairs(store, View(runtime, source))
        assert pairs is not None
        view = View(runtime, source, encoding, translator)
        progress = _fit(stage, store, objective, view, pairs)

        scores = progress.history[progress.best_epoch]
        translator.eval()
        untouched, lead = compare_with_untouched(pairs, view)
        better = scores["ti_rank"] > untouched and (lead is None or lead >= CLEAR)
        kept = better or not config.bridge.keep_untouched
        if not kept:
            architecture = {"name": "identity", "channels": encoding.encoded_channels, "width": 0}
            translator = make_translator(**architecture).eval()
        view = View(runtime, source, encoding, translator)
        _, logits = predict_rows(store["target/target"][spread(store.count("target"))], view)
        warn_of_collapse(logits, "the source model behind the bridge", "bridge")

        if not runtime.main:
            return
        save_model(
            stage, translator, kind="translator", architecture=architecture, classes=[],
            encoding=encoding,
        )  # fmt: skip
        write_bridged(stage.folder / "images", store, view)
        stage.finish(
            seconds=progress.seconds,
            best_epoch=progress.best_epoch + 1,
            **{name: scores[name] for name in ("ti_agreement", "ti_kappa", "ti_rank")},
            untouched_rank=untouched,
            lead=lead,
            trained=kept,
            peak_memory_mb=round(runtime.peak_memory_mb(), 1),
        )
        _tell_scores(scores, untouched, kept=kept)


def _fit(
    stage: Stage, store: Store, objective: Tgmb, view: View, pairs: label_free.ScoringPairs
) -> Progress:
    """Train the translator; the scores on the pairs choose the epoch."""
    config, runtime, weights = stage.config, view.runtime, objective.weights
    images = ["ti_target", "ti_rgb", *(["tr_target"] if weights["d"] or weights["im"] else [])]
    batches = settle_batches(stage, store, images, runtime, objective)
    objective.weights = {**weights, "im": weights["im"] / batches.passes}
    trained = [p for p in objective.parameters() if p.requires_grad]
    return Training(
        "bridge", stage, objective, batches,
        torch.optim.Adam(trained, config.bridge.learning_rate, betas=(0.9, 0.99), fused=True),
        runtime, epochs=config.bridge.epochs, steps=batches.steps,
        images_per_step=batches.images_per_step, schedule=cosine, keep=objective.translator,
        scores=label_free.epoch_scorer(store, pairs, view, stage.folder),
        select=label_free.selector(config, ti=batches.paired, auto="ti_closeness"),
    ).fit()  # fmt: skip


def _tell_scores(scores: Mapping[str, float], untouched: float, *, kept: bool) -> None:
    """Say how well target images find their RGB partners behind the translator."""
    say(
        f"bridge: kept epoch {scores['epoch']:.0f}. For {scores['ti_agreement']:.0%} of the TI "
        "pairs, the source model names the same class for both images (kappa "
        f"{scores['ti_kappa']:.2f}). A target image is closer to its RGB partner than to "
        f"{scores['ti_rank']:.0%} of the other RGB images ({untouched:.0%} without the translator)"
    )
    if not kept:
        warn(
            "the translator does not clearly help the source model, so the encoded images are used "
            "without it, and bridge/images shows these; more TI pairs or more epochs may help "
            "(bridge.keep_untouched=false keeps the translator)"
        )


def translator_architecture(
    config: Config, encoding: Encoding, *, pretrained: bool
) -> dict[str, Any]:
    """Arguments of ``make_translator``, for a source model that was ``pretrained`` or not."""
    architecture: dict[str, Any] = {
        "name": config.bridge.translator,
        "channels": encoding.encoded_channels,
        "width": config.bridge.channels(pretrained=pretrained),
    }
    if config.bridge.translator == "vqgan":
        architecture["codes"] = config.vqgan.codes
    return architecture


def loss_weights(config: Config, registered: bool) -> dict[str, float]:
    """Weight of each term of L_TGMB; raises ConfigError if nothing ties T to the pairs."""
    settings = config.bridge
    weights = {
        "rec": settings.alpha_rec,
        "d": settings.alpha_d,
        "im": settings.alpha_im,
        "f": settings.alpha_f,
        "p": settings.alpha_p,
    }
    if settings.translator == "vqgan":
        weights |= {"commit": config.vqgan.alpha_commit, "patch": config.vqgan.alpha_patch}
    usable = weights if registered else weights | {"rec": 0.0, "p": 0.0}
    check_tied(usable, "" if registered else " (the pairs are not registered)")
    if usable != weights:
        warn("the pairs are not registered, so L_rec and L_p are switched off")
    return usable


def check_tied(weights: Mapping[str, float], why: str) -> None:
    """Raise ConfigError if nothing ties T to the pairs; ``why`` explains which terms cannot."""
    if not (weights["rec"] or weights["f"] or weights["p"]):
        raise ConfigError(
            "nothing ties the translator to the TI pairs: bridge.alpha_rec, bridge.alpha_f and "
            f"bridge.alpha_p are 0 or have no effect{why}; set bridge.alpha_f"
        )


def feature_maps_of(
    source: Classifier, weights: Mapping[str, float], rgb: NDArray[Any], runtime: Runtime
) -> FeatureMaps | None:
    """The feature maps of the frozen source model for L_p; None if L_p is off or there are none.

    ``rgb`` are the stored RGB images of the TI pairs (N, H, W, 3).

    Raises:
        ConfigError: There are none, and nothing else ties T to the pairs.
    """
    if not weights["p"]:
        return None
    backbone = source.backbone
    backbones = list(backbone) if isinstance(backbone, nn.ModuleList) else [backbone]  # a mixture
    count = rows_measured_at_once(rgb) if runtime.dry_run is None else FEW
    images = View(runtime, source).seen(rgb[spread(len(rgb), count)])
    feature_maps = FeatureMaps(backbones, source.features, images)
    if feature_maps.names:
        return feature_maps
    why = "the source model has no feature maps"
    check_tied({**weights, "p": 0.0}, f" ({why})")
    warn(f"{why}: L_p is switched off")
    return None


def compare_with_untouched(
    pairs: label_free.ScoringPairs, view: View
) -> tuple[float, float | None]:
    """Compare the source model behind the translator with the model on the encoded images.

    Returns:
        The partner rank of the encoded images, and by how many standard errors that of the
        translated images is better; None if there are too few groups for an error.
    """
    encoded = replace(view, translator=None)
    features, _ = predict_rows(pairs.target, encoded)
    rank = float(label_free.partner_rank(features, pairs.features).mean())
    if len(set(pairs.groups)) < 2:
        return rank, None
    bridged, other = (predict_rows(pairs.target, seen, flips=True)[0] for seen in (view, encoded))
    return rank, label_free.bridge_lead(bridged, other, pairs.features, pairs.groups)


def write_bridged(folder: Path, store: Store, view: View) -> None:
    """Write the translation of every target image as ``<sample id>.png``."""
    ids = iter(store.strings("target/id"))
    folder.mkdir(exist_ok=True)

    def write(sample: str, pixels: NDArray[np.uint8]) -> None:
        with replacing(folder / f"{sample}.png") as unfinished:
            Image.fromarray(pixels).save(unfinished, format="PNG", compress_level=1)

    with ThreadPoolExecutor(4) as pool, track("pictures", store.count("target")) as tracker:
        for pictures in pictures_of(store["target/target"], view):
            pixels = pictures.mul(255).round().byte().numpy()
            list(pool.map(write, islice(ids, len(pixels)), pixels))
            tracker.advance(len(pixels), len(pixels))
