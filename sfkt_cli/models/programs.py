"""A network as a list of tensor operations: how foreign programs are kept, without their code.

What somebody brings as TorchScript, exported program, pickle or ONNX is run once by ``sfkt source``
and recorded (:mod:`sfkt_cli.models.recording`). From then on it is a list in model.json beside
tensors in model.safetensors; only the operations of ALLOWED are ever called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.errors import DataError

_WORDS = """
_adaptive_avg_pool2d _log_softmax _prelu_kernel _safe_softmax _softmax _to_copy _unsafe_view abs
add add_ addmm alias amax amin arange avg_pool2d baddbmm bmm cat ceil clamp clamp_ clamp_max
clamp_max_ clamp_min clamp_min_ clone constant_pad_nd convolution copy_ cumsum div div_ elu elu_
eq erf exp expand fill_ flip floor full full_like gather ge gelu gt hardsigmoid hardsigmoid_
hardswish hardswish_ hardtanh hardtanh_ index index_select le leaky_relu leaky_relu_
lift_fresh_copy linalg_vector_norm log logical_not lt masked_fill max_pool2d_with_indices
maximum mean minimum mish mish_ mm mul mul_ native_batch_norm native_group_norm
native_layer_norm ne neg new_zeros ones ones_like permute pixel_shuffle pixel_unshuffle pow
reciprocal reflection_pad2d relu relu_ remainder repeat replication_pad2d roll round rsqrt
scalar_tensor select sigmoid sigmoid_ silu silu_ slice softplus split split_with_sizes sqrt
squeeze stack sub sub_ sum t tanh tanh_ transpose unbind unsafe_split unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean view where zeros
zeros_like
"""
ALLOWED = frozenset(_WORDS.split())
"""Operations of ``torch.ops.aten`` that compute on tensors and do nothing else."""
BATCH_NORM = "batch_norm"
AS_RESHAPE = ("view", "_unsafe_view")
"""Replayed as reshape: activations may lie in memory in another order than when recorded."""


class Program(nn.Module):
    """Runs a recorded list of operations; layers of batch norm are layers again.

    Args:
        steps: ``[operation, arguments, keyword arguments]`` each. An argument that is a mapping is
            ``{"step": i}`` or ``{"step": i, "item": j}``, an earlier result; ``{"tensor": name}``;
            ``{"images": true}``; ``{"batch": k}``, k times the number of images;
            ``{"dtype": name}``; ``{"device": true}``, that of the images.
        output: Which of these is the result, (B, F).
        tensors: Name to ``[shape, dtype, whether it is trained]``.
        norms: Name of a BatchNorm2d layer to ``[channels, eps, momentum]``.
        features: Size F of the result.

    Raises:
        DataError: An operation is none of ALLOWED.
    """

    def __init__(
        self,
        *,
        steps: list[Any],
        output: Mapping[str, Any],
        tensors: Mapping[str, Any],
        norms: Mapping[str, Any],
        features: int,
    ) -> None:
        super().__init__()
        self.features = features
        self.watch: Callable[[str, Any], None] | None = None
        """Told of each step's name and result; see :mod:`sfkt_cli.models.levels`."""
        self.network = nn.Module()
        self._output = output
        self._steps = [(_operation(name), args, more) for name, args, more in steps]
        self._names = [str(name) for name, _, _ in steps]
        self.depthwise = any(
            name == "convolution" and args[8] > 1 and tensors[args[1]["tensor"]][0][1] == 1
            for name, args, _ in steps
        )
        """Whether a convolution works on each channel by itself."""
        for name, (channels, eps, momentum) in norms.items():
            _place(self.network, name, nn.BatchNorm2d(channels, eps, momentum))
        for name, (shape, dtype, trained) in tensors.items():
            blank = torch.zeros(shape, dtype=dtype_of(dtype))
            _place(self.network, name, nn.Parameter(blank) if trained else blank)
        self._last = self._last_uses()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to (B, F)."""
        held: dict[int, Any] = {}
        for number, (operation, args, more) in enumerate(self._steps):
            given = [self._value(each, held, images) for each in args]
            if self._names[number] == BATCH_NORM:
                held[number] = self.network.get_submodule(more["layer"])(*given)
            else:
                named = {key: self._value(each, held, images) for key, each in more.items()}
                held[number] = operation(*given, **named)
            if self.watch is not None:
                self.watch(f"{number} {self._names[number]}", held[number])
            for done in self._last.get(number, ()):
                del held[done]
        result: Tensor = self._value(self._output, held, images)
        return result

    def _value(self, written: Any, held: Mapping[int, Any], images: Tensor) -> Any:
        if isinstance(written, list):
            return [self._value(each, held, images) for each in written]
        if not isinstance(written, Mapping):
            return written
        match written:
            case {"step": number, "item": item}:
                return held[number][item]
            case {"step": number}:
                return held[number]
            case {"tensor": name}:
                parent, _, last = name.rpartition(".")
                return getattr(self.network.get_submodule(parent), last)
            case {"images": _}:
                return images
            case {"batch": times}:
                return times * images.shape[0]
            case {"dtype": name}:
                return dtype_of(name)
            case {"device": _}:
                return images.device
        raise DataError(f"model.json: a program holds the unknown argument {written!r}")

    def _last_uses(self) -> dict[int, list[int]]:
        """Step to the results that nobody needs after it."""
        last: dict[int, int] = {}
        for number, (_, args, more) in enumerate(self._steps):
            last[number] = number
            for used in steps_in([args, list(more.values())]):
                last[used] = number
        for used in steps_in(self._output):
            last.pop(used)
        freed: dict[int, list[int]] = {}
        for result, number in last.items():
            freed.setdefault(number, []).append(result)
        return freed


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as ``float32``.

    Raises:
        DataError: There is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise DataError(f"model.json: {name!r} is no dtype")
    return found


def _operation(name: str) -> Any:
    if name == BATCH_NORM:
        return None
    base, _, overload = name.partition(".")
    if base not in ALLOWED:
        raise DataError(f"model.json: the operation {name!r} is not allowed in a program")
    if base in AS_RESHAPE:
        return torch.reshape
    return getattr(getattr(torch.ops.aten, base), overload)


def steps_in(written: Any) -> list[int]:
    """Numbers of the steps that arguments refer to."""
    if isinstance(written, list):
        return [number for each in written for number in steps_in(each)]
    if isinstance(written, Mapping):
        return [written["step"]] if "step" in written else []
    return []


def _place(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Put a layer, parameter or buffer where a dotted name says, making the modules between."""
    *parents, last = name.split(".")
    module = root
    for parent in parents:
        if parent not in dict(module.named_children()):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value)
