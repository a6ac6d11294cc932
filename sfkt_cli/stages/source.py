"""`sfkt source`: train the RGB classifier on source.h5, or take one that somebody brought."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.console import say, warn
from sfkt_cli.data.images import rgb_to_float
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import ConfigError, DataError, RunError, first_line, need
from sfkt_cli.files import write_bytes
from sfkt_cli.models import importing
from sfkt_cli.models.classifier import Classifier, Mixture
from sfkt_cli.models.graph_files import reason, to_onnx
from sfkt_cli.models.importing import Imported, architecture_of
from sfkt_cli.models.onnx_files import unknown_operations
from sfkt_cli.models.saving import save_model
from sfkt_cli.settings.config import Config, SourceConfig
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import resolve
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training import predicting
from sfkt_cli.training.loop import Progress
from sfkt_cli.training.recipes import fit_labels
from sfkt_cli.training.runtime import Runtime, make_runtime, seed_all

USUAL_SIZE = 96  # pixels; few networks but the built-in one are trained on smaller images
OF_CHECKPOINTS = {"backbone", "mixture", "classes", "features", "mean", "std", "channel_order"}
"""Settings of ``source`` that say what a checkpoint is."""
LOOKED_AT = 512  # TI RGB images that an imported model is tried on


def jitter_colors(images: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of images (B, 3, H, W) in [0, 1] at random.

    ``noise`` (3, B, 1, 1, 1) in [0, 1) chooses factors from 1 - strength to 1 + strength.
    """
    factors = 1 + strength * (2 * noise - 1)
    images = images * factors[0]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * factors[1] + mean
    grey = images.mean(dim=1, keepdim=True)
    return ((images - grey) * factors[2] + grey).clamp(0, 1)


def check_image_size(model: nn.Module, backbone: str, size: int) -> None:
    """Raise ConfigError if a network does not take images of this size."""
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        # timm says in this attribute what a network was made for.
        made_for = getattr(getattr(model, "backbone", None), "pretrained_cfg", {})
        side = made_for.get("input_size", (3, 224, 224))[-1]
        raise ConfigError(
            f"source.backbone = {backbone!r} does not take images of {size} x {size} pixels "
            f"({first_line(error)}): image_size must be the network's own: "
            f"prepare the data again with --set image_size={side}, or choose another backbone"
        ) from None


def source(config: Config, run: Run) -> None:
    """Train or import the source model; writes ``source/model.*``.

    Raises:
        RunError: There is neither source.h5 nor a checkpoint.
        ConfigError: The checkpoint does not fit the settings or the classes of the data.
    """
    run.require("prepare")
    taken_over = _taken_over(config, run)
    if taken_over.source.brought:
        _bring(taken_over, run, config)
        return
    settings = config.source
    inputs = _inputs(run, "source.h5", run.source_store, _digest_of_images)
    with run.open("source", config, inputs) as stage:
        if stage is None:
            say(f"source: already done in {run.path('source')}")
            return
        store = open_store(run.source_store)
        runtime = make_runtime(config.runtime, dry=run.dry)
        architecture, _ = architecture_of(
            settings, settings.backbone, len(store.classes), settings.bottleneck
        )
        seed_all(config.seed, "source")
        model = Classifier(**architecture, pretrained=settings.published)
        check_image_size(model, settings.backbone, store["source/rgb"].shape[1])
        model.train()
        runtime.place(runtime.synchronised(model))
        fitted = _train(config, stage, model, store, runtime)
        if runtime.main:
            trained = Imported(model, architecture, store.classes, pretrained=settings.published)
            _write(stage, trained)
            stage.finish(
                seconds=fitted.seconds,
                epochs=settings.epochs,
                peak_memory_mb=round(runtime.peak_memory_mb(), 1),
            )


def _taken_over(config: Config, run: Run) -> Config:
    """The settings, with the source model of ``training.warm_start`` as the checkpoint."""
    earlier = config.training.warm_start
    if earlier is None or config.source.brought:
        return config
    if earlier.resolve() == run.folder.resolve():
        raise ConfigError(
            f"--warm-start {earlier} is the run itself: prepare the larger data in another run"
        )
    checkpoint = Run(earlier).path("source")
    if not run.keeps("source"):  # else the earlier run may be gone
        Run(earlier).require("source")
    source = config.source.model_copy(update={"checkpoint": checkpoint.absolute()})
    return config.model_copy(update={"source": source})


