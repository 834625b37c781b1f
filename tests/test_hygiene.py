"""What no file of the repository may hold, and what every module of vitq must."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
PACKAGE = TOP / "vitq"
MAX_BYTES = 4 * 2**20

# The patterns are put together here so that this file does not hold what it looks for.
MACHINE_FOLDERS = "|".join(("work", "farm", "root", "home"))
MACHINE_PATH = re.compile(rf"(?<![A-Za-z0-9_.)}}\]*-])/(?:{MACHINE_FOLDERS})/")
REGISTRY_HOST = re.compile(
    "|".join(
        re.escape(".".join(labels))
        for labels in (
            ("pypi", "org"),
            ("pypi", "python", "org"),
            ("files", "pythonhosted"),
            ("npmjs", "org"),
            ("npmjs", "com"),
            ("debian", "org"),
            ("download", "pytorch"),
            ("conda", "anaconda"),
        )
    )
)
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")
PICKLES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
HARMLESS = frozenset({"UnpicklingError", "PickleError"})  # what torch.load raises; catching it runs nothing


def repository_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore: they are about to be tracked."""
    if shutil.which("git") is None or not (TOP / ".git").exists():
        return []
    command = ["git", "-C", str(TOP), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [TOP / name for name in sorted(set(names)) if name and (TOP / name).is_file()]


def text_of(path: Path) -> str | None:
    """The text of a file; None if it is binary."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    return data.decode("utf-8", errors="replace")


def matches(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The lines of text that hold the pattern, each with its number."""
    return [
        f"{number}: {line.strip()[:120]}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)
    ]


def lines_with(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(TOP)}:{match}"
        for path in paths
        if (text := text_of(path)) is not None
        for match in matches(text, pattern)
    ]


def pickle_uses(source: str) -> list[str]:
    """Imports of a pickle module, and torch.load without weights_only=True: both run code found in a file."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [] if {alias.name for alias in node.names} <= HARMLESS else [node.module or ""]
            if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                problems.append(f"{node.lineno}: import torch and call torch.load, so that its argument can be checked")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "torch.load",
            "torch.serialization.load",
        }:
            safe = any(
                word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
                for word in node.keywords
            )
            if not safe:
                problems.append(f"{node.lineno}: torch.load needs a literal weights_only=True")
        problems += [
            f"{node.lineno}: imports {name}"  # type: ignore[attr-defined]
            for name in imported
            if name.partition(".")[0] in PICKLES
        ]
    return problems


def lacks_docstring(path: Path) -> bool:
    source = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not source.strip():
        return False
    return not ast.get_docstring(ast.parse(source))


FILES = repository_files()
MODULES = sorted(PACKAGE.rglob("*.py"))
needs_git = pytest.mark.skipif(not FILES, reason="needs git and a checkout to list the files")


@needs_git
def test_no_file_names_a_path_of_one_machine() -> None:
    found = lines_with(FILES, MACHINE_PATH)
    assert not found, "absolute paths of one machine; write them relative to the repository:\n" + "\n".join(found)


@needs_git
def test_no_file_names_a_package_registry() -> None:
    found = lines_with(FILES, REGISTRY_HOST)
    assert not found, "hosts of package registries; the user's own configuration decides:\n" + "\n".join(found)


@needs_git
def test_no_file_is_large() -> None:
    large = {str(path.relative_to(TOP)): size for path in FILES if (size := path.stat().st_size) > MAX_BYTES}
    assert not large, f"over {MAX_BYTES} bytes: {large}; make it smaller, or generate it."


def test_nothing_in_vitq_is_marked_unfinished() -> None:
    found = lines_with(MODULES, UNFINISHED)
    assert not found, "finish it, or open an issue:\n" + "\n".join(found)


def test_vitq_never_unpickles() -> None:
    found = [
        f"{path.relative_to(TOP)}:{problem}"
        for path in MODULES
        for problem in pickle_uses(path.read_text(encoding="utf-8"))
    ]
    assert not found, "loading must never run code from a file (D7); its error alone may be imported:\n" + "\n".join(
        found
    )


def test_every_module_of_vitq_says_what_it_is() -> None:
    found = [str(path.relative_to(TOP)) for path in MODULES if lacks_docstring(path)]
    assert not found, f"no module docstring: {', '.join(found)}"


# The checks, checked.


@pytest.mark.parametrize("text", ["{}", "see {}", '"{}"', "path={}", "file://{}", "`{}`", "PATH=a:{}"])
def test_a_machine_path_is_found(text: str) -> None:
    planted = text.format("/" + "work" + "/main/x")
    assert matches(f"\n{planted}\n", MACHINE_PATH) == [f"2: {planted}"]


@pytest.mark.parametrize("text", ["docs{}", "../a/b{}", "https://example.org{}", "..{}", "{{tmp}}{}", "$(TOP){}"])
def test_a_relative_path_is_not_reported(text: str) -> None:
    assert not matches(text.format("/" + "home" + "/x"), MACHINE_PATH)


def test_a_registry_host_is_found() -> None:
    planted = "https://" + "pypi" + ".org/simple"
    assert matches(planted, REGISTRY_HOST)
    assert not matches("pip install from PyPI", REGISTRY_HOST)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch, cloudpickle",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "from torch import load",
    ],
)
def test_an_unsafe_load_is_found(source: str) -> None:
    assert len(pickle_uses(source)) == 1


def test_a_safe_load_is_not_reported() -> None:
    assert not pickle_uses("from pickle import UnpicklingError")
    assert not pickle_uses("import torch\ntorch.load(f, map_location='cpu', weights_only=True)\njson.load(f)")


def test_a_missing_module_docstring_is_found(tmp_path: Path) -> None:
    for name, source, expected in (
        ("a.py", "import torch\n", True),
        ("b.py", '"""What it is."""\n', False),
        ("__init__.py", "", False),
        ("__main__.py", "", True),
    ):
        (tmp_path / name).write_text(source)
        assert lacks_docstring(tmp_path / name) is expected
