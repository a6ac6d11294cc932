"""The cores of this process, and the errors of a full memory."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from sfkt_cli.cli import explain
from sfkt_cli.machine import cores, cores_each

TOO_MUCH = 10**15


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert cores() == 64


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4"}, 3),  # torchrun, or runtime.processes
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),  # srun, which does not always bind tasks to cores
        ({"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, 2),  # torchrun in a task
        ({"SLURM_CPUS_PER_TASK": "64"}, 12),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_processes_share_the_cores_that_they_may_use(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores_each() == expected


@pytest.mark.parametrize("take", [torch.empty, np.empty, bytearray])
def test_a_full_memory_has_a_message(take: type) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        take(100 * TOO_MUCH)
    message, code = explain(caught.value)
    assert code == 1
    assert (message or "").startswith("the memory is full: ")
    assert explain(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) == (message, 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_so_has_a_full_gpu(error: RuntimeError) -> None:
    message, code = explain(error)
    assert code == 1
    assert (message or "").startswith("the memory of the GPU is full: lower runtime.batch_size")


def test_other_errors_are_bugs() -> None:
    assert explain(RuntimeError("CUDA error: device-side assert triggered"))[0] is None