def import_model(
    module: nn.Module,
    *,
    run: str | Path,
    classes: Iterable[str] = (),
    image_size: int | None = None,
    mean: Sequence[float] | NDArray[Any] | Tensor | None = None,
    std: Sequence[float] | NDArray[Any] | Tensor | None = None,
    force: bool = False,
) -> Run:
    """Make any PyTorch classifier the source model of a run, by way of ONNX.

    Writes ``source.onnx`` into the run, then ``source/``, which every later stage takes.

    Args:
        module: Normalised RGB images (B, 3, S, S) to logits or probabilities (B, K).
        run: A prepared run.
        classes: Names of its outputs, in order; empty: those of the data.
        image_size: S in pixels; None: that of the data, which it must agree with.
        mean: Mean of RGB in [0, 1], taken off before the module; None: that of ImageNet.
        std: Deviation of RGB in [0, 1], divided by before the module; None: that of ImageNet.
        force: Replace a source model that is there.

    Raises:
        ConfigError: The extra ``onnx`` is not installed, ``module`` is none, ``mean`` or ``std``
            are not three numbers, or size or classes do not fit the data.
        DataError: The module cannot be exported, or is no classifier.
        RunError: The run is not prepared, or has another source model.
    """
    need("import_model", "onnx", "onnx", "onnxruntime", "onnxscript")
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"import_model: module is a {type(module).__name__}: give a torch.nn.Module that takes "
            "images (B, 3, S, S) and returns logits (B, K)"
        )
    folder = Path(run)
    Run(folder).require("prepare")
    size = int(open_store(Run(folder).transfer_store)["target/target"].shape[1])
    if image_size not in (None, size):
        raise ConfigError(
            f"import_model: image_size is {image_size}, the data of {folder} are prepared with "
            f"{size}: prepare them again with --set image_size={image_size}"
        )
    path = folder.resolve() / "source.onnx"
    usual = SourceConfig().model_dump(include=OF_CHECKPOINTS)  # not what an earlier import needed
    options = Options(
        run=folder,
        force=force,
        assignments=[f"source.{name}={json.dumps(value)}" for name, value in usual.items()],
    ).with_flags(
        {
            "source.checkpoint": str(path),
            "source.classes": list(map(str, classes)) or None,
            "source.mean": _numbers("mean", mean),
            "source.std": _numbers("std", std),
        }
    )
    settings = resolve(options, "source")
    content = _exported(_unwrapped(module), size)
    earlier = path.read_bytes() if path.is_file() else None
    if Run(folder).finished("source") and earlier != content and not force:
        raise RunError(f"{folder / 'source'} holds another model: force=True replaces it")
    write_bytes(path, content)
    try:
        source(settings.config, settings.run)
    except BaseException:  # Ctrl-C, too: the file belongs to the source model that is there
        if earlier is None:
            path.unlink()
        else:
            write_bytes(path, earlier)
        raise
    return replace(settings.run, force=False)  # the caller goes on with stages that may be done


def _exported(module: nn.Module, size: int) -> bytes:
    """A module as an ONNX file, in evaluation mode; the module is left as it was."""
    import onnx

    weights = next(module.parameters(), torch.empty(0))
    training = {part: part.training for part in module.modules()}
    try:
        images = torch.rand(2, 3, size, size, device=weights.device)
        to_file = partial(to_onnx, module.eval(), images, {}, outputs=["logits"])
        content = to_file(keep_norms=True)
        if unknown_operations(onnx.load_model_from_string(content)):
            content = to_file()  # optimised: what depends on no image is worked out
        return content
    except Exception as error:  # torch.onnx raises what it likes
        raise DataError(
            f"import_model: the module cannot be exported to ONNX: {reason(error)}"
        ) from error
    finally:
        for part, was in training.items():
            part.training = was


def _numbers(name: str, values: Any) -> list[float] | None:
    """The numbers of a sequence, an array or a tensor of any shape."""
    if values is None:
        return None
    try:
        numbers: list[float] = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"import_model: {name} is {values!r}: give three numbers, of R, G and B in [0, 1]"
        ) from None
    return numbers


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of torch.compile and of data parallelism."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _bring(config: Config, run: Run, told: Config) -> None:
    """Take the model of ``source.checkpoint``, or those of ``source.mixture`` side by side.

    ``told`` are the settings before a warm start filled in the checkpoint. The run remembers these,
    so that it can later be started from another run.
    """
    store = open_store(run.transfer_store)
    size = int(store["target/target"].shape[1])
    brought: Imported | None = None
    inputs: Mapping[str, str]
    if config.source.checkpoint is None:
        inputs, brought = _mix(config, store)
    else:
        finished = run.keeps("source")
        inputs = _inputs(run, "checkpoint", config.source.checkpoint, importing.digest_of)
        brought = None if finished else importing.import_source(config, store.classes, size=size)
    with run.open("source", told, inputs) as stage:
        if stage is None or brought is None:
            say(f"source: already done in {run.path('source')}")
            return
        if not run.main:
            return
        runtime = replace(make_runtime(config.runtime), world=1)
        model = runtime.place(brought.model)
        backbone = "mixture" if config.source.mixture else config.source.backbone
        check_image_size(brought.model, backbone, size)
        if size < USUAL_SIZE and brought.architecture.get("backbone", "small") != "small":
            warn(
                f"the model gets images of {size} x {size} pixels: if it was trained on larger "
                "ones, it recognises less in these; prepare the data again with --set image_size=N "
                f"--force, where N is {USUAL_SIZE} or the size that it was trained with"
            )
        for remark in brought.remarks:
            say(f"source: {remark}")
        figures = {} if stage.dry else _look(model, store, runtime, brought.classes)
        _write(stage, brought)
        stage.finish(seconds=0.0, **figures)


