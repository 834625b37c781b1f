"""A registry is filled by scanning a folder, and never keeps quiet about what is wrong with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitq.core.errors import InputError, UnknownNameError
from vitq.core.registry import Registry

TOP = "throw_away_methods"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / TOP
    package.mkdir()
    (package / "__init__.py").write_text(
        "from vitq.core.registry import Registry\nTHINGS = Registry('thing', __name__)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield package
    for name in [n for n in sys.modules if n.split(".")[0] == TOP]:
        del sys.modules[name]


def things() -> Registry[object]:
    return importlib.import_module(TOP).THINGS  # type: ignore[no-any-return]


def write(folder: Path, name: str, function: str, registered: str) -> None:
    text = f"from {TOP} import THINGS\n\n@THINGS.register({registered!r})\ndef {function}():\n    return 1\n"
    (folder / f"{name}.py").write_text(text)


def test_adding_a_file_registers_it_also_in_a_subfolder(folder: Path) -> None:
    write(folder, "one", "one", "one")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "__init__.py").write_text("")
    write(folder / "deeper", "two", "two", "two")
    assert list(things()) == ["one", "two"]
    assert "two" in things()
    assert "three" not in things()
    with pytest.raises(UnknownNameError, match=r"unknown thing 'onee'\. Did you mean 'one'"):
        things()["onee"]


def test_nothing_is_imported_before_the_first_look_up(folder: Path) -> None:
    write(folder, "one", "one", "one")
    registry = things()
    assert f"{TOP}.one" not in sys.modules
    assert registry["one"]
    assert f"{TOP}.one" in sys.modules


def test_two_files_that_take_one_name_are_refused(folder: Path) -> None:
    """Found by this test: the second of two functions of the same name replaced the first in silence."""
    write(folder, "one", "same", "same")
    write(folder, "two", "same", "same")
    with pytest.raises(InputError, match="two things are called 'same'"):
        things()["same"]


def test_a_file_may_be_imported_again(folder: Path) -> None:
    write(folder, "one", "one", "one")
    registry = things()
    assert registry["one"]
    importlib.reload(sys.modules[f"{TOP}.one"])
    assert registry["one"]


def test_a_file_that_cannot_be_imported_is_an_error_every_time(folder: Path) -> None:
    """Found by this test: the second look-up went through what had been found before the error, in silence."""
    write(folder, "one", "one", "one")
    (folder / "two.py").write_text("import no_such_module\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            list(things())


def test_a_name_can_be_forgotten(folder: Path) -> None:
    write(folder, "one", "one", "one")
    registry = things()
    assert registry["one"]
    registry.remove("one")
    assert "one" not in registry
