"""Time from arithmetic: each operation takes the longer of computing and moving its bytes.

    t = sum over operations of max(FLOPs / rate, bytes / bandwidth) + kernel + launch

The roofline model (Williams, Waterman and Patterson, 2009), by operation: FLOPs are torch's own
count, bytes those of the tensors that an operation reads and writes. A CPU brings the kernel of a
convolution into an order of its own in every call: so long for each number in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sfkt_cli.training.runtime import Runtime

NARROW, MIDDLING, WIDE = "narrow", "middling", "wide"
DEPTHWISE, LARGE_DEPTHWISE = "depthwise", "large depthwise"
LARGE_DEPTHWISE_WEIGHTS = "weights of large depthwise"


@dataclass(frozen=True)
class Probe:
    """A convolution whose speed is measured, for all of its kind.

    Attributes:
        channels: Of input and output.
        side: Pixels, of input and output.
        kernel: Its side.
        groups: 1, or as many as channels.
        passes: What is timed: forward, gradient for the images, gradient for the weights.
    """

    channels: int
    side: int
    kernel: int = 3
    groups: int = 1
    passes: tuple[bool, bool, bool] = (True, True, True)


PROBES = {
    NARROW: Probe(16, 36),
    MIDDLING: Probe(64, 24),
    WIDE: Probe(256, 14),
    DEPTHWISE: Probe(144, 24, groups=144),
    LARGE_DEPTHWISE: Probe(240, 12, kernel=5, groups=240, passes=(True, True, False)),
    LARGE_DEPTHWISE_WEIGHTS: Probe(480, 6, kernel=5, groups=480, passes=(False, False, True)),
}
"""By kind of convolution: narrow ones are far from the peak, depthwise ones further still.

