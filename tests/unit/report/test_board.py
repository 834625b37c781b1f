"""The leaderboard's two files: rows, and which images each of them got right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitq.core.errors import ArtifactError, DataError
from vitq.report import board as module
from vitq.report.board import Board, changed

COLUMNS = ("recipe", "seed")


def right(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.3


def row(recipe: str, correct: Tensor | None, seed: int = 0, **more: object) -> dict[str, object]:
    measured = {"images": "", "top1": ""}
    if correct is not None:
        measured = {"images": str(len(correct)), "top1": f"{100 * float(correct.double().mean()):.4f}"}
    return {"recipe": recipe, "seed": seed, **measured, **more}


@pytest.mark.parametrize("images", [1, 7, 8, 9, 700])
def test_every_image_comes_back(tmp_path: Path, images: int) -> None:
    board = Board(tmp_path / "b.csv", COLUMNS)
    wanted = {("a", "0"): right(images), ("b", "0"): right(images, 1)}
    for (recipe, _), correct in wanted.items():
        board.add(row(recipe, correct), correct)
    again = Board(tmp_path / "b.csv", COLUMNS)
    assert list(again.rows) == list(wanted)
    for key, correct in wanted.items():
        found = again.correct(key)
        assert found is not None
        assert torch.equal(found, correct)


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path: Path) -> None:
    board = Board(tmp_path / "b.csv", COLUMNS)
    for recipe in "ab":
        board.add(row(recipe, right(20)), right(20))
    board.add(row("a", right(30, 2)), right(30, 2))
    assert list(board.rows) == [("a", "0"), ("b", "0")]
    assert board.rows["a", "0"]["images"] == "30"
    found = board.correct(("a", "0"))
    assert found is not None
    assert torch.equal(found, right(30, 2))


def test_a_row_that_fails_forgets_its_images(tmp_path: Path) -> None:
    board = Board(tmp_path / "b.csv", COLUMNS)
    board.add(row("a", right(20)), right(20))
    board.add(row("a", None), None)
    assert board.correct(("a", "0")) is None


def test_cells_are_filled_in(tmp_path: Path) -> None:
    board = Board(tmp_path / "b.csv", COLUMNS)
    board.add(row("a", right(20), macs=""), right(20))
    board.change(("a", "0"), macs=3)
    assert board.rows["a", "0"]["macs"] == "3"
    assert board.correct(("a", "0")) is not None


def test_two_boards_on_one_file_do_not_lose_rows(tmp_path: Path) -> None:
    first, second = (Board(tmp_path / "b.csv", COLUMNS) for _ in range(2))
    first.add(row("a", right(20)), right(20))
    second.add(row("b", right(20, 1)), right(20, 1))
    both = Board(tmp_path / "b.csv", COLUMNS)
    assert [both.correct((name, "0")) is not None for name in "ab"] == [True, True]


def test_images_that_are_not_those_of_the_row_are_not_believed(tmp_path: Path) -> None:
    """The second file is written first: if nothing follows, it is ahead of the first."""
    board = Board(tmp_path / "b.csv", COLUMNS)
    board.add(row("a", right(64)), right(64))
    old = (tmp_path / "b.csv").read_bytes()
    for newer in (right(64, 9), right(40)):
        board.add(row("a", newer), newer)
        (tmp_path / "b.csv").write_bytes(old)
        assert Board(tmp_path / "b.csv", COLUMNS).correct(("a", "0")) is None
    (tmp_path / "b.npz").unlink()
    assert Board(tmp_path / "b.csv", COLUMNS).correct(("a", "0")) is None


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column recipe, seed, images, top1"):
        Board(tmp_path / "other.csv", COLUMNS)
    (tmp_path / "b.npz").write_bytes(b"no zip at all")
    with pytest.raises(DataError, match="delete it"):
        Board(tmp_path / "b.csv", COLUMNS)


def test_a_failed_write_leaves_both_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "b.csv", COLUMNS)
    board.add(row("a", right(20)), right(20))
    before = [(tmp_path / name).read_bytes() for name in ("b.csv", "b.npz")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left"):
        board.add(row("b", right(20)), right(20))
    assert [(tmp_path / name).read_bytes() for name in ("b.csv", "b.npz")] == before


def test_what_changed_is_named() -> None:
    assert changed({"a": "1", "b": "x"}, {"a": 1, "b": "y", "c": "z"}, ["a", "b", "c"]) == ["b", "c"]
