"""Memory of the process and of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names
"""Whether the C library is GNU's: others know nothing of what is asked of it here."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = (256 * 2**20, 32 * 2**20)  # before version 2.35 no more than the second


def keep_freed_memory() -> None:
    """Have large tensors lie where freed ones lay, in pages that the process has already.

    A step of training frees and takes the same hundreds of megabytes. By default they go back to
    the kernel, which clears each page anew: a tenth to a quarter of a step's time on a CPU
    (docs/decisions.md, 2026-11-26). Tensors above 256 MB still do, for holes of old ones add up.
    """
    if GLIBC:
        library = ctypes.CDLL(None)
        any(library.mallopt(_MMAP_THRESHOLD, largest) for largest in _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, -1)


def free_memory() -> int:
    """Bytes of memory that this process may still take, page cache included.

    The least of what the machine has and what the limits of containers and batch systems leave.
    What the process keeps for itself is given back first.
    """
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
    return min(_machine_has(), *_limits_leave())


def _limits_leave(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each limit of the process's control groups (version 2) and those above leaves."""
    left = [2**62]
    with contextlib.suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("::")[2].strip("/\n")
        for group in (root / own, *(root / own).parents):
            if not group.is_relative_to(root) or not (group / "memory.max").is_file():
                continue
            most = (group / "memory.max").read_text(encoding="ascii").strip()
            if most != "max":
                stat = (group / "memory.stat").read_text(encoding="ascii").split()
                cache = int(stat[stat.index("file") + 1])
                used = int((group / "memory.current").read_text(encoding="ascii"))
                left.append(max(int(most) - used + cache, 0))
    return left


def _machine_has() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
