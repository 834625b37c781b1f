"""vitq leaderboard: rows that are there, rows that are not, and what happens in between."""

from __future__ import annotations

import csv
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vitq.cli import board_run, grid
from vitq.core.errors import CompositionError, InputError
from vitq.core.recipe import MODIFIERS, PASSES, RECIPES
from vitq.evaluate.leaderboard import KEY, MEASURED
from vitq.report.board import Board

from .conftest import Answer, Run, write_images

MODEL = "zoo:seeded_vit"
STUMBLES = """
from vitq.core.recipe import PASSES, RECIPES, Pass, PassSpec, Recipe


@PASSES.register("stumble")
class Stumble(Pass):
    name, slot, cost = "stumble", "fit", ""

    def run(self, qmodel, data, progress):
        raise ZeroDivisionError("of all\\nthings")


def mine(weight_bits, act_bits):
    base = RECIPES["minmax"](weight_bits, act_bits)
    return Recipe("mine", "none", base.formats, (*base.passes, PassSpec.of("stumble")))
"""
VARY = {"cost", "seconds", "float_seconds", "load_before", "bytes"}  # an artifact says how long each pass took, in text


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lasting(path: Path) -> list[dict[str, str]]:
    return [{name: cell for name, cell in row.items() if name not in VARY} for row in rows_of(path)]


def words_for(photos: Path, out: Path, **changes: object) -> list[str]:
    """A small run; a change of None leaves the option out."""
    options: dict[str, Any] = {"calib": photos / "calib", "eval": photos / "eval", "recipes": "minmax,percentile"}
    options |= {"bits": "w8a8", "seeds": "0", "calib-size": 4, "out": out} | changes
    return ["leaderboard", MODEL, *(str(w) for n, v in options.items() if v is not None for w in (f"--{n}", v))]


@pytest.fixture
def ask(run: Run, photos: Path, tmp_path: Path) -> Any:
    """Call it; words are added, options changed."""

    def call(*words: str, out: Path | None = None, **changes: object) -> Answer:
        renamed = {name.replace("_", "-"): value for name, value in changes.items()}
        return run(*words_for(photos, out or tmp_path / "board.csv", **renamed), *words, json_file=True)

    return call


def measured(answer: Answer) -> list[str]:
    """The rows that were measured, as they were announced."""
    lines = " ".join(answer.err.split()).split("row ")[1:]
    return [line.partition(": ")[2].partition(" (")[0] for line in lines if " of " in line[:12]]


def test_every_row_is_measured_and_the_seeds_are_put_together(ask: Any, tmp_path: Path) -> None:
    answer = ask(seeds="0,1", bits="w8a8,w3a3", against="minmax")
    assert answer.code == 0, answer.err
    rows = rows_of(tmp_path / "board.csv")
    assert rows[0]["recipe"] == "float"
    assert [(r["recipe"], r["bits"], r["seed"]) for r in rows[1:]] == [
        (recipe, bits, seed) for seed in "01" for bits in ("w8a8", "w3a3") for recipe in ("minmax", "percentile")
    ]
    assert len({r["evaluation_sha256"] for r in rows}) == len({r["top1_float"] for r in rows[1:]}) == 1
    assert len({r["calibration_sha256"] for r in rows[1:]}) == 2, "each seed draws its own images"
    for row in rows[1:]:
        assert all(row[name] for name in (*KEY[:1], *MEASURED) if name != "macs"), row
        assert float(row["cost"]) == pytest.approx(float(row["seconds"]) / float(row["float_seconds"]), rel=0.05)
        assert row["top1_float"] == rows[0]["top1"]
        assert (row["status"], row["kind"], row["images"]) == ("ok", "simulated", "20")
    found = answer.json["rows"]
    assert [each["bits"] for each in found] == ["w8a8", "w8a8", "w3a3", "w3a3"]
    for each in found:
        own = [float(r["top1"]) for r in rows if (r["recipe"], r["bits"]) == (each["recipe"], each["bits"])]
        assert each["top1"]["middle"] == pytest.approx(sum(own) / 2, abs=1e-3)
        assert (each["minus"] is None) == (each["recipe"] == "minmax")
    assert "simulated" in answer.out
    assert "minus minmax" in answer.out
    assert all(f"{each['top1']['middle']:.2f}" in answer.out for each in found)
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_measures_nothing_and_says_the_same(ask: Any, tmp_path: Path) -> None:
    first = ask()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("board.*")}
    second = ask()
    assert measured(first) == ["float", "minmax w8a8 seed 0", "percentile w8a8 seed 0"]
    assert measured(second) == []
    assert "3 of 3 rows are there" in second.err
    assert second.json == first.json
    assert {file.name: file.read_bytes() for file in tmp_path.glob("board.*")} == before


