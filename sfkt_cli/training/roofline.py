"""Time from arithmetic: each operation takes the longer of computing and moving its bytes.

    t = sum over operations of max(FLOPs / rate, bytes / bandwidth) + launch

The roofline model (Williams, Waterman and Patterson, 2009), by operation: FLOPs are torch's own
count, bytes those of the tensors that an operation reads and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sfkt_cli.training.runtime import Runtime

CHANNELS = (16, 64, 256)
"""Widths at which the rate of convolutions is measured: narrow ones are far from the peak."""


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        flops: A multiplication and an addition count two.
        moved: Bytes of the tensors read and written.
        channels: The smaller number of channels of a convolution, for its rate.
    """

    flops: float
    moved: float
    channels: int


@dataclass(frozen=True)
class Machine:
    """What a device can do.

    Attributes:
        name: Of the device.
        flops: FLOP/s at each width of CHANNELS.
        bandwidth: Bytes a second.
        launch: Seconds that every operation takes, however small.
        memory: Bytes.
        measured: Whether these are measurements; else a share of the maker's peak figures.
    """

    name: str
    flops: tuple[float, ...]
    bandwidth: float
    launch: float
    memory: float
    measured: bool


@dataclass(frozen=True)
class Cost:
    """What a piece of work needs.

    Attributes:
        flops: In all.
        moved: Bytes in all.
        compute: Seconds of the operations that arithmetic holds up.
        transfer: Seconds of those that memory holds up.
        launch: Seconds of starting them.
    """

    flops: float = 0.0
    moved: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    launch: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.compute + self.transfer + self.launch

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        parts = {
            "arithmetic": self.compute,
            "memory bandwidth": self.transfer,
            "starting operations": self.launch,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * value for value in _values(self)))


def operations_of(work: Callable[[], object]) -> list[Operation]:
    """The operations of some work, backward passes included; it is done once."""
    with _Count() as counted:
        work()
    operations: list[Operation] = counted.operations
    return operations


def cost_of(operations: Iterable[Operation], machine: Machine, scale: float = 1.0) -> Cost:
    """What operations cost on a machine.

    Args:
        operations: From :func:`operations_of`.
        machine: Where.
        scale: Samples in a batch over those that were counted.
    """
    total = {"flops": 0.0, "moved": 0.0, "compute": 0.0, "transfer": 0.0, "launch": 0.0}
    for each in operations:
        flops, moved = scale * each.flops, scale * each.moved
        computing = flops / machine.flops[_width(each.channels)]
        moving = moved / machine.bandwidth
        total["flops"] += flops
        total["moved"] += moved
        total["compute" if computing > moving else "transfer"] += max(computing, moving)
        total["launch"] += machine.launch
    return Cost(**total)


def measure_machine(name: str, runtime: Runtime, memory: float) -> Machine:
    """Measure rate, bandwidth and launch time of a device, in about a second.

    Args:
        name: Of the device.
        runtime: The device, and the precision in which it computes.
        memory: Its bytes.
    """
    device = runtime.device
    rates = []
    for channels in CHANNELS:
        side = 512 // channels + 4
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device)
        conv.to(memory_format=torch.channels_last)
        images = torch.rand(16, channels, side, side, device=device, requires_grad=True)
        images = images.contiguous(memory_format=torch.channels_last)
        work = _forward_backward(conv, images, runtime)
        flops = sum(each.flops for each in operations_of(work))
        rates.append(flops / _seconds(work, device))
    norm = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()).to(device)
    images = torch.rand(16, 32, 32, 32, device=device, requires_grad=True)
    work = _forward_backward(norm, images.contiguous(memory_format=torch.channels_last), runtime)
    moved = sum(each.moved for each in operations_of(work))
    bandwidth = moved / _seconds(work, device)
    one = torch.ones(1, device=device, requires_grad=True)
    launch = _seconds(lambda: [one + 1.0 for _ in range(100)], device) / 100
    return Machine(name, tuple(rates), bandwidth, launch, memory, measured=True)


def _forward_backward(module: nn.Module, images: Tensor, runtime: Runtime) -> Callable[[], None]:
    def work() -> None:
        with runtime.autocast(module):
            out = module(images)
        out.sum().backward()

    return work


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """The median of some calls; one thread is timed by the CPU's clock, whatever else runs."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times = []
    for _ in range(rounds + 1):
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - began)
    return sorted(times[1:])[rounds // 2]


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            if func.overloadpacket is torch.ops.aten.convolution_backward:
                flops = _backward_flops(*args)
            else:
                flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
            tensors = [t for t in [*_tensors(args), *_tensors(kwargs), *_tensors(out)] if t.numel()]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            kernels = [t for t in _tensors(args) if t.ndim == 4][-1:] if flops else []
            channels = min(kernels[0].shape[:2]) if kernels else CHANNELS[-1]
            self.operations.append(Operation(flops, float(moved), channels))
        return out


def _backward_flops(
    gradient: Tensor, images: Tensor, kernel: Tensor, *rest: Any, **more: Any
) -> float:
    """Of a convolution's gradients for images and kernel, each as many as its forward pass.

    torch's own count takes grouped convolutions for dense ones.
    """
    transposed, mask = rest[4], rest[7]
    each = 2.0 * (images if transposed else gradient).numel() * kernel[0].numel()
    return each * (int(mask[0]) + int(mask[1]))


def _tensors(values: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _width(channels: int) -> int:
    return sum(channels > 2 * width for width in CHANNELS[:-1])


def _values(cost: Cost) -> tuple[float, ...]:
    return (cost.flops, cost.moved, cost.compute, cost.transfer, cost.launch)
