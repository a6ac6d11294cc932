"""What each operation of an ONNX file computes, for float images and whole-number shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfkt_cli.errors import DataError

Operation = Callable[..., Any]


def _numbers(value: Any) -> list[int]:
    return [
        int(each) for each in (value.flatten().tolist() if isinstance(value, Tensor) else value)
    ]


def _padded(x: Tensor, kernel: Any, strides: Any, dilations: Any, pads: Any, auto_pad: str) -> Any:
    """ONNX padding (begins, ends) applied where it is not symmetric; else what remains to do."""
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
        return x, begins, None
    both = [n for b, e in zip(reversed(begins), reversed(ends), strict=True) for n in (b, e)]
    return x, [0] * len(kernel), both


def _conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, kernel_shape: Any = None, strides: Any = None,
    pads: Any = None, dilations: Any = None, group: int = 1, auto_pad: str = "NOTSET",
) -> Tensor:  # fmt: skip
    kernel = list(w.shape[2:])
    strides, dilations = strides or [1] * len(kernel), dilations or [1] * len(kernel)
    x, padding, around = _padded(x, kernel, strides, dilations, pads, auto_pad)
    x = F.pad(x, around) if around else x
    return F.conv2d(x, w, b, strides, padding, dilations, group)


def _max_pool(
    x: Tensor, *, kernel_shape: Any, strides: Any = None, pads: Any = None, dilations: Any = None,
    ceil_mode: int = 0, auto_pad: str = "NOTSET", storage_order: int = 0,
) -> Tensor:  # fmt: skip
    strides, dilations = strides or [1] * len(kernel_shape), dilations or [1] * len(kernel_shape)
    x, padding, around = _padded(x, kernel_shape, strides, dilations, pads, auto_pad)
    x = F.pad(x, around, value=float(torch.finfo(x.dtype).min)) if around else x
    pooled: Tensor = F.max_pool2d(x, kernel_shape, strides, padding, dilations, bool(ceil_mode))
    return pooled


def _average_pool(
    x: Tensor, *, kernel_shape: Any, strides: Any = None, pads: Any = None, ceil_mode: int = 0,
    count_include_pad: int = 0, auto_pad: str = "NOTSET", dilations: Any = None,
) -> Tensor:  # fmt: skip
    strides = strides or [1] * len(kernel_shape)
    x, padding, around = _padded(x, kernel_shape, strides, [1, 1], pads, auto_pad)
    if around or any(each != 1 for each in dilations or []):
        raise DataError("average pooling with padding on one side only is not supported")
    return F.avg_pool2d(x, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad))


def _batch_norm(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, *,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0, spatial: int = 1,
) -> Tensor:  # fmt: skip
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.1, epsilon)


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0,
    transA: int = 0, transB: int = 0,  # noqa: N803
) -> Tensor:  # fmt: skip
    a = a.T if transA else a
    if transB and alpha == beta == 1.0 and (c is None or c.ndim == 1):
        return F.linear(a, b, c)
    product = alpha * (a @ (b.T if transB else b)) if alpha != 1.0 else a @ (b.T if transB else b)
    return product if c is None else product + (beta * c if beta != 1.0 else c)


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = _numbers(shape)
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def _axes(x: Tensor, axes: Any, given: Any) -> list[int]:
    chosen = axes if given is None else _numbers(given)
    return list(range(x.ndim)) if chosen is None else list(chosen)


def _reduce(how: Callable[..., Tensor]) -> Operation:
    def reduce(
        x: Tensor, given: Any = None, *, axes: Any = None, keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:  # fmt: skip
        return how(x, dim=_axes(x, axes, given), keepdim=bool(keepdims))

    return reduce


def _squeeze(x: Tensor, given: Any = None, *, axes: Any = None) -> Tensor:
    chosen = [i for i, n in enumerate(x.shape) if n == 1] if given is axes is None else None
    return x.squeeze(tuple(chosen or _axes(x, axes, given)))


def _unsqueeze(x: Tensor, given: Any = None, *, axes: Any = None) -> Tensor:
    chosen = _axes(x, axes, given)
    rank = x.ndim + len(chosen)
    for axis in sorted(each % rank for each in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(
    x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None,
    **old: Any,
) -> Tensor:  # fmt: skip
    first, last = _numbers(old.get("starts", starts)), _numbers(old.get("ends", ends))
    along = old.get("axes", axes)
    chosen = range(len(first)) if along is None else _numbers(along)
    strides = [1] * len(first) if steps is None else _numbers(steps)
    for axis, begin, end, step in zip(chosen, first, last, strides, strict=True):
        if step < 1:
            raise DataError("slices that run backwards are not supported")
        x = x[(slice(None),) * (axis % x.ndim) + (slice(begin, end, step),)]
    return x


def _split(
    x: Tensor, given: Any = None, *, axis: int = 0, split: Any = None, num_outputs: Any = 0
) -> Any:
    sizes = split if given is None else _numbers(given)
    return tuple(torch.split(x, sizes, axis) if sizes else x.chunk(num_outputs or 2, axis))


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    if indices.ndim == 0:
        return x.select(axis, int(indices))
    picked = x.index_select(axis, indices.flatten())
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis % x.ndim + 1 :])


def _pad(x: Tensor, pads: Any = None, value: Any = None, axes: Any = None, **old: Any) -> Tensor:
    sizes = _numbers(old.get("pads", pads))
    if axes is not None or old.get("mode", "constant") != "constant":
        raise DataError("padding other than with a constant on all axes is not supported")
    half = len(sizes) // 2
    pairs = [n for i in reversed(range(half)) for n in (sizes[i], sizes[half + i])]
    return F.pad(x, pairs, value=float(value) if value is not None else float(old.get("value", 0)))


def _clip(x: Tensor, low: Any = None, high: Any = None, **old: Any) -> Tensor:
    low, high = old.get("min", low), old.get("max", high)
    return x.clamp(None if low is None else float(low), None if high is None else float(high))


def _layer_norm(
    x: Tensor, scale: Tensor, shift: Any = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:  # fmt: skip
    return F.layer_norm(x, list(x.shape[axis % x.ndim :]), scale, shift, epsilon)


def _cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    from onnx import helper

    return x.to(torch.from_numpy(helper.tensor_dtype_to_np_dtype(to).type(0).reshape(1)).dtype)


def _constant(**given: Any) -> Tensor:
    (value,) = given.values()
    return value if isinstance(value, Tensor) else torch.tensor(value)


OPERATIONS: dict[str, Operation] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": _constant,
    "ConstantOfShape": lambda shape, value=None: torch.full(
        _numbers(shape), 0.0 if value is None else value.item()
    ),
    "Conv": _conv,
    "Div": lambda a, b: a // b if not a.is_floating_point() else a / b,
    "Dropout": lambda x, *_, **__: x,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": lambda x, shape: x * torch.ones(_numbers(shape), dtype=x.dtype),
    "Flatten": lambda x, axis=1: x.flatten(axis) if axis == 1 else x.reshape(-1, x[0].numel()),
    "Gather": _gather,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax((2, 3), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "MatMul": torch.matmul,
    "Max": torch.maximum,
    "MaxPool": _max_pool,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Pad": _pad,
    "Pow": lambda x, y: x ** (float(y) if y.numel() == 1 else y),
    "PRelu": lambda x, slope: torch.where(x > 0, x, x * slope),
    "Range": lambda start, end, step: torch.arange(start.item(), end.item(), step.item()),
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Shape": lambda x, start=0, end=None: torch.tensor(list(x.shape)[start:end]),
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: F.softmax(x, axis),
    "Softplus": F.softplus,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm=None: x.permute(perm or list(range(x.ndim))[::-1]),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
"""ONNX operation to the function that computes it, for float images and whole-number shapes."""
