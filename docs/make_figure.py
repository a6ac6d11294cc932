"""Draw the README's figure from a finished demo run.

    sfkt run && python docs/make_figure.py runs/synthetic docs/figure.png

One held-out image of each class, drawn by a fixed seed and not picked: what the sensor gives, its
encoding, which the student sees, what the bridge makes of it, and the RGB image that nothing in the
run has seen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfkt_cli.data.store import open_store
from sfkt_cli.evaluation.figures import Strip, draw_gallery
from sfkt_cli.evaluation.models import load_models, raw_encoding, translate
from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.predicting import View, pictures_of, predict_rows
from sfkt_cli.training.runtime import make_runtime


def main(folder: Path, picture: Path) -> None:
    """Draw one test image of each class."""
    run, runtime = Run(folder), make_runtime(RuntimeConfig(gpus=0))
    store, test = open_store(run.transfer_store), open_store(run.test_store)
    models = load_models(run, store, runtime)
    labels = test.labels("test")
    generator = np.random.default_rng(0)
    rows = np.array([generator.choice(np.flatnonzero(labels == k)) for k in np.unique(labels)])
    depth, rgb, labels = test["test/target"][rows], test["test/rgb"][rows], labels[rows]
    views = View(runtime, models.source, raw_encoding(store)), models.students["tgkt"]
    pictures = [next(pictures_of(depth, view)).numpy() for view in views]
    before, after = (predict_rows(depth, view)[1] for view in views)
    translated = translate(models, depth)
    with torch.inference_mode():
        _, behind = models.source(torch.from_numpy(translated).permute(0, 3, 1, 2))

    def strip(title: str, images: NDArray[Any], model: str, logits: torch.Tensor) -> Strip:
        guesses = logits.argmax(dim=1).tolist()
        right = tuple(guess == label for guess, label in zip(guesses, labels, strict=True))
        captions = tuple(
            f"{model}: {'✓' if correct else '✗'} {store.classes[guess]}"
            for guess, correct in zip(guesses, right, strict=True)
        )
        return Strip(title, images, captions, right)

    draw_gallery(
        picture,
        [
            strip("depth", pictures[0], "RGB model", before),
            strip("shading", pictures[1], "student", after),
            strip("translated", translated, "RGB model", behind),
            Strip("RGB, never seen", rgb / 255.0),
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
