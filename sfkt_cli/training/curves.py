"""Metrics of each epoch for TensorBoard, where ``runtime.tensorboard`` asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sfkt_cli.errors import ConfigError

FOLDER = "tensorboard"
"""Below a stage's folder; ``tensorboard --logdir runs`` finds them all."""
Numbers = Mapping[str, float]


@contextlib.contextmanager
def tensorboard_curves(
    folder: Path, epoch: int, wanted: bool
) -> Iterator[Callable[[int, Numbers, Numbers], None]]:
    """A function that adds an epoch's loss terms and scores to TensorBoard's files, or nothing.

    Args:
        folder: Folder of the stage.
        epoch: Epochs done already; what an interrupted run wrote of later ones is hidden.
        wanted: Whether to write at all.

    Raises:
        ConfigError: It is wanted and tensorboard is not installed.
    """
    if not wanted:
        yield lambda epoch, terms, scores: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "runtime.tensorboard = true needs tensorboard, which is not installed: "
            "pip install 'sfkt[tensorboard]', or leave the setting out"
        ) from None
    writer = SummaryWriter(folder / FOLDER, purge_step=epoch + 1)

    def add(epoch: int, terms: Numbers, scores: Numbers) -> None:
        for group, values in (("terms", terms), ("scores", scores)):
            for name, value in values.items():
                writer.add_scalar(f"{group}/{name}", value, epoch)
        writer.flush()

    try:
        yield add
    finally:
        writer.close()
