"""Resident memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, MiB."""
    # Linux's ru_maxrss starts at the peak of the process that started this one; VmHWM does not.
    kib = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kib / 1024, 1)


def rss_mb() -> float:
    """Resident memory of this process now, MiB; its peak where the system does not tell."""
    return round((_status("VmRSS") or 1024 * peak_rss_mb()) / 1024, 1)


def _status(field: str) -> int:
    """A line of Linux's account of this process, KiB; 0 without one."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
