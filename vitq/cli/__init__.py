"""The command line. One file per group of commands; `app.py` holds what they share."""

from __future__ import annotations

from vitq.cli import bench, demo, diagnose, evaluate, export, inspect, leaderboard, quantize, train, transfer
from vitq.cli.app import app


def main() -> None:
    """Entry point of the `vitq` command."""
    app()


__all__ = [
    "app",
    "bench",
    "demo",
    "diagnose",
    "evaluate",
    "export",
    "inspect",
    "leaderboard",
    "main",
    "quantize",
    "train",
    "transfer",
]
