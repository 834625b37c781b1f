"""Streams: found from the norms, which say which channels belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vitq.graph.channels.classes import Classes, Left, Numbers, tiles
from vitq.graph.channels.found import Consumer, Producer, Stream
from vitq.graph.channels.labels import ELEMENTS, GATE, NORM, ROWS, ZERO, Range

_OTHER_USES = {
    "gate": "is multiplied with a parameter",
    "score": "is a query or a key",
    "norm": "has its channels in another order for another norm",
}


def find_streams(model: nn.Module, classes: Classes, left: Counter[str]) -> tuple[Stream, ...]:
    """Every stream; norms of others are counted by what is in the way."""
    norms_of: dict[tuple[int, ...], list[str]] = {}
    for name, several in classes.trail.normed.items():
        try:
            numbers = classes.one_run(several)[0]
            classes.require_followed(numbers)
            norms_of.setdefault(tuple(_one_token(numbers)), []).append(name)
        except Left as reason:
            left[str(reason)] += 1
    found = []
    for channels, norms in norms_of.items():
        try:
            found.append(_Finder(model, classes, np.array(channels), norms).stream())
        except Left as reason:
            left[str(reason)] += len(norms)
    # A weight that gets a bias as the reader of one stream has it as the producer of the next (Swin's merging).
    biases = {reader.weight: reader.bias for stream in found for reader in stream.consumers}
    return tuple(
        replace(stream, producers=tuple(replace(p, bias=p.bias or biases.get(p.weight)) for p in stream.producers))
        for stream in found
    )


class _Finder:
    def __init__(self, model: nn.Module, classes: Classes, channels: Numbers, norms: list[str]) -> None:
        self.model, self.classes, self.trail = model, classes, classes.trail
        self.channels, self.norms = channels, norms

    def stream(self) -> Stream:
        producers: list[Producer] = []
        shifts: list[tuple[str, int]] = []
        for made in self.classes.made_of(self.channels):
            if made.kind == NORM:
                raise Left("has the output of a norm added to it")
            if made.kind == ELEMENTS:
                shifts.append((made.name, self._axis(made)))
            else:
                producers.append(self._producer(made))
        consumers = [*self._readers(), *(reader for norm in self.norms for reader in self._readers_behind(norm))]
        affine = {norm: self.trail.affine[norm] for norm in self.norms}
        self.classes.require_unread(*(name for pair in affine.values() for name in pair))
        return Stream(len(self.channels), tuple(producers), tuple(consumers), tuple(shifts), affine)

    def _producer(self, made: Range) -> Producer:
        if not tiles(self.classes.of_range(made.kind, made.name), self.channels):
            raise Left("is made in part by a weight")
        if made.kind == ROWS:
            return Producer(made.name, self.classes.bias_of(made.name), None)
        return self._gated(made)

    def _gated(self, gate: Range) -> Producer:
        """The weight whose whole output is multiplied with a parameter, and goes nowhere else."""
        pairs = torch.cat(self.trail.gated[gate.name], dim=1)
        before = np.full(gate.size, ZERO, dtype=np.int64)
        before[pairs[1].numpy()] = self.classes.numbers(pairs[0])
        elements = self.classes.of_range(ELEMENTS, gate.name)
        self.classes.require_followed(np.concatenate([before, elements]))
        behind = self.classes.made_of(before)
        if len(behind) != 1 or behind[0].kind != ROWS or gate.size != len(self.channels):
            raise Left("is multiplied with a parameter that no weight can take up")
        rows = self.classes.of_range(ROWS, behind[0].name)
        if not np.array_equal(rows, before) or self.classes.uses(before) != [("gate", gate.name)]:
            raise Left("is multiplied with a parameter that no weight can take up")
        if (self.classes.members[elements] > 1).any() or self.classes.uses(elements):
            raise Left("a parameter is used in another way, too")
        return Producer(behind[0].name, self.classes.bias_of(behind[0].name), gate.name)

    def _axis(self, made: Range) -> int:
        """The dimension of a parameter along which its elements are the channels."""
        if made.name in self.trail.read | self.trail.entered.keys() or (GATE, made.name) in self.trail.ranges:
            raise Left("a parameter is used in another way, too")
        grid = self.classes.of_range(ELEMENTS, made.name).reshape(made.shape)
        for axis in range(grid.ndim):
            rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
            # Positions that no image has are in no class with anything else.
            read = (self.classes.members[rows] > 1).any(1)
            if all(tiles(row, self.channels) for row in rows[read]):
                return axis
        raise Left("has a parameter added to some of its channels")

    def _readers(self) -> Iterator[Consumer]:
        for kind, name in self.classes.uses(self.channels):
            if kind == "enter":
                yield Consumer(name, self._entered(name, self.channels)[0], None)
            elif kind == "mix":
                rows = self.classes.numbers(self.trail.mixed[int(name)])
                if not all(tiles(row, self.channels) for row in rows[np.isin(rows, self.channels).any(1)]):
                    raise Left("is cut into heads")
            elif kind != "norm" or name not in self.norms:
                raise Left(_OTHER_USES[kind])

    def _readers_behind(self, norm: str) -> Iterator[Consumer]:
        channels = self.classes.of_range(NORM, norm)
        self.classes.require_followed(channels)
        if (self.classes.members[channels] > 1).any():
            raise Left("has a norm whose output is added to something")
        for kind, name in self.classes.uses(channels):
            if kind != "enter":
                raise Left("has a norm whose output goes to something else than weights")
            bias, padded = self._entered(name, channels)
            if self.trail.affine[norm][1] is not None:
                if padded:  # zeros have no share of the norm's bias
                    raise Left("is padded behind a norm")
                bias = bias or self._missing_bias(name)
            yield Consumer(name, bias, norm)

    def _entered(self, weight: str, channels: Numbers) -> tuple[str | None, bool]:
        numbers, padded = self.classes.one_run(self.trail.entered[weight])
        if not tiles(numbers, channels):
            raise Left("enters a weight together with other channels")
        return self.classes.bias_of(weight), padded

    def _missing_bias(self, weight: str) -> str:
        module, _, name = weight.rpartition(".")
        owner = self.model.get_submodule(module)
        bias = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(name, "")
        owners = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
        if not isinstance(owner, owners) or getattr(owner, bias, owner) is not None:
            raise Left("has a norm before a weight that cannot have a bias")
        return f"{module}.{bias}".removeprefix(".")


def _one_token(numbers: Numbers) -> Numbers:
    """One token's channels out of several tokens' side by side."""
    again = np.flatnonzero(numbers[1:] == numbers[0])
    one = numbers[: again[0] + 1] if len(again) else numbers
    if len(one) < 2 or len(np.unique(one)) < len(one) or not tiles(numbers, one):
        raise Left("has channels in no order")
    return one
