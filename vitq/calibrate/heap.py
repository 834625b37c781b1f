"""What memory this process holds, what the machine has left, and giving back what is free.

The allocator of glibc keeps what is freed between two blocks that are still in use. Statistics that persist lie between
activations that do not, so over hundreds of micro-batches the process would grow by several times what it holds.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

STATUS, MACHINE, GROUP = Path("/proc/self/statm"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def give_back() -> None:
    """Return free pages, where the C library can (glibc); do nothing elsewhere."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or no way to ask
        return lambda pad: None
    return found


def held(device: torch.device | None, roughly: bool = False) -> int | None:
    """Bytes that tensors on a CUDA device, or else the process in memory, hold; None where nothing tells.

    Args:
        roughly: pages that are free may count, too: nothing is given back before, which takes time, as does getting
            them again.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not roughly:
        give_back()
    try:
        return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def available(device: torch.device | None) -> int | None:
    """Bytes that a CUDA device, or else the machine or the process's container, has left; None where nothing tells."""
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = dict(line.split(":", 1) for line in MACHINE.read_text().splitlines())
        machine = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        limit, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(machine, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine
