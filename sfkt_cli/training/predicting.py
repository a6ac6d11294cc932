"""Run a model over the rows of a store, in batches, in inference mode.

The module also warns if the predictions do not look like those of a working model.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sfkt_cli import losses
from sfkt_cli.console import warn
from sfkt_cli.data.images import Encoding, as_rgb, encode, rgb_to_float
from sfkt_cli.data.store import spread
from sfkt_cli.training.runtime import Runtime

FEW = 4  # images that a dry run looks at on a CPU; on a GPU it looks at one batch
MOST_ROWS, MOST_PIXELS = 256, 256 * 128**2  # that a model looks at together
FEWEST_MEASURED, MOST_MEASURED = 16, 64
"""Images that give one set of statistics; fewer lack much of what differs between images."""
MOST_ADAPTED = 2048  # images whose statistics batch norms are given, at most
COLLAPSED_SHARE = 0.9  # a larger share of images in one class is a sign of wrong preprocessing
NEARLY_UNIFORM = 0.97  # a mean entropy above this share of its maximum is one, too
FEWEST = 20  # of fewer images nothing can be said


@dataclass(frozen=True)
class View:
    """A classifier, and how it sees stored images: as RGB; encoded; or encoded and translated."""

    runtime: Runtime
    model: nn.Module  # model input to features (B, D) and logits (B, K)
    encoding: Encoding | None = None  # of target images; None: it sees RGB images
    translator: nn.Module | None = None

    def seen(self, stored: NDArray[Any]) -> Tensor:
        """Model input (B, 3, H, W) in [0, 1] of stored images (B, H, W[, C]), on the device."""
        images = self.runtime.tensor(stored)
        if self.encoding is None:
            return rgb_to_float(images)
        encoded = encode(images, self.encoding)
        seen: Tensor = as_rgb(encoded) if self.translator is None else self.translator(encoded)
        return seen

    def __call__(self, stored: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K) of stored images (B, H, W[, C])."""
        features, logits = self.model(self.seen(stored))
        return features, logits

    @property
    def parameters(self) -> int:
        """Trainable and frozen parameters of the networks, buffers left out."""
        networks = [self.model] if self.translator is None else [self.model, self.translator]
        return sum(part.numel() for network in networks for part in network.parameters())


