"""A network as a list of ONNX operations: how models that are brought as ONNX are kept.

The list stands in model.json, the tensors in model.safetensors. A file is data, not a program:
nothing is ever called but OPERATIONS, each with the meaning of the newest opset; where it changed,
:mod:`sfkt_cli.models.onnx_files` says it as attributes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.errors import DataError

BATCH_NORM = "BatchNormalization"


class OnnxNetwork(nn.Module):
    """Runs a list of operations on images; raises DataError if one of them is unknown."""

    def __init__(
        self,
        *,
        # ``[operation, inputs, outputs, attributes]`` each. An input is the name of a tensor or of
        # an earlier output, null, or a literal number or list of numbers, in which ``{"batch": k}``
        # is k times the number of images.
        nodes: Sequence[Any],
        input: str,  # name of the images
        output: str,  # name of the result, (B, F)
        channels_last: bool,  # whether the images go in as (B, H, W, 3)
        tensors: Mapping[str, Any],  # name to ``[shape, dtype, whether it is trained]``
        # Channels, eps and momentum of each batch norm; then 1 if it takes no maps, but vectors.
        norms: Sequence[Any],
        features: int,  # size F of the result
    ) -> None:
        super().__init__()
        self.features = features
        self.watch: Callable[[str, Any], None] | None = None
        """Called with the name and result of each node; see :mod:`sfkt_cli.models.frozen`."""
        unknown = sorted({str(node[0]) for node in nodes} - set(OPERATIONS))
        if unknown:
            raise DataError(f"model.json holds unknown operations: {', '.join(unknown)}")
        self._nodes, self._input, self._output = nodes, input, output
        self._channels_last = channels_last
        self._names = {name: f"tensor{number}" for number, name in enumerate(tensors)}
        for name, (shape, dtype, trained) in tensors.items():
            blank = torch.zeros(shape, dtype=getattr(torch, dtype))
            if trained:
                self.register_parameter(self._names[name], nn.Parameter(blank))
            else:
                self.register_buffer(self._names[name], blank)
        self.norms = nn.ModuleList(
            (nn.BatchNorm1d if vectors else nn.BatchNorm2d)(channels, eps, momentum)
            for channels, eps, momentum, *vectors in norms
        )
        self.depthwise = any(
            attributes.get("group", 1) > 1 and tensors[inputs[1]][0][1] == 1
            for kind, inputs, _, attributes in nodes
            if kind == "Conv" and inputs[1] in tensors
        )
        """Whether a convolution works on each channel by itself."""
        last = {name: number for number, node in enumerate(nodes) for name in names_in(node[1])}
        self._last_uses = {**last, output: len(nodes)}

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that the nodes know."""
        return {name: getattr(self, own) for name, own in self._names.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to (B, F)."""
        values: dict[str, Any] = dict(self.named_tensors())
        values[self._input] = images.permute(0, 2, 3, 1) if self._channels_last else images
        for number, (kind, inputs, outputs, attributes) in enumerate(self._nodes):
            arguments = [_value(written, values, images.shape[0]) for written in inputs]
            if "layer" in attributes:
                results: Any = self.norms[attributes["layer"]](arguments[0])
            else:
                results = OPERATIONS[kind](*arguments, **attributes)
            if kind in MADE_OF_NUMBERS:
                results = results.to(images.device)
            if self.watch is not None:
                self.watch(f"{outputs[0]} {kind}", results)
            values.update(zip(outputs, as_tuple(results), strict=False))
            for name in names_in(inputs):
                if self._last_uses[name] == number:
                    values.pop(name, None)
        result: Tensor = values[self._output]
        return result


def as_tuple(results: Any) -> tuple[Any, ...]:
    """The results of an operation; most have one."""
    return results if isinstance(results, tuple) else (results,)


def names_in(inputs: Sequence[Any]) -> list[str]:
    """The inputs of a node that are names."""
    return [name for name in inputs if isinstance(name, str)]


def _value(written: Any, values: Mapping[str, Any], batch: Any) -> Any:
    if isinstance(written, str):
        return values[written]
    if isinstance(written, list):
        return [_value(part, values, batch) for part in written]
    return written["batch"] * batch if isinstance(written, Mapping) else written


# ------------------------------------------------------------------ operations

# Arguments have the names of ONNX's attributes, because some inputs of today, such as axes, were
# attributes once. Here they may be both.

MOST_ELEMENTS = 2**28
"""Of a tensor that an operation makes from a shape: a damaged file may ask for any size."""
FLOATS = (1, 10, 11, 16)  # numbers of ONNX's float types; all of them are float32 here
WHOLE = {2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64,
         9: torch.bool}  # fmt: skip


def _numbers(value: Any) -> list[Any]:
    """A literal, or a tensor while the graph is settled."""
    return value.flatten().tolist() if isinstance(value, Tensor) else list(value)


def _number(value: Any) -> Any:
    return _numbers(value)[0] if isinstance(value, Tensor | list) else value


def _within(x: Tensor, value: Any) -> Any:
    """The number nearest to ``value`` that a tensor of this type can hold; None stays."""
    if value is None or not x.is_floating_point():
        return value
    largest = torch.finfo(x.dtype).max
    return max(-largest, min(value, largest))


def _bounded(sizes: list[Any]) -> list[Any]:
    # Export passes a symbol for the batch; to compare it would settle it to one number.
    known = all(isinstance(size, int | float) for size in sizes)
    if known and math.prod(sizes) > MOST_ELEMENTS:
        raise DataError(f"a tensor of shape {sizes} is too large")
    return sizes


def _padded(
    x: Tensor, kernel: Any, fill: float | None, *, strides: Any = None, pads: Any = None,
    dilations: Any = None, auto_pad: str = "NOTSET",
) -> Any:  # fmt: skip
    """Images, and strides, padding and dilations as torch takes them.

    Padding that is not symmetric the images have already. ``fill``: what they are padded with;
    None: they cannot be.
    """
    strides, dilations = strides or [1] * len(kernel), dilations or [1] * len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for side, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            whole = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
            small = whole // 2
            begins.append(small if auto_pad == "SAME_UPPER" else whole - small)
            ends.append(whole - begins[-1])
    else:
        pads = pads or [0] * 2 * len(kernel)
        begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    if begins == ends:
        return x, strides, begins, dilations
    if fill is None:
        raise DataError("average pooling with padding on one side only is not supported")
    both = [n for b, e in zip(reversed(begins), reversed(ends), strict=True) for n in (b, e)]
    return F.pad(x, both, value=fill), strides, [0] * len(kernel), dilations


def _conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, group: int = 1, kernel_shape: Any = None,
    **window: Any,
) -> Tensor:  # fmt: skip
    x, strides, padding, dilations = _padded(x, w.shape[2:], 0.0, **window)
    return F.conv2d(x, w, b, strides, padding, dilations, group)


def _max_pool(
    x: Tensor, *, kernel_shape: Any, ceil_mode: int = 0, storage_order: int = 0, **window: Any
) -> Tensor:
    lowest = float(torch.finfo(x.dtype).min)
    x, strides, padding, dilations = _padded(x, kernel_shape, lowest, **window)
    pooled: Tensor = F.max_pool2d(x, kernel_shape, strides, padding, dilations, bool(ceil_mode))
    return pooled


def _average_pool(
    x: Tensor, *, kernel_shape: Any, ceil_mode: int = 0, count_include_pad: int = 0, **window: Any
) -> Tensor:
    x, strides, padding, dilations = _padded(x, kernel_shape, None, **window)
    if set(dilations) - {1}:
        raise DataError("average pooling with dilations is not supported")
    return F.avg_pool2d(x, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad))


def _batch_norm(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, *,
    epsilon: float = 1e-5, **_: Any,
) -> Tensor:  # fmt: skip
    # F.batch_norm gives mean and variance no gradient; standardised weights depend on theirs.
    sides = (1, -1) + (1,) * (x.ndim - 2)
    factor = (variance + epsilon).rsqrt() * scale
    return (x - mean.view(sides)) * factor.view(sides) + shift.view(sides)


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0,
    transA: int = 0, transB: int = 0,  # noqa: N803
) -> Tensor:  # fmt: skip
    a = a.T if transA else a
    if transB and alpha == beta == 1.0 and (c is None or c.ndim == 1):
        return F.linear(a, b, c)
    product = alpha * (a @ (b.T if transB else b))
    return product if c is None else product + beta * c


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = _numbers(shape)
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def _reduce(
    how: Callable[..., Tensor], x: Tensor, axes: Any = None, *, keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:  # fmt: skip
    chosen = [] if axes is None else _numbers(axes)
    if not chosen and noop_with_empty_axes:
        return x
    return how(x, dim=chosen or list(range(x.ndim)), keepdim=bool(keepdims))


def _softmax(how: Callable[..., Tensor], x: Tensor, *, axis: int = -1, flatten: int = 0) -> Tensor:
    """With ``flatten`` over all axes from ``axis`` on, as up to opset 12."""
    return how(x.flatten(axis % x.ndim), -1).reshape(x.shape) if flatten else how(x, axis)


def _squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_numbers(axes)))


def _unsqueeze(x: Tensor, axes: Any) -> Tensor:
    chosen = _numbers(axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = _numbers(starts), _numbers(ends)
    chosen = range(len(first)) if axes is None else _numbers(axes)
    strides = [1] * len(first) if steps is None else _numbers(steps)
    for axis, begin, end, step in zip(chosen, first, last, strides, strict=True):
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(begin, end, step),)]
        else:
            rows = list(range(x.shape[axis])[begin:end:step])
            x = x.index_select(axis, torch.tensor(rows, dtype=torch.int64, device=x.device))
    return x


def _split(x: Tensor, split: Any = None, *, axis: int = 0, num_outputs: int = 0) -> Any:
    sizes = [] if split is None else _numbers(split)
    return tuple(torch.split(x, sizes, axis) if sizes else x.chunk(num_outputs, axis))


def _split_to_sequence(
    x: Tensor, sizes: Any = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    if sizes is None:
        parts = x.unbind(axis)
        return [part.unsqueeze(axis) for part in parts] if keepdims else list(parts)
    plain = sizes.ndim == 0 if isinstance(sizes, Tensor) else not isinstance(sizes, list)
    return list(torch.split(x, int(sizes) if plain else _numbers(sizes), axis))


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % x.ndim
    rows = torch.where(indices < 0, indices + x.shape[axis], indices).flatten()
    picked = x.index_select(axis, rows)
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _pad(
    x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant"
) -> Tensor:
    sizes = _numbers(pads)
    half = len(sizes) // 2
    along = range(half) if axes is None else [axis % x.ndim for axis in _numbers(axes)]
    sides = {axis: (sizes[i], sizes[half + i]) for i, axis in enumerate(along)}
    pairs = [n for axis in reversed(range(x.ndim)) for n in sides.get(axis, (0, 0))]
    _bounded([n + sum(sides.get(axis, (0, 0))) for axis, n in enumerate(x.shape)])
    if mode == "constant":
        return F.pad(x, pairs, value=_within(x, 0.0 if value is None else _number(value)))
    mode = {"edge": "replicate"}.get(mode, mode)
    if x.ndim != 4 or any(pairs[4:]):
        raise DataError(
            f"padding of mode {mode} on other axes than height and width is not supported"
        )
    return F.pad(x, pairs[:4], mode=mode)


def _clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    bounds = (_within(x, _number(bound)) for bound in (min, max))
    return x if min is max is None else x.clamp(*bounds)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis if axis >= 0 else axis + x.ndim
    return x.flatten(1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def _expand(x: Tensor, shape: Any) -> Tensor:
    sizes = torch.broadcast_shapes(x.shape, tuple(_numbers(shape)))  # type: ignore[no-untyped-call]
    return x.expand(_bounded(list(sizes)))


def _tile(x: Tensor, repeats: Any) -> Tensor:
    times = _numbers(repeats)
    _bounded([n * count for n, count in zip(x.shape, times, strict=True)])
    return x.repeat(*times)


def _range(start: Any, end: Any, step: Any) -> Tensor:
    first, last, by = _number(start), _number(end), _number(step)
    _bounded([(last - first) // by])
    return torch.arange(first, last, by)


_PLAIN = """
Abs:abs Add:add And:logical_and Ceil:ceil Equal:eq Erf:erf Exp:exp Floor:floor Greater:gt
GreaterOrEqual:ge IsNaN:isnan Less:lt LessOrEqual:le Log:log MatMul:matmul Mul:mul Neg:neg
Not:logical_not Or:logical_or Reciprocal:reciprocal Relu:relu Sigmoid:sigmoid Sqrt:sqrt Sub:sub
Tanh:tanh Where:where
"""
"""Operations that are functions of torch."""
_REDUCTIONS = {
    "ReduceL2": torch.linalg.vector_norm, "ReduceMax": torch.amax, "ReduceMean": torch.mean,
    "ReduceMin": torch.amin, "ReduceSum": torch.sum,
}  # fmt: skip
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, word) for name, word in (pair.split(":") for pair in _PLAIN.split())},
    **{name: partial(_reduce, how) for name, how in _REDUCTIONS.items()},
    "AveragePool": _average_pool,
    BATCH_NORM: _batch_norm,
    "Cast": lambda x, to, **_: x.to(torch.float32 if to in FLOATS else WHOLE[to]),
    "CastLike": lambda x, other, **_: x.to(other.dtype),
    "Celu": F.celu,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "ConstantOfShape": lambda shape, value=0.0: torch.full(_bounded(_numbers(shape)), value),
    "Conv": _conv,
    "Div": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "Dropout": lambda x, *_, **__: x,
    "Elu": F.elu,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": F.gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax((2, 3), keepdim=True),
    "GroupNormalization": lambda x, scale, shift, num_groups, epsilon=1e-5, **_: F.group_norm(
        x, num_groups, scale, shift, epsilon
    ),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "InstanceNormalization": lambda x, scale, shift, epsilon=1e-5: F.instance_norm(
        x, weight=scale, bias=shift, eps=epsilon
    ),
    "LayerNormalization": lambda x, scale, shift=None, axis=-1, epsilon=1e-5, **_: F.layer_norm(
        x, x.shape[axis % x.ndim :], scale, shift, epsilon
    ),
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "LogSoftmax": partial(_softmax, F.log_softmax),
    "Max": lambda *tensors: reduce(torch.maximum, tensors),
    "MaxPool": _max_pool,
    "Min": lambda *tensors: reduce(torch.minimum, tensors),
    "Mish": F.mish,
    "Mod": lambda a, b, fmod=0: torch.fmod(a, b) if fmod else torch.remainder(a, b),
    "Pad": _pad,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "PRelu": lambda x, slope: torch.where(x > 0, x, x * slope),
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": lambda x, at, new, **_: x.index_put(tuple(at.unbind(-1)), new),
    "Selu": lambda x, **_: F.selu(x),
    "SequenceAt": lambda parts, place: parts[_number(place)],
    "Shape": lambda x, start=0, end=None: torch.tensor(list(x.shape)[start:end]),
    "Slice": _slice,
    "Softmax": partial(_softmax, F.softmax),
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Sum": lambda *tensors: reduce(torch.add, tensors),
    "Tile": _tile,
    "Transpose": lambda x, perm=None: x.permute(perm or list(range(x.ndim))[::-1]),
    "Unsqueeze": _unsqueeze,
}
"""ONNX operation to the function that computes it, for float images and whole-number shapes."""
NUMBERS = {
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
    **dict.fromkeys(("Clip", "Expand", "Pad", "Reshape", "SequenceAt", "Slice", "Split"), 1),
    **dict.fromkeys(("SplitToSequence", "Squeeze", "Tile", "Unsqueeze", *_REDUCTIONS), 1),
}
"""From which place on inputs are numbers; they stand in the settled graph as literals."""
MADE_OF_NUMBERS = ("ConstantOfShape", "Range", "Shape")
"""Operations that make tensors of numbers alone, on the CPU."""
