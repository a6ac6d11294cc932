"""Graphs as files, ONNX in three precisions and exported programs of PyTorch; and asking them.

int8 is onnxruntime's static quantisation (QDQ). Convolutions and linear layers are quantised,
weights with a scale for each output channel: channels of depthwise networks differ too much for
one. Cropping, resizing and encoding stay as they are, for they reckon in millimetres.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.models.onnx_files import open_session, quietly, write_onnx

OUTPUTS = ["logits", "probabilities"]
QUANTISED = ["Conv", "Gemm", "MatMul"]
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


def to_int8(content: bytes, batches: Iterable[Tensor]) -> bytes:
    """The same ONNX file in int8.

    Args:
        content: Of the file in float32.
        batches: Real images, to measure the ranges of activations on.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load_model_from_string(content)
    feeds = ({"images": batch.numpy()} for batch in batches)
    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder, "int8.onnx")
        quantize_static(
            model, path, SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTISED,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=[node.name for node in model.graph.node if _resizes(node)],
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return path.read_bytes()


def _resizes(node: Any) -> bool:
    """Whether a node belongs to :class:`sfkt_cli.models.graphs.FitTarget`."""
    return any(each.key == SCOPES and "'fit'" in each.value for each in node.metadata_props)


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
