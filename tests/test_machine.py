"""Cores, full, free and kept memory, and large pages."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sfkt_cli import machine
from sfkt_cli.errors import explain
from sfkt_cli.machine import (
    GLIBC,
    _limits_leave,
    cores,
    cores_each,
    forget_peak_memory,
    free_memory,
    keep_freed_memory,
    peak_memory,
    prefer_large_pages,
)

TOO_MUCH = 10**15
BYTES = 64 * 2**20


def test_cores_are_those_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert cores() == 64
    for limit, expected in (("max", 64), ("350000", 3), ("20000", 1), ("9900000", 64)):
        (tmp_path / "cpu.max").write_text(f"{limit} 100000\n")  # as `docker run --cpus` writes it
        assert cores() == expected


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
    environment: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
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
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_so_has_a_full_gpu(error: RuntimeError) -> None:
    message, code = explain(error)
    assert code == 1
    assert (message or "").startswith("the memory of the GPU is full: lower runtime.batch_size")


def test_an_operation_that_is_never_the_same_names_the_setting() -> None:
    name = "adaptive_avg_pool2d_backward_cuda"
    text = f"{name} does not have a deterministic implementation, but you set 'torch.use_deter"
    message, code = explain(RuntimeError(text))
    assert code == 1
    assert (message or "").startswith("runtime.deterministic = true: ")
    assert name in (message or "")


def test_other_errors_are_bugs() -> None:
    assert explain(RuntimeError("CUDA error: device-side assert triggered"))[0] is None


def test_freed_memory_is_taken_again_without_the_kernel() -> None:
    """In a process of its own: what is kept here would be kept for all tests."""
    if not GLIBC:
        pytest.skip("needs GNU's C library")
    work = [sys.executable, "-c", f"from {__name__} import look; look()"]
    faults, given_back = map(int, subprocess.check_output(work, text=True).split())
    assert faults < 100  # a page has 4 kB: 16,000 where the kernel gives them anew
    assert given_back > BYTES // 2


def look() -> None:
    """Print page faults of taking memory anew, and how much less is held once it is given back."""
    keep_freed_memory()
    faults = []
    for _ in range(31):  # what is small may lie in the way a few times
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(BYTES, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    held = _held()
    free_memory()
    print(sorted(faults)[15], held - _held())


def test_peak_memory_leaves_out_what_was_freed_before() -> None:
    """In a process of its own, as above."""
    if not GLIBC or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs GNU's C library, and a kernel that can forget")
    work = [sys.executable, "-c", f"from {__name__} import forget; forget()"]
    assert int(subprocess.check_output(work, text=True)) < 2 * BYTES


def forget() -> None:
    """Print how much the peak lies above what torch itself takes, after tensors were freed."""
    before = _held()
    keep_freed_memory()
    tensors = [torch.ones(BYTES // 8, dtype=torch.uint8) for _ in range(64)]
    last = torch.ones(1000)  # lies behind them, so that only a trim gives them back
    del tensors
    forget_peak_memory()
    print(peak_memory() - before, file=sys.stdout if len(last) else sys.stderr)


def _held() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_free_memory_is_what_the_limits_of_the_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert min(_limits_leave()) >= free_memory() > 0
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert _limits_leave() == [2**62]
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 150\n")
    assert min(_limits_leave()) == 450
    assert free_memory() == 450


def advice(array: NDArray[Any]) -> str:
    """What the kernel was told of the pages of a memory map (``VmFlags``)."""
    own = f"{array.ctypes.data & -mmap.PAGESIZE:x}-"
    found = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        found = found or ("here" if line.startswith(own) else "")
        if found and line.startswith("VmFlags:"):
            return line
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells it")
def test_maps_get_large_pages_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no large pages")
    path = tmp_path / "images.bin"
    path.write_bytes(bytes(300 * 64 * 64 * 3))
    images = np.memmap(path, np.uint8, "r", 0, (300, 64, 64, 3))
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * images.nbytes - 2)
    prefer_large_pages([images])
    assert " hg" not in advice(images)
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * images.nbytes)
    prefer_large_pages([images, np.zeros((3, 2, 2))])
    assert " hg" in advice(images)


def test_a_kernel_without_large_pages_is_none_the_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # as one that knows none
    (tmp_path / "images.bin").write_bytes(bytes(4096))
    images = np.memmap(tmp_path / "images.bin", np.uint16, "r", 0, (128, 4, 4))
    prefer_large_pages([images])
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")  # as on another system
    prefer_large_pages([images])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel cannot forget")
def test_peak_memory_counts_from_when_it_was_forgotten() -> None:
    forget_peak_memory()
    before, size = peak_memory(), 2**28
    numbers = np.ones(size, np.uint8)
    assert peak_memory() >= before + size // 2
    del numbers
    forget_peak_memory()
    assert peak_memory() < before + size // 2
