"""What is found: which rows and columns of which weights share a basis. Names of parameters, and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

Index = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """Some channels of one weight, by head: its rows, or its columns.

    Attributes:
        weight: name of the parameter.
        bias: of the bias that belongs to the rows, None where there is none.
        index: (heads, D) numbers of the rows or columns.
    """

    weight: str
    bias: str | None
    index: Index


@dataclass(frozen=True)
class Values:
    """Rows that make the values of an attention, and columns that take what becomes of them, head by head."""

    rows: tuple[Part, ...]
    columns: tuple[Part, ...]


@dataclass(frozen=True)
class Scores:
    """Rows that make queries, and rows that make the keys that these meet, head by head."""

    queries: Part
    keys: Part


@dataclass(frozen=True)
class Producer:
    """A weight whose output is added to a stream, multiplied with the parameter `gate` on the way, if there is one."""

    weight: str
    bias: str | None
    gate: str | None


@dataclass(frozen=True)
class Consumer:
    """A weight that reads a stream, behind the norm `norm`, if there is one.

    A bias that takes up the shift of the norm, and is missing, has the name that it will have.
    """

    weight: str
    bias: str | None
    norm: str | None


@dataclass(frozen=True)
class Stream:
    """What is added to, and read from, in the same channels.

    Attributes:
        width: number of channels; a weight may see several tokens of them side by side.
        producers, consumers: weights.
        shifts: parameters that are added (embeddings, tokens), with the dimension of their channels.
        norms: name -> weight and bias of each norm, None where it has none.
    """

    width: int
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    shifts: tuple[tuple[str, int], ...]
    norms: dict[str, tuple[str | None, str | None]]


@dataclass(frozen=True)
class Channels:
    """Everything found; and for "norms", "values" and "scores", how many were left, by reason."""

    streams: tuple[Stream, ...]
    values: tuple[Values, ...]
    scores: tuple[Scores, ...]
    left: dict[str, dict[str, int]] = field(default_factory=dict)
