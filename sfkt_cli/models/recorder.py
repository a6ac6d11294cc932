"""Run a network and keep what it does, as plain values: one run with one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sfkt_cli.errors import DataError
from sfkt_cli.models.programs import BATCH_NORM

SILENT = ("detach", "detach_", "lift_fresh", "alias")
"""They hand their argument on."""
PLACES = ("device", "layout", "pin_memory", "memory_format")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        strided = func in (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default)
        before = args[0].clone() if strided else None
        result = func(*args, **(kwargs or {}))
        # How reshape and pooling say "the same values, in another order in memory".
        same = before is not None and before.numel() == result.numel()
        if before is not None and same and torch.equal(before.reshape(args[1]), result):
            func, args = torch.ops.aten.view.default, args[:2]
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Writer:
    """One recording as plain values."""

    def __init__(self, network: nn.Module, images: Tensor, what: str) -> None:
        self.what = what
        self.named = {id(value): name for name, value in network.named_parameters()}
        self.trained = set(self.named.values())
        self.named |= {id(value): name for name, value in network.named_buffers()}
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[Any] = []
        self.norms: dict[str, Any] = {}
        self._known: dict[int, Any] = {id(images): {"images": True}}
        recorder = Recorder()
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _unfused(), recorder:
                result = network(images)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            first = str(error).strip().splitlines()[-1][:200]
            raise DataError(
                f"{what} does not take {len(images)} RGB images of {images.shape[2]} x "
                f"{images.shape[3]} pixels ({first}): export it with a batch of any size, or "
                "prepare the data at its size with --set image_size=..."
            ) from None
        self._held = recorder.calls  # ids stay those of living tensors
        for func, args, kwargs, given in recorder.calls:
            self._write(func, args, kwargs, given)
        logits = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DataError(f"{what} gives {shape} for {len(images)} images: no classifier")
        self.classes = logits.shape[1]
        self.output = self._argument(logits)

    def _write(self, func: Any, args: Any, kwargs: Any, given: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name in SILENT:
            self._known[id(given)] = self._argument(args[0])
            return
        if not isinstance(given, (Tensor, tuple, list)):
            return  # a check
        if name == "_convolution":  # what traced programs call; its last arguments are advice
            name, args = "convolution", args[:9]
        if func.namespace != "aten":
            name = func.name()
        step: list[Any] = [
            f"{name}.{func._overloadname or 'default'}",
            [self._argument(a) for a in args],
            {},
        ]
        for key, value in kwargs.items():
            if key == "device" and value is not None:
                step[2][key] = {"device": True}
            elif key not in PLACES and value is not None:
                step[2][key] = self._argument(value)
        layer = self._layer(step) if name == "native_batch_norm" else None
        if layer is not None:
            step = [BATCH_NORM, step[1][:1], {"layer": layer}]
        number = len(self.steps)
        self.steps.append(step)
        if isinstance(given, Tensor):
            self._known[id(given)] = {"step": number}
            return
        for item, part in enumerate(given):
            reference = {"step": number} if layer is not None else {"step": number, "item": item}
            self._known[id(part)] = reference

    def _layer(self, step: list[Any]) -> str | None:
        """Name of the BatchNorm2d that an operation with stored statistics belongs to."""
        _, (_, *tensors, training, momentum, eps), _ = step
        names = [each["tensor"] for each in tensors if each and "tensor" in each]
        wanted = ["weight", "bias", "running_mean", "running_var"]
        if training or [name.rpartition(".")[2] for name in names] != wanted:
            return None
        layer = str(names[0].rpartition(".")[0])
        if {name.rpartition(".")[0] for name in names} != {layer} or not layer:
            return None
        self.norms[layer] = [len(self.tensors[names[0]]), eps, momentum]
        return layer

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._argument(each) for each in value]
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": True}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise DataError(f"{self.what} holds {type(value).__name__}, which cannot be written down")

    def _tensor(self, value: Tensor) -> Any:
        known = self._known.get(id(value))
        if known is None:
            name = self.named.get(id(value)) or f"constant{len(self.tensors)}"
            self.tensors[name] = value.detach().clone()
            known = self._known[id(value)] = {"tensor": name}
        return known


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Attention in single steps: its fused form knows no gradient."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
