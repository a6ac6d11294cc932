"""Which epoch is kept without labels: the score that chooses, and what each epoch said.

Bridge and transfer write ``epochs.npy`` beside their metrics; only ``evaluate`` holds it against
labels, afterwards.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.files import replacing
from sfkt_cli.settings.config import Config

SCORE_ROWS = 1000
"""Target images that label-free scores look at, at most."""
SELECTORS = ("ti_closeness", "ti_agreement", "ti_kappa", "tr_information", "tr_density")
"""Label-free scores that may choose, larger is better."""
FILE = "epochs.npy"


def spread(count: int, most: int = SCORE_ROWS) -> NDArray[np.int64]:
    """At most so many row numbers, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def selector(config: Config, *, ti: bool, auto: str | None = None) -> str | None:
    """The score that chooses the epoch: that of the settings; None: the last epoch is kept.

    Args:
        config: ``training.select``.
        ti: Whether the scores on TI pairs are known.
        auto: What ``auto`` stands for in this stage.
    """
    chosen = auto if config.training.select == "auto" else config.training.select
    return None if chosen == "last" or (not ti and chosen and chosen[:3] == "ti_") else chosen


def remember(folder: Path, epoch: int, logits: Tensor) -> None:
    """Write the classes said after an epoch as row ``epoch`` of epochs.npy; later rows go.

    Args:
        folder: Of the stage.
        epoch: From 0.
        logits: (R, K) on the rows ``spread(N)`` of the target images.
    """
    said = logits.argmax(dim=1).numpy().astype(np.int16)[None]
    before = load_epochs(folder)[:epoch]
    rows = np.concatenate([before, said]) if before.shape[1:] == said.shape[1:] else said
    with replacing(folder / FILE) as partial, partial.open("wb") as file:
        np.save(file, rows)


def load_epochs(folder: Path) -> NDArray[np.int16]:
    """Classes said (E, R) after each epoch of a stage; (0, 0) where nothing can be read."""
    try:
        said = np.asarray(np.load(folder / FILE, allow_pickle=False), np.int16)
    except Exception:  # damaged headers raise almost anything, such as tokenize.TokenError
        said = np.zeros((0, 0), np.int16)
    return said if said.ndim == 2 else np.zeros((0, 0), np.int16)
