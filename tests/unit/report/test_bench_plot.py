"""The picture of accuracy against latency: a panel per batch, and what is simulated is marked so."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitq.core.errors import MissingExtraError
from vitq.report import bench_plot
from vitq.report.bench_plot import Place, accuracy_latency
from vitq.report.plot import write


def places() -> list[Place]:
    return [
        Place(name, kind, batch, ms * batch, ms * batch - 1, ms * batch + 1, top1, top1 - 3, top1 + 3)
        for batch in (1, 16)
        for name, kind, ms, top1 in (("torch", "float", 20.0, 79.0), ("vitq", "simulated", 30.0, 78.0),
                                     ("vitq_ort", "integer", 9.0, 78.1), ("packed", "packed", 22.0, 78.2))
    ]  # fmt: skip


def test_a_panel_for_each_batch_with_every_name(tmp_path: Path) -> None:
    figure = accuracy_latency(places(), "top-1, %", "deit")
    assert [axes.get_title() for axes in figure.axes] == ["batch 1", "batch 16"]
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts) == ["packed", "torch", "vitq (simulated)", "vitq_ort"]
        assert axes.get_ylabel() == "top-1, %"
        fills = {line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "D"}
        assert fills == {"none"}
    for name in ("a.png", "b.png"):
        write(accuracy_latency(places(), "top-1, %", "deit"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vitq\[report\]"):
        accuracy_latency(places(), "top-1, %", "deit")
