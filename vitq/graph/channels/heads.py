"""Values and scores: the channels of attention heads, from the rows that make them to where they are summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from torch import Tensor

from vitq.graph.channels.classes import Classes, Left, Numbers
from vitq.graph.channels.found import Part, Scores, Values
from vitq.graph.channels.labels import GATE, NORM, ROWS

Found = TypeVar("Found")
Places = dict[str, list[tuple[int, ...]]]  # weight -> for each head, the numbers of its rows or columns
_NO_ROWS = {NORM: "comes out of a norm", GATE: "is multiplied with a parameter"}


def find_values(classes: Classes, left: Counter[str]) -> Iterator[Values]:
    """Those of every attention that can change their basis; others are counted by what is in the way."""
    return _each(classes, classes.trail.mixed, lambda heads: _values(classes, heads), left)


def find_scores(classes: Classes, left: Counter[str]) -> Iterator[Scores]:
    """The same for queries and keys."""
    return _each(classes, classes.trail.scores, lambda pairs: _scores(classes, pairs), left)


def _each(
    classes: Classes, products: list[Tensor], make: Callable[[Numbers], Found], left: Counter[str]
) -> Iterator[Found]:
    done: set[bytes] = set()
    for labels in products:
        heads = classes.numbers(labels)
        key = heads.tobytes()
        if key not in done:  # those of a module that is called again are
            done |= set() if (heads == classes.of[0]).any() else {key}
            try:
                yield make(heads)
            except Left as reason:
                left[str(reason)] += 1


def _values(classes: Classes, heads: Numbers) -> Values:
    """heads: (H, D)"""
    _require_own_rows(classes, heads)
    columns: Places = {}
    for kind, name in classes.uses(heads):
        if kind == "enter":
            entering, _ = classes.one_run(classes.trail.entered[name])
            columns[name] = _places(heads, entering)
            classes.require_unread(name)
        elif kind != "mix" or not _same_heads(classes.numbers(classes.trail.mixed[int(name)]), heads):
            raise Left("is used in another way, too")
    if not columns:
        raise Left("enters no weight")
    rows = tuple(Part(weight, classes.bias_of(weight), tuple(index)) for weight, index in _rows(classes, heads).items())
    return Values(rows, tuple(Part(weight, None, tuple(index)) for weight, index in columns.items()))


def _scores(classes: Classes, pairs: Numbers) -> Scores:
    """pairs: (H, 2, D) queries and keys"""
    _require_own_rows(classes, pairs)
    for kind, name in classes.uses(pairs):
        if kind != "score" or not _same_heads(classes.numbers(classes.trail.scores[int(name)]), pairs):
            raise Left("is used in another way, too")
    sides = [_rows(classes, pairs[:, side]) for side in (0, 1)]
    if any(len(side) > 1 for side in sides):
        raise Left("is made by several weights")
    query, key = (Part(w, classes.bias_of(w), tuple(index)) for side in sides for w, index in side.items())
    return Scores(query, key)


def _require_own_rows(classes: Classes, heads: Numbers) -> None:
    classes.require_followed(heads)
    for made in classes.made_of(heads):
        if made.kind != ROWS:
            raise Left(_NO_ROWS.get(made.kind, "has a parameter added to it"))
    if len(np.unique(heads)) < heads.size:
        raise Left("shares channels between heads, or between queries and keys")


def _same_heads(others: Numbers, heads: Numbers) -> bool:
    """Whether another product that touches these heads takes them as they are."""
    own = {head.tobytes() for head in heads}
    return all(other.tobytes() in own for other in others if np.isin(other, heads).any())


def _rows(classes: Classes, heads: Numbers) -> Places:
    """The rows that make these heads."""
    made = [each.name for each in classes.made_of(heads)]
    return {name: _places(heads, classes.of_range(ROWS, name)) for name in made}


def _places(heads: Numbers, numbers: Numbers) -> list[tuple[int, ...]]:
    """Where the channels of each head lie among the rows or columns of a weight."""
    order = np.argsort(numbers, kind="stable")
    low, high = (np.searchsorted(numbers[order], heads, side) for side in ("left", "right"))
    if (high - low != 1).any():
        raise Left("meets a weight several times, or in part")
    return [tuple(int(place) for place in head) for head in order[low]]
