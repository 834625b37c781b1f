"""Memory that goes back to the system."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from vitq.calibrate import heap

KEPT, FREED = 2**12, 2**14  # values of a tensor that stays, and of one that goes, in turn


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told to give memory back")
def test_what_lies_between_blocks_in_use_goes_back() -> None:
    heap.give_back()
    kept, freed = [], []
    for _ in range(3000):
        freed.append(torch.ones(FREED))
        kept.append(torch.ones(KEPT))
    freed.clear()
    held = resident()
    heap.give_back()
    assert held - resident() > 0.8 * 3000 * FREED * 4
    assert all(bool((t == 1).all()) for t in kept)


def test_another_c_library_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: Any) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    heap._trim.cache_clear()
    try:
        heap.give_back()
    finally:
        heap._trim.cache_clear()
