"""What the machine gives this process: how many cores, and when its memory is full."""

import os
import re

_FULL_GPU = re.compile(r"(CUDA|HIP) error: out of memory|CU\w+_STATUS_\w*ALLOC\w*_FAILED")
_FULL = re.compile(r"DefaultCPUAllocator|Cannot allocate memory")


def cores() -> int:
    """Number of cores that this process may use; all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_each() -> int:
    """Cores for each of several processes that train here: what SLURM gives a task, or a share."""
    of_task = min(cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", cores())))
    return max(of_task // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def full_memory(kind: str, text: str) -> str | None:
    """What to tell of an error that came from a full memory; None: it came from something else.

    Python, numpy, torch and CUDA raise one each, and torch's for a CPU is a plain RuntimeError.

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
