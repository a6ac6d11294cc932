"""The device, the precision, the seeds and the place among the processes."""

from __future__ import annotations

import contextlib
import os
import resource
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from sfkt_cli.config import RuntimeConfig
from sfkt_cli.errors import ConfigError


@dataclass(frozen=True)
class Runtime:
    """Where a stage runs.

    Attributes:
        device: Of this process.
        precision: float32, bfloat16 or float16: the type of autocast regions.
        rank: Number of this process.
        world: Number of processes.
    """

    device: torch.device
    precision: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for forward passes; nothing under fp32."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module here, convolutions in channels-last order."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Move an array to the device; through pinned memory, without waiting, for a GPU."""
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def wait(self) -> None:
        """Wait for the device (before a clock is read)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            distributed.barrier()

    def gather_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def peak_memory_mb(self) -> float:
        """Largest memory use so far: of the GPU's allocator, or resident memory on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def count_gpus() -> int:
    """GPUs of this machine that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def make_runtime(config: RuntimeConfig) -> Runtime:
    """The runtime of this process, from the settings and the environment of a launcher.

    Raises:
        ConfigError: More GPUs are asked for than there are, or the precision does not exist here.
    """
    gpus = count_gpus() if config.gpus is None else config.gpus
    if gpus > count_gpus():
        raise ConfigError(
            f"--gpus {gpus}: this machine has {count_gpus()}; use --gpus {count_gpus()}"
            + (" (the CPU)" if count_gpus() == 0 else "")
        )
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    return Runtime(device, _precision(config.precision, device), rank, world)


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("runtime.precision = 'fp16' needs a GPU: use fp32 or bf16 on the CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def seed_all(*parts: int | str) -> None:
    """Seed torch from a tuple such as (seed, "bridge", epoch, step)."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))
