"""Accuracy against cost as a picture: one panel for each width, one colour and marker for each method."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitq.core.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is for the float model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE = 0.16  # height of a label, inches
WIDTH, LEAST_HEIGHT = 5.6, 3.2  # of a panel with its labels, inches
LABELS_AT = 1.03  # in widths of the axes


@dataclass(frozen=True)
class Point:
    """One method at one width; accuracies in percent, cost in float forwards."""

    method: str
    bits: str
    cost: float
    top1: float
    low: float
    high: float


def accuracy_cost(points: Sequence[Point], top1_float: float, title: str) -> Figure:
    """The picture, not yet written.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report", "a plot")
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(sorted(point.method for point in points)))
    style = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, name in enumerate(methods)
    }
    panels = {bits: [p for p in points if p.bits == bits] for bits in dict.fromkeys(p.bits for p in points)}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(found) for found in panels.values()) + 1  # the float line has a label, too
    height = max(LEAST_HEIGHT, 1.3 + most * LINE)
    figure = Figure(figsize=(WIDTH * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, (bits, found) in enumerate(panels.items()):
        _panel(figure.add_subplot(rows, columns, number + 1), bits, found, top1_float, style)
    return figure


def write(figure: Figure, file: Path) -> None:
    """Write a picture; the same figure gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": ""} if file.suffix == ".png" else None)


def _panel(axes: Any, bits: str, points: Sequence[Point], top1_float: float, style: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import LogLocator

    axes.axhline(top1_float, color="black", linestyle="--", linewidth=1)
    for p in points:
        error = [[max(p.top1 - p.low, 0)], [max(p.high - p.top1, 0)]]
        axes.errorbar([p.cost], [p.top1], yerr=error, linestyle="", markersize=5, elinewidth=0.8, **style[p.method])
    axes.set(title=bits, xlabel="cost of quantizing, float forwards", ylabel="top-1, %", xscale="log")
    low, high = min([top1_float, *(p.low for p in points)]), max([top1_float, *(p.high for p in points)])
    margin = 0.05 * max(high - low, 1)
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    right = axes.get_xlim()[1]
    labels = [(p.top1, p.cost, p.method, style[p.method]["color"]) for p in points]
    labels = sorted([*labels, (top1_float, right, "float", "black")])
    span = high - low + 2 * margin
    heights = spread([(top1 - low + margin) / span for top1, *_ in labels], 1 / max(len(labels), LEAST_HEIGHT / LINE))
    for y, (top1, cost, name, colour) in zip(heights, labels, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        where = {"xy": (cost, top1), "xytext": (LABELS_AT, y), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(name, **where, fontsize=7, color=colour, arrowprops=line)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights between 0 and 1, at least a gap apart, with the least squared distance from those wanted (ascending)."""
    blocks: list[list[float]] = []  # neighbours that touch; heights less the gaps below them
    for index, height in enumerate(wanted):
        blocks.append([height - index * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    top = max(1 - (len(wanted) - 1) * gap, 0.0)
    levels = [min(max(fmean(block), 0.0), top) for block in blocks for _ in block]
    return [level + index * gap for index, level in enumerate(levels)]