def test_more_rows_are_added_to_those_that_are_there(ask: Any, tmp_path: Path) -> None:
    ask(recipes="minmax")
    answer = ask(recipes="minmax,percentile", seeds="0,1")
    assert measured(answer) == ["percentile w8a8 seed 0", "minmax w8a8 seed 1", "percentile w8a8 seed 1"]
    again = ask("--option", "p=0.9995", recipes="percentile")
    assert measured(again) == ["percentile p=0.9995 w8a8 seed 0"]
    assert [(r["recipe"], r["options"]) for r in rows_of(tmp_path / "board.csv")].count(("percentile", "")) == 2


def test_the_images_are_always_the_same_ones(ask: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ask(recipes="minmax", images=7, out=tmp_path / f"{name}.csv")
    assert lasting(tmp_path / "a.csv") == lasting(tmp_path / "b.csv")
    assert rows_of(tmp_path / "a.csv")[1]["images"] == "7"


def test_calibration_images_of_any_seed_are_left_out_of_the_evaluation(ask: Any, photos: Path, tmp_path: Path) -> None:
    answer = ask(recipes="minmax", eval=photos / "calib", seeds="0,1,2")
    assert answer.code == 0, answer.err
    counts = {row["images"] for row in rows_of(tmp_path / "board.csv")}
    assert len(counts) == 1
    assert 8 <= int(counts.pop()) <= 16, "20 images, of which three seeds drew 4 each"
    assert "are calibrated on; they are left out" in " ".join(answer.err.split())


def test_on_a_terminal_progress_is_shown(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = ask(recipes="minmax+qwt")
    assert answer.code == 0, answer.err
    for task in ("evaluating the float model", "evaluating", "compensating block by block"):
        assert task in answer.err


# -- what changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "again", "what"),
    [
        ({"eval": "flat2"}, 3, "the evaluation images"),
        ({"images": 9}, 3, "the evaluation images"),
        ({"calib-size": 5}, 2, "the calibration images"),
        ({"checkpoint": "weights"}, 3, "the weights"),
    ],
)
def test_what_was_measured_with_something_else_is_measured_again(
    run: Run, photos: Path, tmp_path: Path, changes: dict[str, Any], again: int, what: str
) -> None:
    from safetensors.torch import save_file

    from vitq.data.source import load_model

    write_images(tmp_path / "other", 20, 7)
    state = {name: value * 1.01 for name, value in load_model(MODEL).model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    named = {"flat2": tmp_path / "other", "weights": tmp_path / "w.safetensors"}
    out = tmp_path / "board.csv"
    assert run(*words_for(photos, out)).code == 0
    old = lasting(out)
    answer = run(*words_for(photos, out, **{name: named.get(value, value) for name, value in changes.items()}))
    assert answer.code == 0, answer.err
    assert len(measured(answer)) == again
    assert f"(again: {what} changed)" in " ".join(answer.err.split())
    assert len(rows_of(out)) == len(old)
    assert lasting(out) != old


def test_rows_of_other_code_are_measured_again_unless_they_are_kept(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    digest = board_run.fingerprint.code_digest
    monkeypatch.setattr(board_run.fingerprint, "code_digest", lambda *recipe: f"{digest(*recipe)[:-1]}x")
    kept = ask("--keep")
    assert measured(kept) == []
    answer = ask()
    assert "(again: vitq's code changed)" in " ".join(answer.err.split())
    assert len(measured(answer)) == 3
    assert measured(ask()) == []


def test_a_row_whose_images_are_lost_is_measured_again(ask: Any, tmp_path: Path) -> None:
    ask()
    (tmp_path / "board.npz").unlink()
    answer = ask()
    assert len(measured(answer)) == 3
    assert "not known" in answer.err


def test_what_would_be_measured_can_be_asked_for(ask: Any, tmp_path: Path) -> None:
    ask(recipes="minmax")
    before = (tmp_path / "board.csv").read_bytes()
    answer = ask("--dry-run", images=5)
    assert answer.code == 0
    assert measured(answer) == []
    assert answer.json["todo"] == [
        ["float", "again: the evaluation images changed"],
        ["minmax w8a8 seed 0", "again: the evaluation images changed"],
        ["percentile w8a8 seed 0", "new"],
    ]
    assert "there" in ask("--dry-run", recipes="minmax").out
    assert (tmp_path / "board.csv").read_bytes() == before


# -- what goes wrong ---------------------------------------------------------------------------------------


def test_a_recipe_that_refuses_is_a_row_with_the_reason(ask: Any, tmp_path: Path) -> None:
    answer = ask(recipes="minmax+qwt,percentile", calib_size=1)
    assert answer.code == 1
    rows = {row["recipe"]: row for row in rows_of(tmp_path / "board.csv")}
    assert rows["minmax+qwt"]["status"] == "failed"
    assert "two calibration images" in rows["minmax+qwt"]["reason"]
    assert not any(rows["minmax+qwt"][name] for name in MEASURED)
    assert rows["percentile"]["status"] == "ok", "the next row is measured all the same"
    assert "error: minmax+qwt w8a8 failed with seed 0: compensating blocks needs two" in answer.err
    assert "percentile" in answer.out
    again = ask(recipes="minmax+qwt,percentile", calib_size=1)
    assert measured(again) == ["minmax+qwt w8a8 seed 0"]
    assert "(again: it failed)" in " ".join(again.err.split())
    assert again.code == 1


def test_a_recipe_with_a_bug_does_not_stop_the_others(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STUMBLES)
    spec = f"{tmp_path}/mine.py:mine"
    try:
        answer = ask(recipes=f"{spec},minmax")
    finally:
        PASSES.remove("stumble")
    assert answer.code == 1
    rows = {row["recipe"]: row for row in rows_of(tmp_path / "board.csv")}
    assert rows[spec]["reason"] == "ZeroDivisionError: of all things"
    assert rows["minmax"]["status"] == "ok"


def test_without_matplotlib_there_is_a_message_and_no_plot(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    answer = ask(recipes="minmax", plot=tmp_path / "p.png")
    assert answer.code == 0
    assert "no plot: a plot needs the package 'matplotlib'" in answer.err
    assert not (tmp_path / "p.png").exists()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(board_run.work, "open_model", reached)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipes": "repq_vt"}, "unknown recipe 'repq_vt'. Did you mean 'repq_vit'"),
        ({"recipes": "minmax,"}, "separated by single commas"),
        ({"recipes": "gptq"}, "is a modifier"),
        ({"recipes": "minmax+gptq", "bits": "w16a8"}, "rounds weights"),
        ({"modifiers": "gptqq"}, "unknown modifier 'gptqq'. Did you mean 'gptq'"),
        ({"bits": "w4a4,4a4"}, "did you mean w4a4"),
        ({"seeds": "0,x"}, "'x' is not a seed"),
        ({"seeds": "-1"}, "'-1' is not a seed"),
        ({"seeds": str(2**63)}, "is not a seed"),
        ({"option": "q=1"}, "q"),
        ({"option": "p=high"}, "must be float"),
        ({"against": "percentle"}, "unknown row to subtract 'percentle'. Did you mean 'percentile'"),
        ({"calib": None}, "name them with --calib"),
        ({"eval": None, "calib": None}, "--calib and --eval"),
        ({"calib": "nowhere"}, "no such file or folder of images: 'nowhere'"),
        ({"eval": "nowhere"}, "no such file or folder of images: 'nowhere'"),
        ({"calib-size": 21}, "asked 21, found 20"),
        ({"calib-size": 0}, "at least one image"),
        ({"out": "board.txt"}, "ends in .csv"),
        ({"device": "gpu"}, "'gpu'"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_used_is_refused_before_any_work(
    run: Run, photos: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    out = changes.pop("out", "board.csv")
    answer = run(*words_for(photos, tmp_path / out, **({"recipes": "percentile"} | changes)))
    assert says in answer.error
    assert list(tmp_path.iterdir()) == []


def test_more_images_than_there_are(ask: Any) -> None:
    assert "--images 21" in ask(images=21).error


def test_a_file_that_is_no_leaderboard_is_left_alone(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "board.csv").write_text("a,b\n1,2\n")
    assert "is no leaderboard" in ask().error
    assert (tmp_path / "board.csv").read_text() == "a,b\n1,2\n"


# -- counting ----------------------------------------------------------------------------------------------


def test_multiply_accumulates_are_counted_once_for_all_seeds_also_afterwards(ask: Any, tmp_path: Path) -> None:
    ask(recipes="minmax", seeds="0,1")
    assert {row["macs"] for row in rows_of(tmp_path / "board.csv")} == {""}
    answer = ask("--count-macs", recipes="minmax", seeds="0,1")
    assert measured(answer) == ["minmax w8a8 seed 0"]
    assert "(to be counted)" in " ".join(answer.err.split())
    macs = {row["seed"]: row["macs"] for row in rows_of(tmp_path / "board.csv")}
    assert float(macs["0"]) >= 1
    assert macs["1"] == ""
    assert answer.json["rows"][0]["macs"] == float(macs["0"])
    assert measured(ask("--count-macs", recipes="minmax", seeds="0,1")) == []
    fresh = ask("--count-macs", recipes="minmax", out=tmp_path / "fresh.csv")
    assert fresh.json["rows"][0]["macs"] == float(macs["0"]), "the same on every run"


# -- the grid ----------------------------------------------------------------------------------------------


def names(found: Sequence[grid.Entry]) -> list[tuple[str, str, int]]:
    return [(entry.name, entry.bits, entry.seed) for entry in found]


def test_all_is_every_recipe_and_modifiers_come_on_top() -> None:
    found, notes = grid.grid("all", None, "w4a4", "0", {})
    assert [entry.name for entry in found] == list(RECIPES)
    assert notes == []
    found, notes = grid.grid("minmax", "all", "w4a4", "0", {})
    left_out = [note.partition(" w4a4")[0] for note in notes]
    assert sorted([e.name for e in found] + left_out) == ["minmax", *sorted(f"minmax+{name}" for name in MODIFIERS)]
    assert {"minmax", "minmax+gptq", "minmax+qwt"} <= {entry.name for entry in found}


def test_seeds_come_last_so_that_a_whole_board_is_there_early() -> None:
    found, _ = grid.grid("minmax,percentile", None, "W4A4,w3a3,w4a4", "1,0,1", {})
    assert names(found) == [(r, b, s) for s in (1, 0) for b in ("w4a4", "w3a3") for r in ("minmax", "percentile")]


def test_one_recipe_written_in_two_ways_is_one() -> None:
    found, _ = grid.grid("minmax+qwt+gptq,minmax+gptq", "qwt", "w4a4", "0", {})
    assert [entry.name for entry in found] == ["minmax+gptq+qwt", "minmax+gptq"]


def test_modifiers_that_do_not_fit_are_left_out_with_a_note_and_written_ones_refused() -> None:
    found, notes = grid.grid("minmax", "gptq,qwt", "w16a8,w4a4", "0", {})
    assert ("minmax+gptq", "w16a8", 0) not in names(found)
    assert {("minmax+gptq", "w4a4", 0), ("minmax+qwt", "w16a8", 0)} <= set(names(found))
    assert [note.partition(" is left out")[0] for note in notes if "gptq" in note] == ["minmax+gptq w16a8"]
    with pytest.raises(CompositionError):
        grid.grid("minmax+gptq", None, "w16a8", "0", {})
    with pytest.raises(InputError, match="unknown modifier"):
        grid.grid("minmax", "nothing", "w4a4", "0", {})


# -- being stopped -----------------------------------------------------------------------------------------

# Started in the background (nohup, a shell's &), a process ignores SIGINT, and so do those that it starts.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from vitq.cli import main
main()
"""
ROWS = {"recipes": "minmax,percentile,repq_vit", "bits": "w8a8,w4a4", "images": "12"}


def start(photos: Path, out: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, *words_for(photos, out, **ROWS)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stop_after(rows: int, process: subprocess.Popen[str], out: Path, how: int) -> int:
    """Send a signal as soon as so many rows are there; how many there are then."""
    while not out.exists() or len(out.read_text(encoding="utf-8").splitlines()) <= rows:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=120)
    return len(rows_of(out))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_goes_on_where_it_was(
    run: Run, photos: Path, tmp_path: Path, how: int, code: int
) -> None:
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    assert run(*words_for(photos, whole, **ROWS)).code == 0
    process = start(photos, part)
    there = stop_after(3, process, part, how)
    assert process.returncode == code
    assert 3 <= there < 7, "it was stopped before its end"
    answer = run(*words_for(photos, part, **ROWS))
    assert answer.code == 0
    assert len(measured(answer)) == 7 - there, "only what was missing"
    assert lasting(part) == lasting(whole)
    for one, other in zip(rows_of(part)[1:], rows_of(whole)[1:], strict=True):
        assert abs(int(one["bytes"]) - int(other["bytes"])) < 100
    boards = [Board(path, KEY) for path in (whole, part)]
    for key in boards[0].rows:
        found = [board.correct(key) for board in boards]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0].equal(found[1])
