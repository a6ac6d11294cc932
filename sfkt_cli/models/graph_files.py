"""Graphs as files, ONNX in three precisions and exported programs of PyTorch; and asking them.

int8 is onnxruntime's static quantisation (QDQ) of the networks; resizing and encoding stay in
float32, for they reckon in millimetres. Depthwise networks, EfficientNet-Lite and MobileNet, need
three things (docs/export.md has the figures): a scale for each output channel of the weights;
activation functions that are quantised with the layer before them; and corrected biases.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.models.onnx_files import open_session, quietly, write_onnx

OUTPUTS = ["logits", "probabilities"]
NETWORKS = ("model", "translator", "source")
"""Attributes of the graphs that hold them."""
QUANTISED = ["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip"]
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes which module a node comes from."""
Predict = Callable[[Tensor], Tensor]
"""Images as the sensor gives them to probabilities (B, K)."""


def to_onnx(
    graph: nn.Module, images: Tensor, facts: Mapping[str, str], *, any_batch: bool
) -> bytes:
    """The content of an ONNX file.

    Args:
        graph: One of :mod:`sfkt_cli.models.graphs`.
        images: A batch of real images, at least two for ``any_batch``.
        facts: Goes into the file's metadata.
        any_batch: The file takes any number of images, otherwise as many as are given here.
    """
    return write_onnx(graph, images, OUTPUTS, facts, any_batch=any_batch)


def to_int8(content: bytes, batches: Callable[[], Iterable[Tensor]]) -> bytes:
    """The same ONNX file in int8.

    Args:
        content: Of the file in float32.
        batches: Gives real images, to measure activations on; it is called twice.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load_model_from_string(content)
    others = [node.name for node in model.graph.node if not _is_network(node)]
    _correct_biases(model, ({"images": batch.numpy()} for batch in batches()))
    add_pre_process_metadata(model)  # batch norms are folded already; it would ask for that
    feeds = ({"images": batch.numpy()} for batch in batches())
    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder, "int8.onnx")
        quantize_static(
            model, path, SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTISED,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax, nodes_to_exclude=others,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return path.read_bytes()


def _is_network(node: Any) -> bool:
    """Whether a node is part of a network, not of the resizing and encoding before it."""
    scopes = next((each.value for each in node.metadata_props if each.key == SCOPES), "")
    return any(f"'{name}'" in scopes for name in NETWORKS)


def _correct_biases(model: Any, feeds: Iterable[dict[str, NDArray[Any]]]) -> None:
    """Add to biases what rounding of the weights will take from the mean of each output channel.

        b <- b + (W - round(W)) m,    m: mean of the layer's inputs, by channel

    Nagel et al., ICCV 2019 (arXiv:1906.04721), section 4.2, with m measured. It halves the number
    of images that get another class.
    """
    from onnx import numpy_helper

    graph = model.graph
    stored = {each.name: each for each in graph.initializer}
    layers = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm") and _is_network(node) and len(node.input) == 3
        and stored.keys() >= set(node.input[1:])
    ]  # fmt: skip
    means = _channel_means(model, sorted({node.input[0] for node in layers}), feeds)
    for node in layers:
        weight, bias = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
        if node.op_type == "Gemm" and not any(each.name == "transB" for each in node.attribute):
            weight = weight.T
        flat = weight.reshape(*weight.shape[:2], -1)
        scale = np.abs(flat).max(axis=(1, 2), keepdims=True) / 127
        lost = flat - np.round(flat / np.where(scale > 0, scale, 1)) * scale
        inputs = means[node.input[0]].reshape(-1, 1, weight.shape[1])  # one row a group
        shift = (lost.sum(2).reshape(len(inputs), -1, weight.shape[1]) * inputs).sum(2).ravel()
        corrected = numpy_helper.from_array((bias + shift).astype(bias.dtype), node.input[2])
        stored[node.input[2]].CopyFrom(corrected)


def _channel_means(
    model: Any, names: Sequence[str], feeds: Iterable[dict[str, NDArray[Any]]]
) -> dict[str, NDArray[np.float64]]:
    """Mean of values of a graph over images and places, by channel."""
    from onnx import ModelProto, ValueInfoProto

    shown = ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = open_session(shown.SerializeToString())
    batches = [
        [value.mean(axis=(0, *range(2, value.ndim)), dtype=float) for value in values]
        for values in (session.run(names, feed) for feed in feeds)
    ]
    return {name: np.mean([b[i] for b in batches], axis=0) for i, name in enumerate(names)}


def open_onnx(content: bytes) -> Predict:
    """An ONNX file in onnxruntime."""
    session = open_session(content)
    return lambda images: torch.from_numpy(
        session.run(["probabilities"], {"images": images.numpy()})[0]
    )


def to_pt2(graph: nn.Module, images: Tensor, facts: Mapping[str, str], *, any_batch: bool) -> bytes:
    """The content of an exported program of PyTorch; arguments as those of :func:`to_onnx`."""
    shapes = {"images": {0: torch.export.Dim("batch")}} if any_batch else None
    file = io.BytesIO()
    with quietly():
        program = torch.export.export(graph, (images,), dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files=dict(facts))
    return file.getvalue()


def open_pt2(content: bytes) -> Predict:
    """An exported program in PyTorch."""
    with quietly():
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: module(images)[1]


def open_graph(graph: nn.Module) -> Predict:
    """A graph itself."""
    return lambda images: graph(images)[1]
