"""Labels: numbers that go through a forward beside the values, each standing for one channel.

Labels:  0 stands for what is not followed, ZERO for exact zeros (padding), which fit every channel
Shapes:  labels of a tensor have its shape; a run of labels along a dimension says which channels lie there
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

ZERO = -1
ROWS, ELEMENTS, NORM, GATE = "rows", "elements", "norm", "gate"
COMPUTED = "computed"  # a bias that is no parameter, or is not always the same


@dataclass(frozen=True)
class Range:
    """The labels first … first + size - 1.

    Attributes:
        kind: ROWS of a weight, ELEMENTS of a parameter that is read as it is, channels behind a NORM or behind a
            GATE (a product with a parameter).
        name: of the weight, the norm, or the parameter.
        shape: of the parameter, for ELEMENTS and GATE.
    """

    kind: str
    name: str
    first: int
    size: int
    shape: tuple[int, ...] = ()

    def holds(self, low: int, high: int) -> bool:
        """Whether all labels from low to high are of this range."""
        return self.first <= low and high < self.first + self.size


@dataclass
class Trail:
    """Where the channels of a model went in one forward.

    Attributes:
        ranges: what the labels stand for, by kind and name.
        count: number of labels, 0 included.
        same: (2, n) labels that are added to one another, or averaged.
        entered: weight -> (n, in) runs of labels that it was multiplied with.
        biases: weight -> its bias, None without one, or COMPUTED.
        normed: norm -> (n, channels) runs of labels that were normalised.
        affine: norm -> names of its weight and bias.
        gated: parameter -> (2, n) a label, and the number of the element that it was multiplied with.
        scores: (n, 2, D) runs of labels of a query and of the key that it meets; one entry for each product.
        mixed: (n, D) runs of labels that one matrix sums over tokens: the values of a head; one for each product.
        lost: labels, and what became of them.
        read: parameters that were read in a way that is not followed.
    """

    ranges: dict[tuple[str, str], Range] = field(default_factory=dict)
    count: int = 1
    same: list[Tensor] = field(default_factory=list)
    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    biases: dict[str, str | None] = field(default_factory=dict)
    normed: dict[str, list[Tensor]] = field(default_factory=dict)
    affine: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    gated: dict[str, list[Tensor]] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    lost: list[tuple[Tensor, str]] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def number(self, kind: str, name: str, size: int, shape: Iterable[int] = ()) -> Range:
        """The labels of something; it gets some when it has none, so that every call of a module shares them."""
        if (kind, name) not in self.ranges:
            self.ranges[kind, name] = Range(kind, name, self.count, size, tuple(shape))
            self.count += size
        return self.ranges[kind, name]

    def parameter_of(self, labels: Tensor) -> Range | None:
        """The parameter whose elements these all are."""
        low, high = int(labels.min()), int(labels.max())
        return next((r for r in self.ranges.values() if r.kind == ELEMENTS and r.holds(low, high)), None)


def span(r: Range, device: torch.device) -> Tensor:
    """All labels of a range."""
    return torch.arange(r.first, r.first + r.size, device=device)


def varies(labels: Tensor, dim: int) -> bool:
    """Whether labels differ along a dimension."""
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def lies_along(labels: Tensor | None, dim: int) -> bool:
    """Whether of the last two dimensions (-1 and -2) this one alone is that of the channels."""
    return labels is not None and varies(labels, dim) and not varies(labels, -3 - dim)


def narrowed(labels: Tensor, keep: Iterable[int]) -> Tensor:
    """Size 1 in all dimensions along which nothing differs, but in those to keep."""
    for dim in set(range(labels.ndim)) - {d % labels.ndim for d in keep}:
        if not varies(labels, dim):
            labels = labels.narrow(dim, 0, 1)
    return labels


def distinct(labels: Tensor) -> Tensor:
    """The labels that occur."""
    found: Tensor = narrowed(labels, ()).cpu().unique()
    return found[found > 0]


def distinct_pairs(a: Tensor, b: Tensor) -> Tensor:
    """(2, n) pairs of labels at the same place."""
    both = narrowed(torch.stack([a, b]), (0,)).flatten(1).cpu()
    base = int(both.max()) - ZERO + 1
    codes = ((both[0] - ZERO) * base + both[1] - ZERO).unique()
    return torch.stack([codes // base, codes % base]) + ZERO


def runs(labels: Tensor, dim: int) -> Tensor:
    """(n, channels) the different runs of labels along a dimension."""
    moved = narrowed(labels.movedim(dim, -1), (-1,))
    found: Tensor = moved.reshape(-1, moved.shape[-1]).cpu().unique(dim=0)
    return found
