"""Means over the processes that share a batch, with their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed

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
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together and not _by_itself.get() else 1


def sharing_processes(value: Tensor) -> int:
    """Processes that share the batch: 1 where no gradient is taken, each then sees all."""
    return world_size() if value.requires_grad else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean over the processes, for terms that are no mean over the samples of a batch.

    Each process goes on with the same value. With gradients averaged over the processes, as
    DistributedDataParallel does, the result is the gradient of the whole batch.

    Args:
        value: Of the same shape in each process, from equal shares of the batch.
    """
    count = sharing_processes(value)
    if count == 1:
        return value
    summed: Tensor = _Sum.apply(value)
    return summed / count


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(value: Tensor) -> Tensor:
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed
