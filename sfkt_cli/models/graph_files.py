"""Models as one graph, from the raw images of the sensor to class probabilities, and as files.

Files are ONNX in three precisions and exported programs of PyTorch. int8 is onnxruntime's static
quantisation (QDQ) of the networks; resizing and encoding stay in float32, because they compute in
millimetres. Depthwise networks, EfficientNet-Lite and MobileNet, need three things (docs/export.md
has the figures): a scale for each output channel of the weights; activation functions that are
quantised with the layer before them; and corrected biases.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.grid import Fit, areas, kept_box
from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.errors import first_line
from sfkt_cli.models.onnx_files import open_session

NETWORKS = ("model", "translator")  # attributes of a :class:`SensorGraph` that hold them
QUANTISED = ["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip"]
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes which module a node comes from
Network = TypeVar("Network", bound=nn.Module)
Predict = Callable[[Tensor], Tensor]  # images as the sensor gives them to probabilities (B, K)


class FitTarget(nn.Module):
    """Crop and area resampling as matrix products: :func:`sfkt_cli.data.grid.fit_target`.

    Its results are those of that function, to the last digit: float32 holds the sums of bytes
    exactly, in any order, and the division is one of whole numbers.

    Images of ``height`` x ``width`` pixels become ``size`` x ``size``; ``missing``: 0 is "no
    reading".
    """

    down: Tensor
    across: Tensor
    count: Tensor

    def __init__(self, height: int, width: int, size: int, fit: Fit, *, missing: bool) -> None:
        super().__init__()
        left, upper, right, lower = kept_box(width, height, fit)
        self._box = (left, upper, right, lower)
        self._missing = missing
        self.register_buffer("down", _area_matrix(lower - upper, size))
        self.register_buffer("across", _area_matrix(right - left, size))
        self.register_buffer("count", torch.outer(self.down.sum(1), self.across.sum(1)).long())

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, H, W, C) to float32 (B, S, S) or (B, S, S, C), whole numbers."""
        left, upper, right, lower = self._box
        kept = images.to(torch.float32)[:, upper:lower, left:right]
        planes = kept.unsqueeze(1) if kept.ndim == 3 else kept.permute(0, 3, 1, 2)
        high = torch.floor(planes / 256)
        sums = 256 * self._sums(high) + self._sums(planes - 256 * high)
        readings = self._sums((planes > 0).to(torch.float32)) if self._missing else self.count
        whole = readings.clamp_min(1)
        mean = torch.div(2 * sums + whole, 2 * whole, rounding_mode="floor")
        mean = (mean * (2 * readings >= self.count)).to(torch.float32)
        return mean.squeeze(1) if kept.ndim == 3 else mean.permute(0, 2, 3, 1)

    def _sums(self, planes: Tensor) -> Tensor:
        across = F.linear(planes, self.across).transpose(2, 3)
        return F.linear(across, self.down).transpose(2, 3).to(torch.int64)


def _area_matrix(length: int, size: int) -> Tensor:
    """(size, length): 1 where a pixel belongs to an area."""
    first, count = (torch.from_numpy(edges).unsqueeze(1) for edges in areas(length, size))
    pixels = torch.arange(length)
    return ((pixels >= first) & (pixels < first + count)).to(torch.float32)


class SensorGraph(nn.Module):
    """Raw target images to logits and probabilities, of a student or of the untouched RGB model."""

    def __init__(
        self,
        model: nn.Module,  # the student, or the RGB model behind ``translator``
        encoding: Encoding,  # of the target images
        # Makes the sensor's images as large as stored ones; None: they come so.
        fit: nn.Module | None = None,
        *,
        # Of the RGB model; None: the model takes encoded images.
        translator: nn.Module | None = None,
        # Logits are divided by it in the probabilities only, as in `sfkt predict`.
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.fit = fit or nn.Identity()
        self.translator = translator
        self.model = model
        self._encoding = encoding
        self._temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) or (B, H, W, C) as the sensor gives them to twice (B, K)."""
        encoded = encode(self.fit(images), self._encoding)
        rgb = as_rgb(encoded) if self.translator is None else self.translator(encoded)
        _, logits = self.model(rgb)
        return logits, torch.softmax(logits / self._temperature, dim=1)


class Half(nn.Module):
    """A network that computes in float16, between float32 images and results."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives, in float32."""
        outputs = self.network(images.half())
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(output.float() for output in outputs)


