"""Several processes: what they exchange, and the device of each."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed

from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import RuntimeConfig

_by_itself: ContextVar[bool] = ContextVar("by_itself", default=False)


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Exchange nothing in the block: what is tried in it may fail here and not elsewhere."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def world_size() -> int:
    """Processes that take part in exchanges; 1 within :func:`by_itself`."""
    together = distributed.is_initialized() and not _by_itself.get()
    return distributed.get_world_size() if together else 1


def sharing_processes(value: Tensor) -> int:
    """Processes that share the batch: 1 where no gradient is taken, each then sees all."""
    return world_size() if value.requires_grad else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean over the processes, for terms that are not a mean over the samples of a batch.

    ``value`` has the same shape in each, and comes from equal shares of the batch; all go on with
    the same mean. With gradients averaged over the processes, as DistributedDataParallel does, the
    result is the gradient of the whole batch.
    """
    count = sharing_processes(value)
    return value if count == 1 else _Sum.apply(value) / count


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def from_all_processes(values: Tensor) -> Tensor:
    """The rows (B, ...) of each process, together (world B, ...), by rank; without gradient."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)


# ------------------------------------------------------------------ devices


def use_gpus(config: RuntimeConfig) -> int:
    """How many GPUs of this machine to use, 0: the CPU; raises ConfigError if it has fewer."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = there if config.gpus is None else config.gpus
    if gpus > there:
        cpu = " (the CPU)" if there == 0 else ""
        raise ConfigError(f"--gpus {gpus}: this machine has {there}; use --gpus {there}{cpu}")
    return gpus


def choose_device(config: RuntimeConfig) -> torch.device:
    """The device of this process: the GPU of its number on this machine, or the CPU.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    if not use_gpus(config):
        return torch.device("cpu")
    local, there = 0, torch.cuda.device_count()
    if world_size() > 1 and there > 1:  # SLURM may show each process its own GPU only
        local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= there:
        raise ConfigError(
            f"process {local} of this machine has no GPU of its own, there are {there}: "
            "start as many processes as GPUs, or use --gpus 0"
        )
    return torch.device("cuda", local)
