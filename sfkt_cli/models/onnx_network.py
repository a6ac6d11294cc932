"""An ONNX classifier as a PyTorch network, with gradients: the operations that classifiers use.

A file is data, not a program: nothing in it is run but the operations below. Shapes are tensors of
whole numbers on the CPU, as in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models.onnx_operations import OPERATIONS
from sfkt_cli.models.weights_files import SAVE_WEIGHTS


class OnnxNetwork(nn.Module):
    """Runs the graph of an ONNX file.

    Args:
        path: The file; weights inside it, no others.

    Raises:
        ConfigError: The extra ``onnx`` is not installed.
        DataError: The file is missing or damaged, takes no images, or holds unknown operations.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = read_graph(path)
        unknown = sorted({node.op_type for node in graph.node} - set(OPERATIONS))
        if unknown:
            raise DataError(
                f"{path} holds operations that are not known here: {', '.join(unknown)}. Bring "
                f"the weights of the network that it was exported from instead: {SAVE_WEIGHTS}"
            )
        self._weights: dict[str, str] = {}
        for number, each in enumerate(graph.initializer):
            value = _tensor_of(each)
            name = f"weight{number}"
            self._weights[each.name] = name
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value.float()))
            else:
                self.register_buffer(name, value)
        inputs = [each for each in graph.input if each.name not in self._weights]
        if len(inputs) != 1:
            raise DataError(f"{path} has {len(inputs)} inputs: an image classifier has one")
        dimensions = [each.dim_value for each in inputs[0].type.tensor_type.shape.dim]
        self._channels_last = dimensions[1:] != [] and dimensions[-1] == 3 and dimensions[1] != 3
        self._input, self._output = inputs[0].name, graph.output[0].name
        self._nodes = [
            (n.op_type, list(n.input), list(n.output), {a.name: _attribute(a) for a in n.attribute})
            for n in graph.node
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to the first output of the file."""
        values: dict[str, Any] = {name: getattr(self, own) for name, own in self._weights.items()}
        values[self._input] = images.permute(0, 2, 3, 1) if self._channels_last else images
        for kind, inputs, outputs, attributes in self._nodes:
            given = [values[name] if name else None for name in inputs]
            results = OPERATIONS[kind](*given, **attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(outputs, results, strict=False))
        result: Tensor = values[self._output]
        return result


def read_graph(path: Path) -> Any:
    """The graph of an ONNX file, with nothing read but the file itself.

    Raises:
        ConfigError: The extra ``onnx`` is not installed.
        DataError: The file is missing or damaged, or has its weights elsewhere.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigError(f"{path} needs an extra to be read: pip install 'sfkt[onnx]'") from None
    if not path.is_file():
        raise DataError(f"source.checkpoint: {path} does not exist")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # the parser's own class is private to it
        raise DataError(f"{path} is no intact ONNX file: {error}") from None
    if not graph.node:
        raise DataError(f"{path} is no intact ONNX file: it holds no graph")
    if any(each.external_data for each in graph.initializer):
        raise DataError(
            f"{path} keeps its weights in another file: export it with external_data=False, or put "
            f"them inside: onnx.save(onnx.load('{path.name}'), 'inside.onnx')"
        )
    return graph


def _tensor_of(held: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(held).copy())


def _attribute(attribute: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if attribute.type == attribute.TENSOR:
        return _tensor_of(value)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if attribute.type in (attribute.INTS, attribute.FLOATS) else value
