"""Files that hold a whole network: which kind they are, and, if they are trusted, the network.

TorchScript, exported programs and pickled models run code when they are loaded. Nothing here loads
one unless the user said ``--trust`` in the same command. An ONNX file is data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfkt_cli.errors import DataError
from sfkt_cli.models.weights_files import SAVE_WEIGHTS, WRAPPERS, kind_of

LOADERS = {"a TorchScript program": "torch.jit.load", "an exported program": "torch.export.load"}


def load_network(path: Path, *, trust: bool) -> nn.Module | None:
    """The network that a file holds, in inference mode; None where it holds tensors only.

    Args:
        path: TorchScript, exported program or pickle, by content and not by suffix.
        trust: The user has said that this file may run code.

    Raises:
        DataError: The file may run code and is not trusted, or cannot be loaded.
    """
    kind = kind_of(path)
    if kind is None:
        return None
    if not trust:
        if kind in LOADERS:
            take = f"take its weights out: model = {LOADERS[kind]}(...), then {SAVE_WEIGHTS}"
        else:
            take = f"save the weights alone where the model comes from, {SAVE_WEIGHTS}"
        raise DataError(
            f"{path} is {kind}, and loading one can run any code. Safe: {take}, and name the "
            "architecture with source.backbone. If you trust where the file is from: "
            "`sfkt source --trust`"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _load(path, kind)
        except DataError:
            raise
        except Exception as error:  # foreign code raises what it likes
            raise DataError(f"{path} is {kind}, but does not load: {_first_line(error)}") from None


def _load(path: Path, kind: str) -> nn.Module | None:
    if kind == "a TorchScript program":
        script: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        return script.eval()
    if kind == "an exported program":
        return torch.export.load(path).module()
    held = torch.load(path, map_location="cpu", weights_only=False)
    network = _network_in(held)
    if network is not None:
        return network.float().eval()
    if isinstance(held, Mapping):
        return None
    raise DataError(f"{path} holds a {type(held).__name__}, no model")


def _network_in(held: Any) -> nn.Module | None:
    if isinstance(held, nn.Module):
        return held
    if isinstance(held, Mapping):
        found = [held[key] for key in WRAPPERS if isinstance(held.get(key), nn.Module)]
        return found[0] if found else None
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