def rows_at_once(images: NDArray[Any], processes: int = 1) -> int:
    """How many of these images (N, H, W[, C]) a model looks at together in each process.

    The number keeps memory the same for images of any size, and gives all processes about as much
    to do, because they wait for each other.
    """
    fitting = min(MOST_ROWS, MOST_PIXELS // math.prod(images.shape[1:3]))
    return max(min(fitting, -(-len(images) // processes)), 1)


def rows_measured_at_once(images: NDArray[Any]) -> int:
    """How many of these images (N, H, W[, C]) one set of statistics is measured on."""
    return min(MOST_MEASURED, max(FEWEST_MEASURED, rows_at_once(images)))


def predict_rows(images: NDArray[Any], view: View, *, flips: bool = False) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of stored images (N, H, W[, C]), float32, on the CPU.

    Several processes divide the batches among themselves, and all of them get all results, so all
    must call this. A dry run looks at a few rows, which stand for all, and notes how long all would
    take.

    With ``flips``, results are means over each image and its mirror image. The stored image is
    mirrored, because some encodings (surface normals) look different behind a mirror.
    """
    runtime = view.runtime
    batch_size = rows_at_once(images, runtime.world)
    few = batch_size if runtime.device.type == "cuda" else FEW
    if runtime.dry_run is not None and len(images) > 2 * few:
        real = replace(view, runtime=replace(runtime, dry_run=None))
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            features, logits = predict_rows(images[:few], real, flips=flips)
        share = (time.monotonic() - began) / few
        runtime.dry_run.skipped_s += share * (len(images) / runtime.shares - 2 * few)
        rows = torch.arange(len(images)) % few
        return features[rows], logits[rows]
    # Into one tensor each: small results kept between large passing ones would fragment the heap.
    outputs: list[Tensor] = []
    firsts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for first in firsts[runtime.rank :: runtime.world]:
            stored = np.asarray(images[first : first + batch_size])
            sides = [stored, stored[:, :, ::-1]] if flips else [stored]
            with runtime.autocast():
                predicted = [view(side) for side in sides]
            means = [
                torch.stack([part.float() for part in parts]).mean(0)
                for parts in zip(*predicted, strict=True)
            ]
            if not outputs:
                with torch.inference_mode(False):  # losses may keep them for their gradient
                    outputs = [torch.zeros(len(images), mean.shape[1]) for mean in means]
            for output, mean in zip(outputs, means, strict=True):
                output[first : first + len(mean)] = mean
    # A process that had no batch learns the sizes from the others.
    sizes = max(runtime.gather([output.shape[1] for output in outputs]), key=len) or [0, 0]
    outputs = outputs or [torch.zeros(len(images), size) for size in sizes]
    features, logits = map(runtime.sum, outputs)
    return features, logits


def adapt_batch_norms(images: NDArray[Any], view: View) -> None:
    """Give the batch norms of a view's model the statistics of these images, in place.

    Source: AdaBN (Li et al., 2016). At most ``MOST_ADAPTED`` images are looked at, the same ones in
    every process. Without batch norms, or with fewer than two images, nothing changes.
    """
    model, runtime = view.model, view.runtime
    images = images[spread(len(images), FEW if runtime.dry_run is not None else MOST_ADAPTED)]
    at_once = rows_measured_at_once(images)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or len(images) < 2:
        return
    training, momenta = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad(), runtime.autocast():
        for rows in np.array_split(np.arange(len(images)), -(-len(images) // at_once)):
            view(np.asarray(images[rows[0] : rows[-1] + 1]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


def pictures_of(images: NDArray[Any], view: View) -> Iterator[Tensor]:
    """What the model of a view sees: pictures (B, H, W, 3) in [0, 1], on the CPU, by batches."""
    count = rows_at_once(images)
    for first in range(0, len(images), count):
        with torch.inference_mode():
            seen = view.seen(np.asarray(images[first : first + count]))
            pictures = seen.float().permute(0, 2, 3, 1).cpu()
        yield pictures


def describe_predictions(logits: Tensor) -> tuple[float, list[float]]:
    """Mean entropy in nats of logits (N, K), and the share of the images in each class (K,)."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return float(losses.entropy(logits)), (counts / max(len(logits), 1)).tolist()


def collapse_warning(
    entropy: float,
    shares: Sequence[float],
    classes: Sequence[str],
    model: str = "the source model",
    images: str = "TI RGB images",
    advice: str = "are source.mean and source.std those that the model was trained with?",
) -> str | None:
    """A warning if a model's predictions look suspicious, else None.

    ``entropy`` and ``shares`` are those of :func:`describe_predictions`.
    """
    top, largest = max(shares), math.log(len(shares))
    if len(classes) > 1 and top > COLLAPSED_SHARE:
        name = classes[shares.index(top)]
        return (
            f"{model} calls {100 * top:.0f} % of the {images} {name!r}: if they are more varied, "
            f"{advice}"
        )
    if entropy > NEARLY_UNIFORM * largest:
        return (
            f"{model} is unsure of the {images} (mean entropy {entropy:.2f} nats of "
            f"{largest:.2f}), so its answers are close to guessing: {advice}"
        )
    return None


COLLAPSED = {
    "bridge": "no student can learn from it: record more TI pairs, or pairs that look more like "
    "your target images, or train longer (bridge.epochs)",
    "transfer": "do not ship it: record more TI pairs, train the bridge longer or try another "
    "--method",
    "evaluate": "do not ship it",
    "predict": "the student is of no use, or these images are unlike those that it was trained on: "
    "look at the report of `sfkt evaluate`",
}
"""What to do, by stage, where one class takes nearly all, or all are equally likely."""


def warn_of_collapse(
    logits: Tensor, model: str, stage: str, classes: Sequence[str] | None = None
) -> None:
    """Warn if logits (N, K) of enough target images nearly always name the same class, or none.

    Without ``classes``, classes are numbered: the log of a training names no class of a target
    image.
    """
    if len(logits) >= FEWEST:
        classes = classes or [f"class {number}" for number in range(logits.shape[1])]
        seen, images = describe_predictions(logits), "TR target images"
        if message := collapse_warning(*seen, classes, model, images, COLLAPSED[stage]):
            warn(message)
