"""What every test shares: seeds, threads, hypothesis settings, markers, and the folder ../shared."""

from __future__ import annotations

import getpass
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Files that take minutes start first (below tests/), so that none of them is left for one worker at the end.
LONG = (
    "test_docs_run.py",
    "conformance/test_recipes.py",
    "conformance/test_modifiers.py",
    "real/",
    "hard/",
    "unit/recipes/",
)

# Failing examples must be the same on every machine, and a slow core must not fail a test.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes over ten seconds; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "real: uses the weights and photos of ../shared; skipped where it is absent")
    if sys.dont_write_bytecode:
        # Many tests start Python anew, and each would compile torch and timm again: ten seconds.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = (
            f"{tempfile.gettempdir()}/vitq-bytecode-{getpass.getuser()}"
        )
        sys.dont_write_bytecode = False
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of many tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((i for i, long in enumerate(LONG) if path.startswith(long)), len(LONG))

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name each documentation block that was not run; test_docs_run.py records them."""
    notes = {  # a set: the set-up, call and teardown of a test each report it
        str(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "docs_skip"
    }
    if notes:
        terminalreporter.write_line(f"documentation blocks not run: {len(notes)}")
        for note in sorted(notes):
            terminalreporter.write_line(f"  {note}")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared with real weights and photos; a test that asks for it is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED
