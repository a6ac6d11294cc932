"""Memory: what is free, and what a process keeps of what it has had."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfkt_cli.training.memory import GLIBC, _limits_leave, free_memory, keep_freed_memory

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
