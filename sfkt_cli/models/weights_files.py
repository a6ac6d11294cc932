"""Files with weights that somebody else wrote: read without running anything in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfkt_cli.errors import DataError

STATE_DICT_SUFFIXES = (".pth", ".pt", ".pts", ".pt2", ".bin", ".ckpt", ".tar", ".pkl")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts put the state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and torch.compile put in front of every name."""
PICKLE = b"\x80"
"""First byte of every pickle since Python 2.3."""
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"


def read_weights(path: Path, *, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict, float32, by their plain names.

    Args:
        path: The file.
        trust: A pickle with more than tensors in it may run code.

    Raises:
        DataError: The file is missing or damaged, holds a program instead of tensors, or has
            values that are not finite.
    """
    if not path.is_file():
        raise DataError(f"source.checkpoint: {path} does not exist")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in STATE_DICT_SUFFIXES:
        tensors = _unwrap(path, _read_torch(path, trust))
    else:
        raise DataError(
            f"{path} is no file of weights: expected .safetensors, or a state dict in "
            + ", ".join(STATE_DICT_SUFFIXES)
        )
    plain = {_plain_name(name): value.float() for name, value in tensors.items()}
    for name, value in plain.items():
        if not torch.isfinite(value).all():
            raise DataError(f"{path}: {name} has values that are not finite: the model is broken")
    return plain


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is no intact .safetensors file: {error}") from None


def kind_of(path: Path) -> str | None:
    """What a file of torch holds that can run code; None for tensors, and for other files.

    Raises:
        DataError: The file does not exist.
    """
    if not path.is_file():
        raise DataError(f"source.checkpoint: {path} does not exist")
    if path.suffix not in STATE_DICT_SUFFIXES:
        return None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            inside = [name.partition("/")[2] for name in file.namelist()]
        if any(name.startswith("code/") or name == "constants.pkl" for name in inside):
            return "a TorchScript program"
        if any(name.startswith(("models/", "archive_format")) for name in inside):
            return "an exported program"
    elif _first_byte(path) != PICKLE:
        return None
    try:
        _load_tensors(path)
    except pickle.UnpicklingError:
        return "a pickle with more than tensors in it"
    except DataError:
        pass  # damaged: who reads it says so
    return None


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged archives raise almost anything, such as zlib.error
        first = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as a state dict: {first}") from None


def _read_torch(path: Path, trust: bool) -> Any:
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    try:
        return _load_tensors(path)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} cannot be read: it is no file of weights; write one with {SAVE_WEIGHTS}"
        ) from None


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Find the state dict in what a training script saved."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        inner = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if tensors and not inner:
            return tensors
        if not inner:
            break
        loaded = loaded[inner[0]]
    held = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else ""
    raise DataError(
        f"{path} holds no state dict, but a {type(loaded).__name__}{held and ' with '}{held}: "
        f"save one with {SAVE_WEIGHTS}"
    )


def _plain_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
