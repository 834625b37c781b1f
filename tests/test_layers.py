"""The architecture is a test: folders of vitq are floors, and an import may only point to a lower floor.

Every import counts, also one inside a function or under TYPE_CHECKING. vitq/__init__.py and
vitq/__main__.py stand outside the house. The checks take a root, so that they are tested too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "vitq"
MAX_LINES = 400

FLOORS = {
    "core": 0,
    "quantizers": 1,
    "graph": 1,
    "data": 1,
    "calibrate": 2,
    "passes": 3,
    "recipes": 4,
    "pipeline": 5,
    "artifact": 5,
    "evaluate": 6,
    "export": 6,
    "runtime": 6,
    "bench": 6,
    "report": 6,
    "cli": 7,
}
NEIGHBOURS = frozenset({"pipeline", "artifact"})  # modules of the top folder, which may know one another
FIRST_FLOOR_WITHOUT_PAPERS = 3  # passes and everything below serve every paper, so they name none
GENERIC = frozenset({"minmax", "percentile"})  # recipes whose names are ordinary words
OUTSIDE = frozenset({"__init__.py", "__main__.py"})  # of the top folder


def modules(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if not (path.parent == root and path.name in OUTSIDE)]


def dotted(path: Path, root: Path) -> tuple[str, ...]:
    """vitq/passes/fit.py as (passes, fit); an __init__.py as the parts of its package."""
    parts = path.relative_to(root).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, parts below the package) of each import of the package itself; () is its top __init__."""
    package = root.name
    folder = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        found: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = (package, *folder[: len(folder) + 1 - node.level], *base)
            found = [(*base, alias.name) if is_module(root, (*base[1:], alias.name)) else base for alias in node.names]
        for target in found:
            if target[0] == package:
                yield node.lineno, target[1:]  # type: ignore[attr-defined]


def is_module(root: Path, parts: tuple[str, ...]) -> bool:
    path = root.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def unit(parts: tuple[str, ...], root: Path) -> str:
    """The paper (a file of recipes) or sub-package of passes that a module belongs to; "" for none."""
    if parts[0] == "recipes" and len(parts) > 1:
        return parts[1]
    if parts[0] == "passes" and len(parts) > 1 and (root / "passes" / parts[1]).is_dir():
        return parts[1]
    return ""


def upward_imports(path: Path, root: Path) -> list[str]:
    """One message for each import of a file that the floors forbid."""
    here = dotted(path, root)
    name = f"{root.name}/{path.relative_to(root).as_posix()}"
    if here[0] not in FLOORS:
        return [f"{name}: '{here[0]}' has no floor. Move the file into a folder that has one (design: layering)."]
    problems = []
    for line, there in imports(path, root):
        if problem := forbidden(here, there, root):
            problems.append(
                f"{name}:{line} (floor {FLOORS[here[0]]}) imports {'.'.join((root.name, *there))} {problem}"
            )
    return problems


def forbidden(here: tuple[str, ...], there: tuple[str, ...], root: Path) -> str:
    """Why a module may not import another, and what to do; "" if it may."""
    if not there:
        if here[0] == "cli":
            return ""
        return "(the top, which imports everything); import from the module that defines the name."
    if there[0] not in FLOORS:
        return "which has no floor; move it into a folder that has one."
    low, high = FLOORS[there[0]], FLOORS[here[0]]
    if here[0] == there[0]:
        mine, other = unit(here, root), unit(there, root)
        if here[0] == "recipes" and mine and mine != other:
            return f"(floor {low}): recipes stand alone; move what both papers need down into a lower folder."
        if here[0] == "passes" and mine and other and mine != other:
            return f"(floor {low}): sub-packages of passes stand alone; move what both need to passes/ or lower."
        return ""
    if low < high or {here[0], there[0]} <= NEIGHBOURS:
        return ""
    return f"(floor {low}); move what it needs down into a lower folder, or the caller up."


def star_imports(path: Path) -> list[int]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def papers(root: Path) -> set[str]:
    """Names of the recipes that are a paper's name."""
    files = (root / "recipes").glob("[!_.]*")
    return {path.stem for path in files if path.suffix == ".py" or path.is_dir()} - GENERIC


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Identifiers and string literals of a module, with their lines; docstrings are left out."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and (id(node) in prose or not isinstance(node.value, str)):
            continue
        for field in ("id", "attr", "name", "asname", "arg", "module", "value"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 1), text


