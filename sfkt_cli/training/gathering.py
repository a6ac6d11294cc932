"""Tensors of all processes together, for state that every process keeps alike."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from sfkt_cli.reductions import world_size


def from_all_processes(values: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks; without gradient.

    Args:
        values: (B, ...), as many rows in each process.

    Returns:
        (world B, ...); ``values`` itself where there is one process.
    """
    count = world_size()
    if count == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(count)]
    distributed.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)
