"""Accuracy against latency of deployments as a picture: one panel for each batch size."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitq.core.errors import MissingExtraError
from vitq.report.plot import COLOURS, LABELS_AT, LEAST_HEIGHT, LINE, WIDTH, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {  # colour and marker; what is simulated is hollow, since its latency is none
    "float": ("black", "o"),
    "integer": (COLOURS[0], "s"),
    "packed": (COLOURS[2], "^"),
    "simulated": (COLOURS[6], "D"),
}


@dataclass(frozen=True)
class Place:
    """One deployment at one batch size; accuracies in percent.

    Attributes:
        ms, ms_low, ms_high: of a call: median and quartiles.
        accuracy, low, high: with its interval, or three times the same without.
    """

    name: str
    kind: str
    batch: int
    ms: float
    ms_low: float
    ms_high: float
    accuracy: float
    low: float
    high: float


def need_matplotlib() -> None:
    """Refuse a plot before anything is measured for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report", "a plot")


def accuracy_latency(places: Sequence[Place], measure: str, title: str) -> Figure:
    """The picture, not yet written.

    Args:
        measure: what the accuracy is, for the axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    batches = sorted({place.batch for place in places})
    height = max(LEAST_HEIGHT, 1.3 + LINE * max((sum(p.batch == b for p in places) for b in batches), default=0))
    figure = Figure(figsize=(WIDTH * max(len(batches), 1), height + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, batch in enumerate(batches):
        axes = figure.add_subplot(1, len(batches), number + 1)
        _panel(axes, [place for place in places if place.batch == batch], measure)
        axes.set_title(f"batch {batch}")
    return figure


def _panel(axes: Any, places: Sequence[Place], measure: str) -> None:
    for p in places:
        colour, marker = KINDS[p.kind]
        face = "none" if p.kind == "simulated" else colour
        x_error = [[max(p.ms - p.ms_low, 0)], [max(p.ms_high - p.ms, 0)]]
        y_error = [[max(p.accuracy - p.low, 0)], [max(p.high - p.accuracy, 0)]]
        axes.errorbar(
            [p.ms], [p.accuracy], xerr=x_error, yerr=y_error, linestyle="", marker=marker, markersize=5,
            elinewidth=0.8, color=colour, markerfacecolor=face,
        )  # fmt: skip
    axes.set(xlabel="latency of a call, ms", ylabel=measure, xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.grid(alpha=0.25)
    low, high = axes.get_ylim()
    ordered = sorted(places, key=lambda p: p.accuracy)
    gap = 1 / max(len(ordered), LEAST_HEIGHT / LINE)
    heights = spread([(p.accuracy - low) / (high - low) for p in ordered], gap)
    for y, p in zip(heights, ordered, strict=True):
        colour, _ = KINDS[p.kind]
        label = f"{p.name} (simulated)" if p.kind == "simulated" else p.name
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        where = {"xy": (p.ms, p.accuracy), "xytext": (LABELS_AT, y), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(label, **where, fontsize=7, color=colour, arrowprops=line)