def mentions(text: str, paper: str) -> bool:
    """Whether whole words of text, in any spelling (repq_vit, RepQViT, RepQ-ViT), are the paper's name."""
    wanted = paper.replace("_", "").lower()
    for word in re.findall(r"[A-Za-z0-9_-]+", text):
        tokens = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", word)
        for start in range(len(tokens)):
            joined = ""
            for token in tokens[start:]:
                joined += token.lower()
                if joined == wanted:
                    return True
    return False


def papers_named(path: Path, root: Path) -> list[str]:
    """Each place where a file on a floor that serves every paper names one of them."""
    if FLOORS.get(dotted(path, root)[0], 0) > FIRST_FLOOR_WITHOUT_PAPERS:
        return []
    name = f"{root.name}/{path.relative_to(root).as_posix()}"
    known = papers(root)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    candidates = [(1, path.relative_to(root).with_suffix("").as_posix()), *names_in(tree)]
    return [
        f"{name}:{line} names the paper {paper!r} in {text!r}; say what it does, not who wrote it, "
        f"or move it into recipes/{paper}.py."
        for line, text in candidates
        for paper in sorted(known)
        if mentions(text, paper)
    ]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_module = pytest.mark.parametrize("path", modules(ROOT), ids=label)


@every_module
def test_imports_point_down(path: Path) -> None:
    assert not (problems := upward_imports(path, ROOT)), "\n".join(problems)


@every_module
def test_no_star_imports(path: Path) -> None:
    assert not (lines := star_imports(path)), f"{label(path)}: star import on line {lines}; name what you import."


@every_module
def test_lower_floors_name_no_paper(path: Path) -> None:
    assert not (problems := papers_named(path, ROOT)), "\n".join(problems)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=label)
def test_module_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_LINES, f"{label(path)} has {lines} lines; split it by concept, below {MAX_LINES} each."


# The checks, checked: a small house with one planted fault at a time.


