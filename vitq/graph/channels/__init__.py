"""Channels whose basis is free: where a change of basis in some weights is undone in others.

A *stream* is what linears add to, and what norms and linears read from (the residual stream): its channels can be
mixed by an orthogonal matrix that keeps their mean. *Values* of one head are only summed over tokens between the rows
that make them and the columns that take them: any invertible matrix can stand between. *Scores* are products of a
query and a key: an orthogonal matrix can be given to both, or any one to queries and its inverse to keys.

Found by following channels through one forward, never by names. What does not fit is left, with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from vitq.graph.channels.classes import Classes
from vitq.graph.channels.follow import follow
from vitq.graph.channels.found import Channels, Consumer, Part, Producer, Scores, Stream, Values
from vitq.graph.channels.heads import find_scores, find_values
from vitq.graph.channels.streams import find_streams

__all__ = ["Channels", "Consumer", "Part", "Producer", "Scores", "Stream", "Values", "find_channels"]


def find_channels(model: nn.Module, run: Callable[[nn.Module], Any]) -> Channels:
    """Run a model once and find what can change its basis.

    Args:
        model: without quantizers, in the mode in which it is used.
        run: calls it on an example.
    """
    classes = Classes(follow(model, run))
    left: dict[str, Counter[str]] = {kind: Counter() for kind in ("norms", "values", "scores")}
    return Channels(
        find_streams(model, classes, left["norms"]),
        tuple(find_values(classes, left["values"])),
        tuple(find_scores(classes, left["scores"])),
        {kind: dict(reasons) for kind, reasons in left.items()},
    )
