"""The device, the precision, the seeds, and the place of this process among the others."""

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from sfkt_cli.distributed import choose_device, use_gpus
from sfkt_cli.errors import ConfigError
from sfkt_cli.machine import cores_each, forget_peak_memory, keep_freed_memory, peak_memory
from sfkt_cli.settings.config import RuntimeConfig


@dataclass
class DryRunFigures:
    """What a dry run measured; see :mod:`sfkt_cli.training.trial`."""

    shares: int = 1  # GPUs that would share each batch; one of them is tried
    epochs: int = 0  # epochs of the whole training
    steps: int = 0  # steps of each epoch
    images: int = 0  # images that a step sees
    trained: int = 0  # parameters that are trained
    parameters: int = 0  # all parameters, the frozen ones too
    step_s: float = 0.0  # seconds of a step
    epoch_s: float = 0.0  # seconds of an epoch beside its steps: scores, pseudo-labels
    # Seconds that looking at all images would have taken, beyond those looked at.
    skipped_s: float = 0.0
    # Whether the step was tried with fewer images, and its figures are scaled up.
    scaled: bool = False
    model_bytes: int = 0  # size of the weights that are kept
    state_bytes: int = 0  # size of the resumable states while the stage runs
    peak_memory_mb: float = 0.0  # largest memory use

    @property
    def seconds(self) -> float:
        """Seconds of the whole stage."""
        return self.skipped_s + self.epochs * (self.steps * self.step_s + self.epoch_s)