def plant(top: Path, files: dict[str, str]) -> Path:
    root = top / "vitq"
    house = dict.fromkeys(
        (
            "__init__.py",
            "core/__init__.py",
            "core/roles.py",
            "graph/__init__.py",
            "graph/trace.py",
            "quantizers/__init__.py",
            "quantizers/base.py",
            "passes/__init__.py",
            "passes/base.py",
            "passes/reparam/__init__.py",
            "passes/reparam/fold.py",
            "passes/train/__init__.py",
            "passes/train/loop.py",
            "recipes/__init__.py",
            "recipes/minmax.py",
            "recipes/repq_vit.py",
            "recipes/ptq4vit.py",
            "pipeline.py",
            "artifact.py",
            "report/__init__.py",
            "evaluate/__init__.py",
            "cli/__init__.py",
        ),
        "",
    )
    for name, text in (house | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core/roles.py", "import vitq.graph"),
        ("core/roles.py", "import vitq.graph.trace as t"),
        ("core/roles.py", "from vitq import graph"),
        ("core/roles.py", "from ..graph import trace"),
        ("core/roles.py", "from .. import graph"),
        ("core/roles.py", "def f():\n    from vitq.graph import trace"),
        ("core/roles.py", "if TYPE_CHECKING:\n    from vitq.pipeline import quantize"),
        ("core/roles.py", "import torch, vitq.passes"),
        ("core/roles.py", "import vitq"),
        ("pipeline.py", "from vitq import quantize"),
        ("quantizers/base.py", "from vitq.graph.trace import trace"),
        ("graph/trace.py", "from vitq.quantizers import base"),
        ("passes/base.py", "from vitq.recipes import minmax"),
        ("passes/reparam/fold.py", "from vitq.passes.train.loop import run"),
        ("passes/reparam/fold.py", "from ..train import loop"),
        ("passes/reparam/__init__.py", "from vitq.passes import train"),
        ("recipes/repq_vit.py", "from vitq.recipes.minmax import minmax"),
        ("recipes/repq_vit.py", "from . import minmax"),
        ("recipes/repq_vit.py", "from vitq.recipes import something"),
        ("recipes/repq_vit.py", "from vitq.pipeline import quantize"),
        ("report/__init__.py", "import vitq.evaluate"),
        ("evaluate/__init__.py", "from vitq.cli import main"),
        ("pipeline.py", "import vitq.attic"),
        ("attic.py", "import torch"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, name: str, text: str) -> None:
    root = plant(tmp_path, {name: text})
    (problem,) = upward_imports(root / name, root)
    assert problem.startswith(f"vitq/{name}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core/roles.py", "import torch\nfrom . import errors\nfrom vitq.core import errors"),
        ("quantizers/base.py", "from ..core import roles\nimport vitq.core.roles"),
        ("passes/base.py", "from vitq.passes.reparam import fold"),
        (
            "passes/reparam/fold.py",
            "from vitq.passes.base import Pass\nfrom ..base import Pass\nfrom . import other",
        ),
        ("recipes/__init__.py", "from vitq.recipes import minmax\nfrom . import repq_vit"),
        ("recipes/repq_vit.py", "from vitq.passes.reparam.fold import fold\nfrom vitq.passes import train"),
        ("pipeline.py", "from vitq.artifact import save\nimport vitq.core"),
        ("artifact.py", "from vitq import pipeline"),
        (
            "cli/__init__.py",
            "import vitq\nfrom vitq import load\nfrom vitq.evaluate import top1\nfrom . import main",
        ),
        ("core/roles.py", "import vitquality\nfrom vitquality.cli import x"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path: Path, name: str, text: str) -> None:
    root = plant(tmp_path, {name: text})
    assert upward_imports(root / name, root) == []


def test_the_message_says_where_and_what_to_do(tmp_path: Path) -> None:
    root = plant(tmp_path, {"graph/trace.py": "\n\nfrom vitq.passes.base import Pass"})
    assert upward_imports(root / "graph/trace.py", root) == [
        "vitq/graph/trace.py:3 (floor 1) imports vitq.passes.base (floor 3); "
        "move what it needs down into a lower folder, or the caller up."
    ]


def test_the_top_of_the_package_is_exempt(tmp_path: Path) -> None:
    root = plant(tmp_path, {"__init__.py": "from vitq.cli import main", "__main__.py": "from vitq.cli import main"})
    assert not {root / "__init__.py", root / "__main__.py"} & set(modules(root))
    assert root / "passes" / "__init__.py" in modules(root)


@pytest.mark.parametrize(
    "text",
    [
        "repq_vit = 1",
        "def fold_for_repq_vit(): ...",
        "class RepQViTFold: ...",
        "x.repq_vit",
        "f(repq_vit=1)",
        'if recipe == "repq_vit": ...',
        'raise ValueError(f"{x}: not for RepQ-ViT")',
        "def f(ptq4vit): ...",
        "class PTQ4ViTSearch: ...",
    ],
)
def test_a_paper_named_on_a_lower_floor_is_found(tmp_path: Path, text: str) -> None:
    root = plant(tmp_path, {"passes/base.py": text})
    assert len(papers_named(root / "passes/base.py", root)) == 1


def test_a_file_named_after_a_paper_on_a_lower_floor_is_found(tmp_path: Path) -> None:
    root = plant(tmp_path, {"passes/reparam/repq_vit.py": ""})
    assert len(papers_named(root / "passes/reparam/repq_vit.py", root)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "passes/base.py",
            '"""Source: RepQ-ViT."""\ndef f():\n    """As in repq_vit."""\n    x = 1\n    "see repq_vit"',
        ),
        ("passes/base.py", "# repq_vit folds scales\nminmax = percentile = 'minmax'"),
        ("passes/base.py", "prepq_vitals = 1"),
        ("recipes/repq_vit.py", "repq_vit = 'repq_vit'"),
        ("cli/__init__.py", "default = 'repq_vit'"),
    ],
)
def test_a_paper_may_be_cited_in_prose_and_named_above(tmp_path: Path, name: str, text: str) -> None:
    root = plant(tmp_path, {name: text})
    assert papers_named(root / name, root) == []


def test_a_star_import_is_found(tmp_path: Path) -> None:
    root = plant(tmp_path, {"core/roles.py": "x = 1\ndef f(): ...\nfrom torch import *"})
    assert star_imports(root / "core/roles.py") == [3]
