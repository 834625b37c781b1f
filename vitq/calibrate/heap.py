"""Give free memory back to the system between micro-batches.

The allocator of glibc keeps what is freed between two blocks that are still in use. Statistics that persist lie between
activations that do not, so over hundreds of micro-batches the process would grow by several times what it holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


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
