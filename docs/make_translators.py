"""Draw translations of every translator side by side, and some that fail.

    python docs/make_translators.py docs/translators.png docs/failures.png RUN...

Each RUN is a finished bridge over the same prepared data; its row is named after its translator.
The first picture shows one held-out image of each class, drawn by a fixed seed and not picked; the
second images that the source model gets wrong behind the last RUN's bridge, drawn likewise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.store import Store, open_store
from sfkt_cli.evaluation.figures import Strip, draw_gallery
from sfkt_cli.evaluation.models import Models, load_models, raw_encoding, translate
from sfkt_cli.files import read_settings
from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.predicting import View, pictures_of, predict_rows
from sfkt_cli.training.runtime import Runtime, make_runtime

COLUMNS = 6
Numbers = NDArray[Any]


def said(models: Models, depth: Numbers) -> Numbers:
    """Class that the source model names behind the bridge, (N,)."""
    assert models.bridge is not None
    _, logits = predict_rows(depth, models.bridge)
    found: Numbers = logits.argmax(dim=1).numpy()
    return found


def draw(
    picture: Path,
    runs: list[tuple[str, Models]],
    store: Store,
    test: Store,
    rows: Numbers,
    runtime: Runtime,
) -> None:
    """Depth, each bridge's translation with the prediction, and the RGB image."""
    depth, rgb = test["test/target"][rows], test["test/rgb"][rows]
    labels, names = test.labels("test")[rows], test.classes
    raw = View(runtime, runs[0][1].source, raw_encoding(store))
    window = next(pictures_of(depth, raw)).numpy()
    strips = [Strip("depth", window, tuple(names[label] for label in labels))]
    for name, models in runs:
        guesses = said(models, depth)
        right = tuple(bool(each) for each in guesses == labels)
        texts = tuple(
            f"{'✓' if sure else '✗'} {names[guess]}"
            for sure, guess in zip(right, guesses, strict=True)
        )
        strips.append(Strip(name, translate(models, depth), texts, right))
    draw_gallery(picture, [*strips, Strip("RGB, never seen", rgb / 255.0)])


def main(translators: Path, failures: Path, folders: list[Path]) -> None:
    """Draw both pictures."""
    runtime = make_runtime(RuntimeConfig(gpus=0))
    store = open_store(Run(folders[0]).transfer_store)
    test = open_store(Run(folders[0]).test_store)
    runs = []
    for folder in folders:
        models = load_models(Run(folder), store, runtime)
        settings = read_settings(folder / "bridge" / "config.yaml")
        runs.append((settings["bridge"]["translator"], models))
    labels = test.labels("test")
    generator = np.random.default_rng(0)
    each = [generator.choice(np.flatnonzero(labels == k)) for k in np.unique(labels)]
    draw(translators, runs, store, test, np.array(each), runtime)
    wrong = np.flatnonzero(said(runs[-1][1], test["test/target"]) != labels)
    few = np.sort(generator.choice(wrong, min(COLUMNS, len(wrong)), replace=False))
    draw(failures, runs[-1:], store, test, few, runtime)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
