"""Files with weights that somebody else wrote: read without running anything in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

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
_DYNAMIC = "dynamo=True, external_data=False, dynamic_shapes=({0: 'batch'},)"
LOADERS = {
    "a TorchScript program": (
        "torch.jit.load({0!r}).eval()",
        "input_names=['images'], dynamic_axes={'images': {0: 'batch'}}, dynamo=False",
    ),
    "an exported program": ("torch.export.load({0!r}).module()", _DYNAMIC),
    "a pickle with more than tensors in it": (
        "torch.load({0!r}, weights_only=False).eval()", _DYNAMIC,
    ),
}  # fmt: skip
"""How each kind of file that holds a whole network is loaded, and exported to ONNX."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict, float32, by their plain names.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing or damaged, holds a whole network instead of tensors, or has
            values that are not finite.
    """
    if not path.is_file():
        raise DataError(f"source.checkpoint: {path} does not exist")
    if path.suffix.lower() == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix.lower() in STATE_DICT_SUFFIXES:
        tensors = _unwrap(path, _read_torch(path))
    else:
        raise DataError(
            f"{path} is no file of weights: expected .safetensors, or a state dict in "
            + ", ".join(STATE_DICT_SUFFIXES)
        )
    for name, value in tensors.items():
        odd = value.is_quantized or value.is_meta or value.is_complex()
        if odd or value.layout != torch.strided:
            raise DataError(
                f"{path}: {name} is sparse, quantised, complex or without values: save plain "
                f"float32 weights with {SAVE_WEIGHTS}"
            )
    plain = {_plain_name(name): value.float() for name, value in tensors.items()}
    for name, value in plain.items():
        if not torch.isfinite(value).all():
            raise DataError(f"{path}: {name} has values that are not finite: the model is broken")
    return plain


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # damaged files raise almost anything, such as KeyError for a type
        raise DataError(f"{path} is no intact .safetensors file: {error}") from None


def _refuse_network(path: Path, kind: str) -> NoReturn:
    """Refuse a file that holds a whole network, with the three lines that make ONNX of it."""
    load, shape = LOADERS[kind]
    raise DataError(
        f"{path} is {kind}, and loading one can run any code. Turn it into ONNX where you trust it "
        "(S is the side of its images in pixels), then give that file:\n"
        "  import torch\n"
        f"  model = {load.format(path.name)}\n"
        f"  torch.onnx.export(model, (torch.rand(2, 3, S, S),), {path.stem + '.onnx'!r}, {shape})\n"
        f"Or take its weights alone, {SAVE_WEIGHTS}, and name the network with source.backbone"
    )


def _read_torch(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as file:
                inside = [name.partition("/")[2] for name in file.namelist()]
            if any(name.startswith("code/") or name == "constants.pkl" for name in inside):
                _refuse_network(path, "a TorchScript program")
            if any(name.startswith(("models/", "archive_format")) for name in inside):
                _refuse_network(path, "an exported program")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except pickle.UnpicklingError:
        if is_zip or path.read_bytes()[:1] == PICKLE:
            _refuse_network(path, "a pickle with more than tensors in it")
        raise DataError(
            f"{path} cannot be read: it is no file of weights; write one with {SAVE_WEIGHTS}"
        ) from None
    except Exception as error:  # damaged archives raise almost anything, such as zlib.error
        first = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as a state dict: {first}") from None


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
    keys = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else ""
    raise DataError(
        f"{path} holds no state dict, but a {type(loaded).__name__}{keys and ' with '}{keys}: "
        f"save one with {SAVE_WEIGHTS}"
    )


def _plain_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
