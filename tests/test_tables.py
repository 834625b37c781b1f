"""The tables of README.md and docs/methods are those of results/ and docstrings, and every method has a page."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.evaluate.leaderboard import KEY, MEASURED
from vitq.report.board import Board

TOP = Path(__file__).resolve().parents[1]
METHODS = TOP / "docs" / "methods"


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    script = TOP / "benchmarks" / "readme.py"
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, cwd=TOP)


def check(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return call("--check", *words)


def test_no_table_is_older_than_its_results() -> None:
    done = check()
    assert done.returncode == 0, done.stderr


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(TOP / "results", tmp_path, dirs_exist_ok=True)
    speed = tmp_path / "speed.csv"
    lines = speed.read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("limit")
    changed = []
    for line in lines[1:]:
        cells = line.split(",")
        changed.append(",".join([*cells[:column], "77", *cells[column + 1 :]]))
    speed.write_text("\n".join([lines[0], *changed]) + "\n", encoding="utf-8")
    done = check("--results", str(tmp_path))
    assert done.returncode == 1
    assert "README.md is not what the results say" in done.stderr


def test_every_method_has_a_page() -> None:
    assert {page.stem for page in METHODS.glob("*.md")} == {"README", *RECIPES, *MODIFIERS}


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    shutil.copyfile(TOP / "README.md", tmp_path / "README.md")
    return shutil.copytree(METHODS, tmp_path / "methods")


def words(methods: Path) -> tuple[str | Path, ...]:
    """Copies instead of the pages and the README."""
    return "--methods", methods, "--readme", methods.parent / "README.md"


def test_a_page_that_is_older_than_its_docstring_is_noticed_and_written_again(methods: Path) -> None:
    page = methods / "repq_vit.md"
    good = page.read_text(encoding="utf-8")
    page.write_text(good.replace("log base sqrt(2)", "log base 7") + "\n## By hand\n\nA finding.\n", encoding="utf-8")
    (methods / "gptq.md").unlink()
    done = check(*words(methods))
    assert done.returncode == 1
    assert "repq_vit.md, gptq.md" in done.stderr or "gptq.md, repq_vit.md" in done.stderr
    assert not (methods / "gptq.md").exists()
    assert call(*words(methods)).returncode == 0
    assert page.read_text(encoding="utf-8") == good + "\n## By hand\n\nA finding.\n"
    assert (methods / "gptq.md").read_text(encoding="utf-8") == (METHODS / "gptq.md").read_text(encoding="utf-8")


def add(board: Board, recipe: str, correct: torch.Tensor, bits: str = "", seed: str = "") -> None:
    """A row with numbers that are easy to tell."""
    same = {"weights_sha256": "w", "evaluation_sha256": "e", "status": "ok", "reason": "", "commit": "c0ffee"}
    numbers = {"cost": 12.5, "seconds": 3, "macs": "", "bytes": 1_230_000, "weight_bits": 4, "act_bits": 4}
    row = dict.fromkeys((*KEY, *MEASURED), "") | same | numbers | {"extra_macs": 0, "version": "0"}
    row |= {"evaluation": "val", "calibration": "photos", "calibration_images": 32}
    row |= {"model": "some_model", "recipe": recipe, "bits": bits, "seed": seed, "images": len(correct)}
    board.add(row | {"top1": round(100 * float(correct.double().mean()), 4)}, correct)


def test_pages_show_the_leaderboard(tmp_path: Path, methods: Path) -> None:
    results = shutil.copytree(TOP / "results", tmp_path / "results")
    for suffix in (".csv", ".npz"):
        (results / f"leaderboard{suffix}").unlink(missing_ok=True)
    board = Board(results / "leaderboard.csv", KEY)
    first = torch.arange(100)
    add(board, "float", first < 80)
    for seed, count in (("0", 60), ("1", 70)):
        add(board, "repq_vit", first < count, "w4a4", seed)
        add(board, "repq_vit+gptq", first < count + 4, "w4a4", seed)
    done = call(*words(methods), "--results", results)
    assert done.returncode == 0, done.stderr
    recipe, modifier, index = (
        (methods / f"{n}.md").read_text(encoding="utf-8") for n in ("repq_vit", "gptq", "README")
    )
    assert "| some_model | w4a4 | repq_vit | 65.00 [" in recipe
    assert "| 0.812 | -15.00 [" in recipe
    assert "repq_vit+gptq | 69.00 [" in recipe
    assert "100 images of val, calibrated on 32 of photos; seeds 0, 1; commit c0ffee" in recipe
    assert "minus the same without" in modifier
    assert "| +4.00 [" in modifier
    assert "| 12.5 | 1.23 |" in modifier
    assert "some_model w4a4" in index
    (row,) = (line for line in index.splitlines() if line.startswith("| [`repq_vit`]"))
    assert "| 0.812 |" in row
