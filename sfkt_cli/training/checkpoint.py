"""Resumable state: written whole or not at all, loaded without running code."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sfkt_cli.console import warn
from sfkt_cli.errors import first_line
from sfkt_cli.files import replacing

STATE = "state.pt"
PREVIOUS = "previous.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state; the one before is kept beside it until the next call."""
    folder.mkdir(exist_ok=True)
    current = folder / STATE
    # Made in memory: on a full disk torch raises a RuntimeError of its own, Python an OSError.
    written = io.BytesIO()
    torch.save(state, written)
    with replacing(current) as partial:
        partial.write_bytes(written.getbuffer())
        if current.exists():
            current.replace(folder / PREVIOUS)


def load_states(folder: Path, device: torch.device, made_for: str) -> Iterator[dict[str, Any]]:
    """The states that can be gone on from, the newest first.

    One that is damaged or belongs to other settings or inputs is named in a warning.
    """
    for name in (STATE, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch would load a flipped bit without a word
            if damaged is not None:
                raise ValueError(f"{damaged} does not match its checksum")
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            if state.get("made_for") != made_for:
                raise ValueError("it belongs to other settings or inputs")
        except Exception as error:  # damaged archives raise almost anything, such as zlib.error
            warn(f"checkpoint {path} cannot be used ({first_line(error)}): it is skipped")
        else:
            yield state
