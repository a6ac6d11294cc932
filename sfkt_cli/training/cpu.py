"""What is special about CPUs: memory, large pages, depthwise convolutions.

Training is correct without any of it, but slower. A reader may skip this file.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names
"""Whether the C library is GNU's: others know nothing of what is asked of it here."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
TRANSIENT = 2.0
"""Peak of a step over what its forward pass keeps: gradients of activations come and go."""
_LARGEST = (256 * 2**20, 32 * 2**20)  # before version 2.35 no more than the second


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
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def kept_bytes(work: Callable[[], object]) -> int:
    """Bytes that forward passes in some work keep for backward passes; it is done once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


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


def has_depthwise(module: nn.Module | None) -> bool:
    """Whether a module has depthwise convolutions; ONNX networks tell it themselves."""
    layers = [] if module is None else module.modules()
    return any(is_depthwise(layer) or getattr(layer, "depthwise", False) for layer in layers)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def leave_autocast(layer: nn.Conv2d) -> None:
    """Have a layer work in float32 inside autocast regions, too."""
    forward = layer.forward

    def in_fp32(input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(input.float())

    layer.forward = in_fp32  # type: ignore[method-assign]
