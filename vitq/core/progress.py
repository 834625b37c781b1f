"""Progress of long work, told to whoever wants to show it. The default shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work that moves on."""

    def advance(self, steps: float = 1) -> None:
        """Say that so many more steps are done."""


class Progress(Protocol):
    """Where tasks are announced."""

    def task(self, description: str, total: float) -> AbstractContextManager[Task]:
        """Announce work of `total` steps; it ends with the context."""


class _Nothing:
    def advance(self, steps: float = 1) -> None:
        pass


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Announce work of `total` steps."""
        yield _Nothing()
