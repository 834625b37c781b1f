"""The plot of accuracy against cost: what must be seen in it can be seen."""

from __future__ import annotations

import importlib.util
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq.core.errors import MissingExtraError
from vitq.report.plot import COLOURS, Point, accuracy_cost, spread, write

Text = pytest.importorskip("matplotlib.text").Text


def crowd(methods: int, bits: tuple[str, ...] = ("w8a8", "w4a4")) -> list[Point]:
    """Many methods, all of nearly the same accuracy."""
    return [
        Point(f"method_{n}+modifier", width, 2 + n, 71 + 0.01 * n, 69, 73) for width in bits for n in range(methods)
    ]


def drawn(points: list[Point]) -> tuple[Any, list[Any]]:
    figure = accuracy_cost(points, 75.0, "title")
    figure.draw_without_rendering()
    return figure, figure.axes


@pytest.mark.parametrize("methods", [1, 5, 24])
def test_no_label_covers_another_and_none_is_cut_off(methods: int) -> None:
    figure, panels = drawn(crowd(methods))
    whole = figure.bbox
    assert [axes.get_title() for axes in panels] == ["w8a8", "w4a4"]
    for axes in panels:
        assert {text.get_text() for text in axes.texts} == {"float", *(f"method_{n}+modifier" for n in range(methods))}
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
        boxes = [type(box).from_extents(box.x0, box.y0 + 0.5, box.x1, box.y1 - 0.5) for box in boxes]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)


def test_a_method_has_one_look_in_every_panel_and_no_other_has_it() -> None:
    _, panels = drawn(crowd(24))
    looks: list[dict[str, tuple[str, str]]] = []
    for axes in panels:
        lines = [line for line in axes.lines if line.get_marker() not in ("None", "", "_", "|", None)]
        found = {f"{line.get_ydata()[0]:.2f}": (line.get_color(), line.get_marker()) for line in lines}
        assert len(set(found.values())) == len(found) == 24
        looks.append(found)
    assert looks[0] == looks[1]
    assert {colour for colour, _ in looks[0].values()} == set(COLOURS)


def test_the_float_model_is_a_line_and_intervals_are_drawn() -> None:
    _, (axes,) = drawn(crowd(3, ("w4a4",)))
    assert [75.0, 75.0] in [list(line.get_ydata()) for line in axes.lines]
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < 69
    assert high > 75
    assert len(axes.collections) == 3, "an error bar for each"


def test_the_file_is_a_picture_and_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(accuracy_cost(crowd(3), 75.0, "title"), tmp_path / "new" / name)
    first, second = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingExtraError, match=r"vitq\[report\]"):
        accuracy_cost(crowd(1), 75.0, "title")


heights = st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=30).map(sorted)


@given(heights)
def test_labels_are_spread_without_changing_their_order(wanted: list[float]) -> None:
    gap = 1 / 30
    found = spread(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(found))
    assert found[0] >= 0
    assert found[-1] <= 1 + 1e-9


def test_labels_that_have_room_stay_where_they_are_wanted() -> None:
    assert spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