def _mix(config: Config, store: Store) -> tuple[dict[str, str], Imported]:
    """The source models of ``source.mixture`` side by side, and their digests."""
    folders = config.source.mixture
    members = [importing.own_model(folder, "source.mixture") for folder in folders]
    for folder, member in zip(folders, members, strict=True):
        if member.classes != store.classes:
            raise ConfigError(
                f"source.mixture: {folder} has the classes {', '.join(member.classes)}, the data "
                f"{', '.join(store.classes)}: all models of a mixture name the same ones"
            )
        if "members" in member.architecture:
            raise ConfigError(
                f"source.mixture: {folder} is a mixture itself: name the models that it is made of"
            )
    architecture = {"members": [member.architecture for member in members]}
    model = Mixture(**architecture).eval()
    for empty, member in zip(model.members, members, strict=True):
        empty.load_state_dict(member.model.state_dict())
    digests = map(importing.digest_of, folders)
    inputs = {f"source {number}": digest for number, digest in enumerate(digests, 1)}
    pretrained = any(member.pretrained for member in members)
    return inputs, Imported(model, architecture, store.classes, pretrained=pretrained)


def _inputs(run: Run, name: str, path: Path, digest: Callable[[Path], str]) -> Mapping[str, str]:
    """Digest of what the model is made from; that may be deleted once there is a model."""
    if not path.exists() and run.keeps("source"):
        recorded: Mapping[str, str] = run.record("source")["inputs"]
        return recorded
    return {name: digest(path)}


def _digest_of_images(path: Path) -> str:
    if not path.is_file():
        raise RunError(
            f"{path} does not exist: this data set has no labelled RGB images, or the "
            "file was deleted; bring a model with --set source.checkpoint=FILE "
            "--set source.backbone=NAME"
        )
    return open_store(path).digest


def _look(model: nn.Module, store: Store, runtime: Runtime, classes: list[str]) -> dict[str, Any]:
    """Entropy and histogram of the predictions on TI RGB images; warns if they collapse."""
    rgb = store["ti/rgb"][:LOOKED_AT]
    if not len(rgb):
        return {}
    _, logits = predicting.predict_rows(rgb, predicting.View(runtime, model))
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            "source.checkpoint: the model's outputs on TI RGB images are not finite numbers: are "
            "the weights whole, and source.mean and source.std those it was trained with?"
        )
    entropy, shares = predicting.describe_predictions(logits)
    by_share = sorted(zip(shares, classes, strict=True), reverse=True)
    most_frequent = ", ".join(f"{name} {share:.0%}" for share, name in by_share[:6])
    say(
        f"source: on {len(rgb)} TI RGB images: mean entropy {entropy:.2f} of "
        f"{math.log(len(classes)):.2f} nats; {most_frequent}"
    )
    if warning := predicting.collapse_warning(entropy, shares, classes):
        warn(warning)
    return {"ti_rgb_entropy": entropy, "ti_rgb_histogram": shares}


def _train(
    config: Config, stage: Stage, model: Classifier, store: Store, runtime: Runtime
) -> Progress:
    """Train on source.h5, on colour-jittered images."""
    settings, rgb = config.source, store["source/rgb"]
    if len(rgb) < 2:
        raise ConfigError(f"source.h5 holds {len(rgb)} images: at least 2 are needed")

    def load(stored: Tensor) -> Tensor:
        images = rgb_to_float(stored)
        # Drawn for the whole batch: the number of processes changes no picture.
        noise = torch.rand(3, runtime.world * len(images), 1, 1, 1, device=images.device)
        own = noise[:, runtime.rank :: runtime.world]
        return jitter_colors(images, own, settings.color_jitter)

    return fit_labels(
        "source", stage, model, rgb, store.labels("source"), load, runtime,
        epochs=settings.epochs, rates=settings.rates(pretrained=settings.published),
        batch_size=config.runtime.batch_size,
    )  # fmt: skip


def _write(stage: Stage, made: Imported) -> None:
    save_model(
        stage, made.model, kind="classifier", architecture=made.architecture,
        classes=made.classes, encoding=None, pretrained=made.pretrained,
    )  # fmt: skip
