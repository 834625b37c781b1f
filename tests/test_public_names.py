"""The public names of vitq and its version: what users may rely on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import vitq
import vitq.artifact

TOP = Path(__file__).resolve().parents[1]
PUBLIC = [
    "Format",
    "Modifier",
    "PassSpec",
    "QuantModel",
    "Recipe",
    "Rule",
    "Training",
    "VitqError",
    "__version__",
    "export_onnx",
    "export_openvino",
    "export_to",
    "load",
    "modifier",
    "quantize",
    "recipe",
    "save",
]


def exported(package: str) -> list[str]:
    """Names that an __init__.py imports as themselves, in order of writing."""
    tree = ast.parse((TOP / package / "__init__.py").read_text(encoding="utf-8"))
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [alias.asname for alias in aliases if alias.asname is not None and alias.asname == alias.name]


def test_public_names_are_pinned() -> None:
    assert sorted(exported("vitq")) == PUBLIC
    assert all(hasattr(vitq, name) for name in PUBLIC)


def test_nothing_else_looks_public() -> None:
    submodules = {p.stem for p in (TOP / "vitq").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    others = {n for n in vars(vitq) if not n.startswith("_")} - set(PUBLIC) - submodules
    assert not others


def test_the_artifact_floor_has_three_functions() -> None:
    assert sorted(exported("vitq/artifact")) == ["check_destination", "load", "save"]


def test_the_version_is_that_of_the_package() -> None:
    # tomllib came with Python 3.11; one line needs no parser.
    project = (TOP / "pyproject.toml").read_text(encoding="utf-8").split("[project]")[1]
    found = re.search(r'^version = "([^"]+)"$', project, re.MULTILINE)
    assert found is not None
    assert vitq.__version__ == found[1]
