"""Where a number was measured: code, processor, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]


def machine() -> dict[str, object]:
    """Processor, cores that this process may use, torch and its threads, and how busy the machine is now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
    }


def cpu_model() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout that vitq runs from, with +dirty if the package differs from it; "" without one."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # installed inside some other repository
        head, changed = _git("rev-parse", "--short=10", "HEAD"), _git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+dirty" if changed else "")


def _git(*words: str) -> str:
    run = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True)
    return run.stdout.strip()
