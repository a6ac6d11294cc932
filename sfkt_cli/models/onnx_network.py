"""A network as a list of ONNX operations: how models that are brought as ONNX are kept.

The list stands in model.json, the tensors in model.safetensors. A file is data, not a program:
nothing is ever called but the operations of :mod:`sfkt_cli.models.onnx_operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.errors import DataError
from sfkt_cli.models.onnx_operations import OPERATIONS

BATCH_NORM = "BatchNormalization"


class OnnxNetwork(nn.Module):
    """Runs a list of operations on images.

    Args:
        nodes: ``[operation, inputs, outputs, attributes]`` each. An input is the name of a tensor
            or of an earlier output, null, or a literal number or list of numbers, in which
            ``{"batch": k}`` is k times the number of images.
        input: Name of the images.
        output: Name of the result, (B, F).
        channels_last: Whether the images go in as (B, H, W, 3).
        tensors: Name to ``[shape, dtype, whether it is trained]``.
        norms: Channels, eps and momentum of each BatchNorm2d layer.
        features: Size F of the result.

    Raises:
        DataError: An operation or a dtype is unknown.
    """

    def __init__(
        self,
        *,
        nodes: Sequence[Any],
        input: str,
        output: str,
        channels_last: bool,
        tensors: Mapping[str, Any],
        norms: Sequence[Any],
        features: int,
    ) -> None:
        super().__init__()
        self.features = features
        self.watch: Callable[[str, Any], None] | None = None
        """Called with the name and result of each node; see :mod:`sfkt_cli.models.feature_maps`."""
        unknown = sorted({str(node[0]) for node in nodes} - set(OPERATIONS))
        if unknown:
            raise DataError(f"model.json holds unknown operations: {', '.join(unknown)}")
        self._nodes, self._input, self._output = nodes, input, output
        self._channels_last = channels_last
        self._names = {name: f"tensor{number}" for number, name in enumerate(tensors)}
        for name, (shape, dtype, trained) in tensors.items():
            blank = torch.zeros(shape, dtype=_dtype(dtype))
            if trained:
                self.register_parameter(self._names[name], nn.Parameter(blank))
            else:
                self.register_buffer(self._names[name], blank)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, eps, momentum) for channels, eps, momentum in norms
        )
        self.depthwise = any(
            attributes.get("group", 1) > 1 and tensors[inputs[1]][0][1] == 1
            for kind, inputs, _, attributes in nodes
            if kind == "Conv" and inputs[1] in tensors
        )
        """Whether a convolution works on each channel by itself."""
        last = {name: number for number, node in enumerate(nodes) for name in names_in(node[1])}
        self._last_uses: dict[int, list[str]] = {}
        for name, number in last.items():
            if name != output:
                self._last_uses.setdefault(number, []).append(name)

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that the nodes know."""
        return {name: getattr(self, own) for name, own in self._names.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to (B, F)."""
        values: dict[str, Any] = dict(self.named_tensors())
        values[self._input] = images.permute(0, 2, 3, 1) if self._channels_last else images
        for number, (kind, inputs, outputs, attributes) in enumerate(self._nodes):
            given = [_value(each, values, images.shape[0]) for each in inputs]
            if "layer" in attributes:
                results: Any = self.norms[attributes["layer"]](given[0])
            else:
                results = OPERATIONS[kind](*given, **attributes)
            if self.watch is not None:
                self.watch(f"{outputs[0]} {kind}", results)
            values.update(zip(outputs, as_tuple(results), strict=False))
            for name in self._last_uses.get(number, ()):
                values.pop(name, None)
        result: Tensor = values[self._output]
        return result


def as_tuple(results: Any) -> tuple[Any, ...]:
    """The results of an operation; most have one."""
    return results if isinstance(results, tuple) else (results,)


def names_in(inputs: Sequence[Any]) -> list[str]:
    """The inputs of a node that are names."""
    return [each for each in inputs if isinstance(each, str)]


def _value(written: Any, values: Mapping[str, Any], batch: Any) -> Any:
    if isinstance(written, str):
        return values[written]
    if isinstance(written, list):
        return [_value(each, values, batch) for each in written]
    return written["batch"] * batch if isinstance(written, Mapping) else written


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"model.json: {name!r} is no dtype")
    return dtype
