"""The tables of README.md and docs/methods are those that results/*.csv give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]


def check(*words: str) -> subprocess.CompletedProcess[str]:
    script = TOP / "benchmarks" / "readme.py"
    return subprocess.run([sys.executable, script, "--check", *words], capture_output=True, text=True, cwd=TOP)


def test_no_table_is_older_than_its_results() -> None:
    done = check()
    assert done.returncode == 0, done.stderr


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    for file in (TOP / "results").glob("*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
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