Gradients of depthwise kernels of more than 3 x 3 have a slow path of their own on CPUs.
"""
LARGE_KERNEL = Probe(512, 4)
"""A convolution whose time is that of its kernel."""
BATCH = 16
"""Images that a probe takes."""


@dataclass(frozen=True)
class Operation:
    """One call of an operator, or one gradient of it.

    Attributes:
        flops: A multiplication and an addition count two.
        moved: Bytes of the tensors read and written.
        kind: A key of PROBES, for its rate.
        kernel: Numbers in the kernel of a convolution.
        learns: Whether it is the gradient for such a kernel.
    """

    flops: float
    moved: float
    kind: str = WIDE
    kernel: int = 0
    learns: bool = False


@dataclass(frozen=True)
class Machine:
    """What a device can do.

    Attributes:
        name: Of the device.
        flops: FLOP/s of each kind of convolution; what is no convolution is as fast as wide ones.
        kernel: Seconds for each number in the kernel of a convolution: in use, and as its gradient.
        bandwidth: Bytes a second.
        launch: Seconds that every operation takes, however small.
        memory: Bytes.
        measured: Whether these are measurements; else a share of the maker's peak figures.
    """

    name: str
    flops: Mapping[str, float]
    kernel: tuple[float, float]
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
        compute: Seconds of the operations that arithmetic holds up, and of ordering kernels.
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


def at_batch(
    work: Callable[[int], object], counted: tuple[int, int], batch: int
) -> list[Operation]:
    """The operations of some work on a batch, from those on two small ones.

    What grows with the batch and what does not, such as the optimiser's, tells itself apart.

    Args:
        work: Done with a number of rows.
        counted: Two such numbers, for which it is done.
        batch: The number that is asked for.
    """
    few, more = (operations_of(lambda rows=rows: work(rows)) for rows in counted)  # type: ignore[misc]
    steps = (batch - counted[0]) / (counted[1] - counted[0])
    return [
        replace(
            a,
            flops=a.flops + steps * (b.flops - a.flops),
            moved=a.moved + steps * (b.moved - a.moved),
        )
        for a, b in zip(few, more, strict=True)
    ]


def cost_of(operations: Iterable[Operation], machine: Machine) -> Cost:
    """What operations from :func:`operations_of` cost on a machine."""
    total = {"flops": 0.0, "moved": 0.0, "compute": 0.0, "transfer": 0.0, "launch": 0.0}
    for each in operations:
        computing = each.flops / machine.flops[each.kind]
        moving = each.moved / machine.bandwidth
        total["flops"] += each.flops
        total["moved"] += each.moved
        total["compute" if computing > moving else "transfer"] += max(computing, moving)
        total["compute"] += each.kernel * machine.kernel[each.learns]
        total["launch"] += machine.launch
    return Cost(**total)


def measure_machine(name: str, runtime: Runtime, memory: float) -> Machine:
    """Measure rates, bandwidth and launch time of a device, in a few seconds.

    Args:
        name: Of the device.
        runtime: The device, and the precision in which it computes.
        memory: Its bytes.
    """
    device = runtime.device
    rates = {}
    for kind, probe in PROBES.items():
        flops, seconds = _measure(probe, runtime)
        rates[kind] = sum(probe.passes) * flops / sum(seconds)
    flops, (forward, _, gradient) = _measure(LARGE_KERNEL, runtime)

    def ordering(seconds: float) -> float:
        numbers = LARGE_KERNEL.channels**2 * LARGE_KERNEL.kernel**2
        return max(seconds - flops / rates[WIDE], 0.0) / numbers

    kernel = ordering(forward), ordering(gradient)
    norm = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()).to(device)
    images = torch.rand(4 * BATCH, 32, 48, 48)
    images = images.to(device, runtime.precision, memory_format=torch.channels_last)
    work = _forward_backward(norm, images.requires_grad_(), runtime)
    moved = sum(each.moved for each in operations_of(work))
    bandwidth = moved / _seconds(work, device)
    one = torch.ones(1, device=device, requires_grad=True)
    launch = _seconds(lambda: [one + 1.0 for _ in range(100)], device) / 100
    return Machine(name, rates, kernel, bandwidth, launch, memory, measured=True)


def _measure(probe: Probe, runtime: Runtime) -> tuple[float, list[float]]:
    """FLOPs of a pass and seconds of each that is timed, in the precision of such training."""
    c, k, groups = probe.channels, probe.kernel, probe.groups
    layer = nn.Conv2d(c, c, k, padding=k // 2, bias=False, groups=groups)
    images = torch.rand(BATCH, c, probe.side, probe.side)
    images, kernel = (
        each.to(runtime.device, runtime.precision_for(layer), memory_format=torch.channels_last)
        for each in (images, layer.weight.detach())
    )
    more = ([1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], groups)

    def gradient(*mask: bool) -> object:
        return torch.ops.aten.convolution_backward(images, images, kernel, None, *more, mask)

    passes: tuple[Callable[[], object], ...] = (
        lambda: torch.convolution(images, kernel, None, *more),
        lambda: gradient(True, False, False),
        lambda: gradient(False, True, False),
    )
    with torch.no_grad():
        seconds = [
            _seconds(each, runtime.device) if timed else 0.0
            for each, timed in zip(passes, probe.passes, strict=True)
        ]
    return 2.0 * images.numel() * kernel[0].numel(), seconds


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
        if func.is_view:
            return out
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
        tensors = [t for t in [*_tensors(args), *_tensors(kwargs), *_tensors(out)] if t.numel()]
        moved = float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.operations += _gradients(moved, *args)
        elif func.overloadpacket is torch.ops.aten.convolution:
            kind = _kind(args[1], args[8], weights=False)
            self.operations.append(Operation(flops, moved, kind, args[1].numel()))
        else:
            self.operations.append(Operation(flops, moved))
        return out


def _gradients(
    moved: float, gradient: Tensor, images: Tensor, kernel: Tensor, *rest: Any
) -> list[Operation]:
    """Those of a convolution for images and for its kernel, each as many FLOPs as its forward pass.

    torch's own count takes grouped convolutions for dense ones.
    """
    transposed, groups, mask = rest[4], rest[6], rest[7]
    flops = 2.0 * (images if transposed else gradient).numel() * kernel[0].numel()
    wanted = [weights for weights, asked in ((False, mask[0]), (True, mask[1])) if asked]
    return [
        Operation(
            flops, moved / len(wanted), _kind(kernel, groups, weights), kernel.numel(), weights
        )
        for weights in wanted
    ]


def _kind(kernel: Tensor, groups: int, weights: bool) -> str:
    """Of a convolution with a kernel (O, I / groups, K, K), or of the gradient for the kernel."""
    channels = min(kernel.shape[:2])
    if groups > 1 and kernel.shape[1] == 1:
        if max(kernel.shape[2:]) <= 3:
            return DEPTHWISE
        return LARGE_DEPTHWISE_WEIGHTS if weights else LARGE_DEPTHWISE
    return NARROW if channels <= 32 else MIDDLING if channels <= 128 else WIDE


def _tensors(values: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _values(cost: Cost) -> tuple[float, ...]:
    return (cost.flops, cost.moved, cost.compute, cost.transfer, cost.launch)
