"""What is special about CPUs: memory that is free or kept, and large pages."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sfkt_cli.training import cpu
from sfkt_cli.training.cpu import (
    GLIBC,
    _limits_leave,
    free_memory,
    keep_freed_memory,
    prefer_large_pages,
)

BYTES = 64 * 2**20


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


def _held() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_free_memory_is_what_the_limits_of_the_groups_leave(tmp_path: Path) -> None:
    assert min(_limits_leave(tmp_path)) >= free_memory() > 0
    (tmp_path / "memory.max").write_text("max\n")
    assert _limits_leave(tmp_path) == [2**62]
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 150\n")
    assert min(_limits_leave(tmp_path)) == 450


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
    monkeypatch.setattr(cpu, "free_memory", lambda: 2 * images.nbytes - 2)
    prefer_large_pages([images])
    assert " hg" not in advice(images)
    monkeypatch.setattr(cpu, "free_memory", lambda: 2 * images.nbytes)
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