@dataclass(frozen=True)
class Runtime:
    """Where a stage runs."""

    device: torch.device  # device of this process
    precision: torch.dtype  # float32, bfloat16 or float16: the type of autocast regions
    rank: int = 0  # number of this process
    world: int = 1  # number of processes
    sync_batchnorm: bool = False  # whether batch statistics are taken over all processes
    # Whether the precision was chosen here; a precision that was asked for is kept.
    automatic: bool = False
    # In a dry run what it measured: models look at a few images and train for one step.
    dry_run: DryRunFigures | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Processes that share each batch; in a dry run those that would."""
        return self.world if self.dry_run is None else self.dry_run.shares

    def autocast(self, trained: nn.Module | None = None) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for forward passes; nothing under fp32.

        On a CPU the gradients of depthwise convolutions take several times as long in bf16, so if
        such a network is ``trained``, the pass is in fp32.
        """
        precision = self.precision_for(trained)
        if precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=precision)

    def precision_for(self, trained: nn.Module | None) -> torch.dtype:
        """The type of :meth:`autocast`."""
        slow = self.automatic and self.device.type == "cpu" and _has_depthwise(trained)
        return torch.float32 if slow else self.precision

    def cast_frozen(self, model: nn.Module, trained: nn.Module) -> None:
        """Hold the convolutions of a frozen model in the type of :meth:`autocast`.

        Autocast would cast their weights anew in every pass, because it only remembers those of
        trained parameters. From here on the model only works in such regions, in passes that train
        ``trained``. On a CPU, depthwise convolutions with a stride stay in fp32, because the
        gradient for their images takes ten times as long in bf16.
        """
        if self.precision_for(trained) == self.precision:  # else autocast is on now and then
            for layer in model.modules():
                if not isinstance(layer, nn.Conv2d) or is_parametrized(layer):
                    continue
                if self.device.type == "cpu" and _is_depthwise(layer) and max(layer.stride) > 1:
                    _leave_autocast(layer)
                else:
                    layer.to(self.precision)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module here, convolutions in channels-last order."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Move an array to the device; through pinned memory, without waiting, for a GPU."""
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Begin to copy values (N,) to the CPU; returns a function that waits until they are there.

        It does not wait for work that a GPU gets after this call, so the GPU may continue.
        """
        if self.device.type != "cuda":
            return values.tolist
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there = values.to("cpu", non_blocking=True)  # pinned by torch, because it may not wait
        copied.record(torch.cuda.current_stream(self.device))

        def read() -> list[float]:
            copied.synchronize()
            numbers: list[float] = there.tolist()
            return numbers

        return read

    def wait(self) -> None:
        """Wait for the device (before a clock is read)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batch_size(self, wanted: int, count: int) -> int:
        """Rows of a batch over all processes, of which each gets the same share, at least 2."""
        return max(min(wanted, count) // self.shares, 2) * self.shares

    def synchronised(self, module: nn.Module) -> nn.Module:
        """The module with batch norms over all processes, if that is wanted and possible.

        Raises:
            ConfigError: A layer does more than normalise, which would be lost.
        """
        if self.sync_batchnorm and self.world > 1 and self.device.type == "cuda":
            check_batch_norms(module)
            converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
            return converted
        return module

    def parallel(self, objective: nn.Module, *, skips_parameters: bool = False) -> nn.Module:
        """The objective with gradients averaged over the processes.

        ``skips_parameters``: whether some steps leave trained parameters out. Each process keeps
        its own buffers until :meth:`share_buffers`, which takes those of process 0, so that the
        state of process 0 suffices to continue.
        """
        if self.world == 1:
            return objective
        with warnings.catch_warnings():  # torch 2.14 renames the option; 2.9 knows only this one
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(
                objective, broadcast_buffers=False, find_unused_parameters=skips_parameters
            )

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the buffers of process 0, such as its running batch statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes, without gradient."""
        if self.world > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, *facts: bool) -> list[bool]:
        """For each of some facts, whether it holds in any process; one exchange for all of them."""
        if self.world == 1:
            return list(facts)
        return [count > 0 for count in self.sum(torch.tensor(facts, dtype=torch.int32)).tolist()]

    def gather(self, value: Any) -> list[Any]:
        """A small value of each process, by its number."""
        values = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    def environment(self, trained: nn.Module) -> dict[str, str | int]:
        """What decides the last bits of results; a saved state remembers it."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": name,
            "precision": str(self.precision_for(trained)).removeprefix("torch."),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def peak_memory_mb(self) -> float:
        """Largest memory use since the stage began.

        On a GPU that of its allocator, on the CPU the resident memory of the process.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return peak_memory() / 2**20


def _has_depthwise(module: nn.Module | None) -> bool:
    """Whether a module has depthwise convolutions; ONNX networks say so themselves."""
    layers = [] if module is None else module.modules()
    return any(_is_depthwise(layer) or getattr(layer, "depthwise", False) for layer in layers)


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _leave_autocast(layer: nn.Conv2d) -> None:
    """Make a layer work in float32 inside autocast regions, too."""
    forward = layer.forward

    def in_fp32(input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(input.float())

    layer.forward = in_fp32  # type: ignore[method-assign]


def check_batch_norms(module: nn.Module) -> None:
    """Raise ConfigError if torch would lose what a batch norm does beyond normalising."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, layer in module.named_modules():
        if isinstance(layer, plain) and type(layer) not in plain:
            raise ConfigError(
                f"runtime.sync_batchnorm = true: {name} is a {type(layer).__name__}, which torch "
                "would replace by a plain layer: leave the setting out for this backbone"
            )


def make_runtime(config: RuntimeConfig, *, dry: bool = False) -> Runtime:
    """The runtime of this process, from the settings and the processes that joined.

    A ``dry`` run measures and does not train.

    Raises:
        ConfigError: More GPUs are asked for than there are, or the precision does not exist here.
    """
    device = choose_device(config)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = not config.deterministic
    else:
        keep_freed_memory()
        forget_peak_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_each())
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        torch.use_deterministic_algorithms(config.deterministic)  # loads the compiler: two seconds
    precision = _precision(config.precision, device)
    return Runtime(
        device, precision, rank, world, config.sync_batchnorm, automatic=config.precision == "auto",
        dry_run=DryRunFigures(shares=max(use_gpus(config), 1)) if dry else None,
    )  # fmt: skip


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_amx_tile_supported()  # without such units bf16 takes as long
        return torch.bfloat16 if fast else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("runtime.precision = 'fp16' needs a GPU: use fp32 or bf16 on the CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def seed_all(*parts: int | str) -> None:
    """Seed torch from a tuple such as (seed, "bridge", epoch, step)."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))