def halved(graph: SensorGraph) -> nn.Module:
    """A copy whose networks compute in float16; resizing and encoding stay in float32."""
    half = copy.deepcopy(graph)
    half.model = Half(half.model)
    half.translator = None if half.translator is None else Half(half.translator)
    return half.eval()


def for_export(graph: Network) -> Network:
    """On the CPU, in inference mode, plain memory order, without gradients."""
    graph.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return graph.eval().requires_grad_(False)


def to_onnx(
    graph: nn.Module,  # in inference mode, such as a :class:`SensorGraph`
    images: Tensor,  # a batch of such as it will get; at least two for ``any_batch``
    facts: Mapping[str, str],  # goes into the file's metadata
    *,
    # The file takes any number of images, otherwise as many as are given here.
    any_batch: bool = True,
    outputs: Sequence[str] = ("logits", "probabilities"),  # names of what the graph returns
    keep_norms: bool = False,  # leave batch norms as they are, for a file that is to be trained on
) -> bytes:
    """The content of an ONNX file.

    Raises:
        Exception: torch.onnx cannot export the network; it raises errors of many kinds.
    """
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    with quietly():
        program: Any = torch.onnx.export(
            graph, (images,), dynamo=True, external_data=False, input_names=["images"],
            output_names=outputs, dynamic_shapes=shapes, verbose=False, optimize=not keep_norms,
        )  # fmt: skip
    program.model.metadata_props.update(facts)
    content: bytes = program.model_proto.SerializeToString()
    return content


def to_int8(content: bytes, batches: Callable[[], Iterable[Tensor]]) -> bytes:
    """The same ONNX file in int8.

    ``batches`` gives real images, to measure activations on; it is called twice.
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
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    return any(f"'{name}'" in scopes for name in NETWORKS)


def _correct_biases(model: Any, feeds: Iterable[dict[str, NDArray[Any]]]) -> None:
    """Add to biases what rounding of the weights will take from the mean of each output channel.

        b <- b + (W - round(W)) m,    m: mean of the layer's inputs, by channel

    Nagel et al., ICCV 2019 (arXiv:1906.04721), section 4.2, with m measured. It halves the number
    of images that get another class.
    """
    from onnx import numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    layers = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm") and _is_network(node) and len(node.input) == 3
        and stored.keys() >= set(node.input[1:])
    ]  # fmt: skip
    means = _channel_means(model, sorted({node.input[0] for node in layers}), feeds)
    for node in layers:
        weight, bias = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
        if node.op_type == "Gemm" and not any(a.name == "transB" for a in node.attribute):
            weight = weight.T
        flat = weight.reshape(*weight.shape[:2], -1)
        scale = np.abs(flat).max(axis=(1, 2), keepdims=True) / 127
        lost = flat - np.round(flat / np.where(scale > 0, scale, 1)) * scale
        inputs = means[node.input[0]].reshape(-1, 1, weight.shape[1])  # one row a group
        shift = (lost.sum(2).reshape(len(inputs), -1, weight.shape[1]) * inputs).sum(2).ravel()
        node.input[2] = f"{node.output[0]} bias"  # layers may share one of the same values
        corrected = numpy_helper.from_array((bias + shift).astype(bias.dtype), node.input[2])
        graph.initializer.append(corrected)
    used = {name for node in graph.node for name in node.input}
    for name in stored.keys() - used:  # onnxruntime warns of these
        graph.initializer.remove(stored[name])


def _channel_means(
    model: Any, names: Sequence[str], feeds: Iterable[dict[str, NDArray[Any]]]
) -> dict[str, NDArray[np.float64]]:
    """Mean of values of a graph over images and places, by channel."""
    from onnx import ModelProto, ValueInfoProto

    watched = ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = open_session(watched.SerializeToString())
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


def reason(error: BaseException) -> str:
    """Why an export failed; the exporters hide it behind their own error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the exporters, which print and warn about their own insides."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield
