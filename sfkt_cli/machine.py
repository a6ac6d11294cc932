"""What the machine gives this process: cores, memory, and how it hands out memory's pages.

Training is correct without any of it, but slower, or ends with an error that says little. A reader
may skip this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names
"""Whether the C library is GNU's: others know nothing of what is asked of it here."""
CGROUPS = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = (256 * 2**20, 32 * 2**20)  # before version 2.35 no more than the second
# The last: of cuDNN, when it tries out algorithms and has no memory left for any.
_FULL_GPU = re.compile(
    r"(CUDA|HIP) error: out of memory|CU\w+_STATUS_\w*ALLOC\w*_FAILED|unable to find an engine"
)
_FULL = re.compile(r"DefaultCPUAllocator|Cannot allocate memory")


def processor() -> str:
    """The name of the processor, or its kind where the system does not tell."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text() if info.is_file() else "")
    return named[1] if named else platform.processor() or platform.machine()


def machine() -> str:
    """The system, the processor, the number of its cores, and GPUs of NVIDIA."""
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    models = Counter(re.findall(r"Model:\s*(.+)", "\n".join(file.read_text() for file in files)))
    parts = [platform.system(), processor(), f"{os.cpu_count()} cores"]
    return ", ".join([*parts, *(f"{number} x {name}" for name, number in models.items())])


def cores() -> int:
    """Number of cores that this process may use; all of them if the system does not say.

    A container may have a share of the time of all cores (``docker run --cpus``).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for most, period in (limit.split() for _, limit in _limits("cpu.max")):
        count = min(count, max(int(most) // int(period), 1))
    return count


def cores_each() -> int:
    """Cores for each of several processes that train here: what SLURM gives a task, or a share."""
    of_task = min(cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", cores())))
    return max(of_task // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def full_memory(kind: str, text: str) -> str | None:
    """The message for an error that came from a full memory; None: it came from something else.

    Python, numpy, torch and CUDA each raise one of their own, and torch's for a CPU is a plain
    RuntimeError.

    Args:
        kind: Name of the error's class.
        text: The error's message.
    """
    if kind == "OutOfMemoryError" or _FULL_GPU.search(text):
        return (
            "the memory of the GPU is full: lower runtime.batch_size, or prepare smaller images "
            "(image_size)"
        )
    if kind.endswith("MemoryError") or _FULL.search(text):
        return (
            "the memory is full: end other programs, lower runtime.batch_size (prepare: "
            "prepare.workers), or prepare smaller images (image_size)"
        )
    return None


def keep_freed_memory() -> None:
    """Make large tensors use the memory of freed ones, in pages that the process already has.

    A step of training frees and takes the same hundreds of megabytes. By default they go back to
    the kernel, which clears each page anew: a tenth to a quarter of a step's time on a CPU
    (docs/decisions.md, 2026-11-26). Tensors above 256 MB still do, because the holes of old ones
    would add up.
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
    _give_back_freed_memory()
    return min(_machine_has(), *_limits_leave())


def _give_back_freed_memory() -> None:
    if GLIBC:
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Reset the measurement of the largest memory use, if the kernel can (Linux)."""
    _give_back_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Largest resident memory in bytes since :func:`forget_peak_memory`, else of the process."""
    with contextlib.suppress(OSError, ValueError):
        words = Path("/proc/self/status").read_text(encoding="utf-8").split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limits(name: str) -> list[tuple[Path, str]]:
    """The process's control groups (version 2) and those above that limit something, and how."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("::")[2].strip("/\n")
        for group in (CGROUPS / own, *(CGROUPS / own).parents):
            if group.is_relative_to(CGROUPS) and (group / name).is_file():
                limit = (group / name).read_text(encoding="ascii").strip()
                limits += [(group, limit)] * (not limit.startswith("max"))
    return limits


def _limits_leave() -> list[int]:
    """What each limit of memory leaves."""
    left = [2**62]
    with contextlib.suppress(OSError, ValueError):
        for group, most in _limits("memory.max"):
            stat = (group / "memory.stat").read_text(encoding="ascii").split()
            cache = int(stat[stat.index("file") + 1])
            used = int((group / "memory.current").read_text(encoding="ascii"))
            left.append(max(int(most) - used + cache, 0))
    return left


def _machine_has() -> int:
    try:
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def prefer_large_pages(arrays: Iterable[NDArray[Any]]) -> None:
    """Have the kernel fetch and map 2 MB at a time of memory maps that rows will be drawn from.

    A drawn order makes a cold disk read little, here and there, and the kernel map small page after
    small page. What would fill more than half of the free memory is left alone: there, 2 MB would
    be fetched for each row that is drawn, over and over.
    """
    maps = [array for array in arrays if isinstance(array.base, mmap.mmap)]
    if sum(array.nbytes for array in maps) > free_memory() // 2:
        return
    for array in maps:
        pages: Any = array.base
        with contextlib.suppress(AttributeError, OSError):  # another system; a kernel without
            pages.madvise(mmap.MADV_HUGEPAGE)
