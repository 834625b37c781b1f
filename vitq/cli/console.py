"""What every command shares: messages, progress with time left, JSON files, one line per error."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from vitq.core.errors import InputError, VitqError
from vitq.core.files import is_stream, write_text
from vitq.core.progress import Task

P = ParamSpec("P")
R = TypeVar("R")
FAILED = 2
INTERRUPTED = 130
WIDEST = 10_000  # columns


class Say:
    """Prints results to standard output and everything else to standard error; quiet prints errors only."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out = Console(quiet=quiet, highlight=False, soft_wrap=True)
        if not self.out.is_terminal and "COLUMNS" not in os.environ:
            self.out.width = WIDEST  # files and pipes have no width: rows stay on one line
        self.err = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        self.err.print(printable(text), style="dim", markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """What went wrong; printed even if quiet."""
        print_error(text)

    def result(self, text: str) -> None:
        """A line of the result."""
        self.out.print(printable(text), markup=False)

    def table(self, rows: Sequence[Mapping[str, object]], title: str = "") -> None:
        """Rows of the same keys as a table."""
        table = Table(title=title or None, title_justify="left")
        for key in rows[0] if rows else ():
            numeric = all(isinstance(row[key], (int, float)) for row in rows)
            table.add_column(key, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else printable(str(v)) for v in row.values()))
        self.out.print(table)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Progress with time elapsed and time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.err, disable=self.quiet or not self.err.is_terminal, transient=True) as bars:
            number = bars.add_task(description, total=total or None)
            yield _BarTask(bars, number)

    @contextmanager
    def counted(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress for work that tells how much of it is done so far."""
        with self.task(description, total) as task:
            before = 0

            def tell(done: int) -> None:
                nonlocal before
                task.advance(done - before)
                before = done

            yield tell


class _BarTask:
    def __init__(self, bars: Bars, number: Any) -> None:
        self._bars = bars
        self._number = number

    def advance(self, steps: float = 1) -> None:
        self._bars.advance(self._number, steps)


def command(fn: Callable[P, R]) -> Callable[P, R]:
    """Turn errors raised on purpose into one line and exit code 2, and Ctrl-C into exit code 130."""

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fn(*args, **kwargs)
        except VitqError as error:
            print_error(f"error: {error}")
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = (str(error).splitlines() or ["no more memory"])[0]
            print_error(
                f"error: out of memory ({reason}); use a smaller --batch-size, --calib-size or --micro-batch, or "
                f"another device"
            )
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            print_error(f"error: {error}; check the path, its permissions and the space left")
        except KeyboardInterrupt:
            print_error("interrupted; nothing half-written is left behind")
            raise typer.Exit(INTERRUPTED) from None
        raise typer.Exit(FAILED) from None

    return run


def print_error(text: str) -> None:
    """One line on standard error."""
    line = " ".join(part.strip() for part in printable(text).splitlines())
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, style="red", markup=False)


def printable(text: str) -> str:
    """Text without the halves of characters that stand for the bytes of file names that are no UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def check_outputs(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before any work.

    Raises:
        InputError: a folder, or in a place where nothing can be written.
    """
    for path in paths:
        if path is None or is_stream(path):
            continue
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
        _check_place(path, "file")


def check_folder(path: Path | None) -> None:
    """Refuse a folder to write into that is a file, or cannot be made or written to.

    Raises:
        InputError: why.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder")
    _check_place(path / "one", "folder")


def _check_place(path: Path, what: str) -> None:
    here = Path(os.path.realpath(path))
    parent = next(p for p in here.parents if p.exists())
    try:
        handle, name = tempfile.mkstemp(prefix=".vitq.", dir=parent)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; choose another {what}") from error


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write a result file, if one was asked for.

    Raises:
        VitqError: it cannot be written.
    """
    if path is None:
        return
    try:
        write_text(path, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise VitqError(f"{path} could not be written: {error}") from error
