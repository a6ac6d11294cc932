"""Draw the README's figure from a finished demo run.

    sfkt run && python docs/make_figure.py runs/synthetic docs/figure.png

One held-out image of each class, drawn by a fixed seed and not picked: what the sensor gives, what
the bridge makes of it, and the RGB image that nothing in the run has seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from sfkt_cli.data.store import open_store
from sfkt_cli.evaluation.figures import Strip, draw_gallery
from sfkt_cli.evaluation.models import load_models, raw_encoding, translate
from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.predicting import predict_rows, student_loader
from sfkt_cli.training.runtime import make_runtime


def main(folder: Path, picture: Path) -> None:
    """Draw one test image of each class."""
    run, runtime = Run(folder), make_runtime(RuntimeConfig(gpus=0))
    store, test = open_store(run.transfer_store), open_store(run.test_store)
    models = load_models(run, store, runtime)
    student, encoding = models.students["tgkt"]
    labels = test.labels("test")
    generator = np.random.default_rng(0)
    rows = np.array([generator.choice(np.flatnonzero(labels == k)) for k in np.unique(labels)])
    depth, rgb, labels = test["test/target"][rows], test["test/rgb"][rows], labels[rows]
    raw = student_loader(runtime, raw_encoding(store))
    _, before = predict_rows(depth, raw, models.source, runtime)
    _, after = predict_rows(depth, student_loader(runtime, encoding), student, runtime)

    def said(logits: torch.Tensor) -> tuple[str, ...]:
        guesses = logits.argmax(dim=1).tolist()
        return tuple(
            f"{'✓' if guess == label else '✗'} {store.classes[guess]}"
            for guess, label in zip(guesses, labels, strict=True)
        )

    def right(logits: torch.Tensor) -> tuple[bool, ...]:
        return tuple((logits.argmax(dim=1).numpy() == labels).tolist())

    with torch.inference_mode():
        window = raw(depth).permute(0, 2, 3, 1).numpy()
    draw_gallery(
        picture,
        [
            Strip("depth", window, tuple(f"RGB model: {t}" for t in said(before)), right(before)),
            Strip(
                "translated",
                translate(models, depth, runtime),
                tuple(f"student: {text}" for text in said(after)),
                right(after),
            ),
            Strip("RGB, never seen", rgb / 255.0),
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
