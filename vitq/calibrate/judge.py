"""Scores candidates for the parameters of a product's operand by what they do to the product.

Shapes:  params (K, G), score (K, G): K candidates for each of G scale groups; lower is better
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitq.calibrate.objective import Objective
from vitq.calibrate.observe import prime_from
from vitq.calibrate.own_error import OwnError
from vitq.calibrate.products import Chunk, Product
from vitq.quantizers.base import Params, Quantizer

LARGEST = 2**21  # values of a tensor of candidates
OWN = 2**14  # values of a group that stand for all when its own error is looked at first
PART = 8  # one in so many rows is looked at first, and one in so many candidates then on all
FINAL = 16  # candidates at most that are looked at on all


@dataclass(frozen=True)
class _Comparison:
    """Candidates on one sample: what scores them, its largest tensor for one of them, and values of the product."""

    error: Callable[[Params], Tensor]
    largest: int
    values: int


@dataclass
class Judge:
    """Compares the product of quantized operands with the float one, on samples.

    Args:
        model: holds the weights.
        product: what is multiplied.
        chunks: samples of it.
        quantizers: of the left and the right operand, None for one that stays as it is.
        objective: what is better.
    """

    model: nn.Module
    product: Product
    chunks: list[Chunk]
    quantizers: tuple[Quantizer | None, Quantizer | None]
    objective: Objective
    _ready: dict[tuple[bool, bool, int], _Comparison] = field(default_factory=dict)
    _ready_for: tuple[str, Params] | None = None

    def best(self, side: str, params: Params, *, alone: bool = False) -> Tensor:
        """(1, G) best candidate of each group: all are compared on a part, the best of them on everything."""
        count = next(iter(params.values())).shape[0]
        if count < 2 * PART or (not alone and all(self._has_moments(side, chunk) for chunk in self.chunks)):
            return self.score(side, params, alone=alone).argmin(0, keepdim=True)
        keep = min(-(-count // PART), FINAL)
        score = self.score(side, params, alone=alone, first=True)
        score[0] = -torch.inf  # what there is now is compared in any case
        chosen = score.topk(keep, dim=0, largest=False, sorted=False).indices.sort(0).values
        some = {name: value.gather(0, chosen) for name, value in params.items()}
        return chosen.gather(0, self.score(side, some, alone=alone).argmin(0, keepdim=True))

    def score(self, side: str, params: Params, *, alone: bool = False, first: bool = False) -> Tensor:
        """(K, G) score of candidates for one operand, the other being quantized as it is now.

        Args:
            alone: by the error of the operand itself, without the product. So it is wherever the errors of scale
                groups mix in the product (channel scales of an input).
            first: look at one in PART rows, where that is less work, or at about OWN of a group's own values.
        """
        quantizer = self.quantizers[side == "right"]
        assert quantizer is not None
        candidates, total, values = next(iter(params.values())).shape[0], None, 0
        for number in range(len(self.chunks)):
            looked = self._comparison(quantizer, side, number, alone, first)
            parts = []
            for at in torch.arange(candidates).split(max(1, LARGEST // looked.largest)):
                parts.append(looked.error({name: value[at] for name, value in params.items()}))
            here = torch.cat(parts) * looked.values
            total, values = here if total is None else total + here, values + looked.values
        assert total is not None
        return (total / values).nan_to_num(nan=math.inf)

    def _comparison(self, quantizer: Quantizer, side: str, number: int, alone: bool, first: bool) -> _Comparison:
        """Kept while the other operand stays as it is: candidates come in several goes."""
        other = self.quantizers[side == "left"]
        now = {} if other is None or other.baked else other.params()
        if self._ready_for is None or self._ready_for[0] != side or not _same(self._ready_for[1], now):
            self._ready, self._ready_for = {}, (side, {name: value.clone() for name, value in now.items()})
        key = (alone, first, number)
        if key not in self._ready:
            self._ready[key] = self._prepared(quantizer, side, self.chunks[number], alone, first)
        return self._ready[key]

    def _prepared(self, quantizer: Quantizer, side: str, chunk: Chunk, alone: bool, first: bool) -> _Comparison:
        dims = None if alone else self.product.groups_of(side, quantizer)
        if dims is None:
            x = quantizer.layout.by_group(self.operand(side, chunk))
            x = x[:, :: prime_from(x.shape[1] // OWN)] if first and x.shape[1] >= 2 * OWN else x
            if self.objective.square and OwnError.serves(quantizer, x):
                own = OwnError(quantizer, x)
                return _Comparison(own, own.largest, chunk.made.numel())
            return _Comparison(_error_alone(quantizer, x, self.objective), x.numel(), chunk.made.numel())
        if self._has_moments(side, chunk):
            error = self._error_by_moments(quantizer, chunk, dims)
            return _Comparison(error, self.operand(side, chunk).numel(), chunk.made.numel())
        some = chunk.every(PART) if first else chunk
        largest = max(self.operand(side, some).numel(), some.left.numel(), some.made.numel())
        return _Comparison(self._error_of(quantizer, side, some, dims), largest, some.made.numel())

    def error(self, step: int = 1) -> float:
        """Score of both operands quantized as they are now, on one in so many rows."""
        total = values = 0.0
        for chunk in (chunk.every(step) for chunk in self.chunks):
            plain, factor = self._plain(chunk)
            made = self.product.multiply(self.model, self._quantized("left", chunk), self._quantized("right", chunk))
            score = self._compared(made.mul_(factor).sub_(plain)[None], chunk, (), 1)
            total, values = total + float(score) * made.numel(), values + made.numel()
        return total / max(values, 1)

    def _has_moments(self, side: str, chunk: Chunk) -> bool:
        """Whether the error of a weight follows from second moments of the rows, which are fewer numbers than these."""
        flat = side == "right" and self.product.kind == "linear" and chunk.left.ndim == 2
        return flat and self.objective.square and chunk.weight is None and chunk.left.shape[1] <= len(chunk.left)

    def _error_by_moments(
        self, quantizer: Quantizer, chunk: Chunk, dims: tuple[int, ...]
    ) -> Callable[[Params], Tensor]:
        """With d = Q(W) - W and c = (Q(X) - X) W^T squared errors are d Q(X)^T Q(X) d^T + 2 d Q(X)^T c + c^T c."""
        x, weight = self._quantized("left", chunk), self.operand("right", chunk)
        there = (x - chunk.left) @ weight.T
        moments, cross, rest = x.T @ x, (x.T @ there).T, there.square().sum(0)
        simulate = simulator(quantizer, weight)

        def error(params: Params) -> Tensor:
            d = simulate(params).sub_(weight)
            square = (d @ moments).add_(cross, alpha=2).mul_(d).sum(-1, dtype=torch.float64).add_(rest) / len(x)
            return _for_each(square if dims else square.mean(1, keepdim=True), quantizer.layout.groups)

        return error

    def _error_of(
        self, quantizer: Quantizer, side: str, chunk: Chunk, dims: tuple[int, ...]
    ) -> Callable[[Params], Tensor]:
        x, (plain, factor) = self.operand(side, chunk), self._plain(chunk)
        other = self._quantized("left" if side == "right" else "right", chunk) * factor
        simulate, groups = simulator(quantizer, x), quantizer.layout.groups

        def error(params: Params) -> Tensor:
            tried = simulate(params)
            both = (tried, other) if side == "left" else (other, tried)
            made = self.product.multiply(self.model, *both)
            return _for_each(self._compared(made.sub_(plain), chunk, dims, groups), groups)

        return error

    def _compared(self, error: Tensor, chunk: Chunk, dims: tuple[int, ...], groups: int) -> Tensor:
        wanted = _arranged(chunk.made[None], dims, groups)[0]
        weight = None if chunk.weight is None else _arranged(chunk.weight[None], dims, groups)[0]
        return self.objective(_arranged(error, dims, groups), wanted, weight, scores=self.product.kind == "scores")

    def _plain(self, chunk: Chunk) -> tuple[Tensor, float]:
        """The float product without bias, and the factor that makes it that of the model: attention scales scores."""
        plain = self.product.multiply(self.model, chunk.left, self.operand("right", chunk))
        if self.product.kind != "scores":
            return plain, 1.0
        factor = float(chunk.made.norm() / plain.norm().clamp(min=torch.finfo(plain.dtype).tiny))
        return plain.mul_(factor), factor

    def operand(self, side: str, chunk: Chunk) -> Tensor:
        """One operand of a sample in float."""
        if side == "left":
            return chunk.left
        if chunk.right is not None:
            return chunk.right
        assert self.product.right.param is not None
        weight = self.model.get_parameter(self.product.right.param).detach().float()
        return weight[(None,) * (chunk.left.ndim - weight.ndim)] if self.product.kind == "rows" else weight

    def _quantized(self, side: str, chunk: Chunk) -> Tensor:
        quantizer, x = self.quantizers[side == "right"], self.operand(side, chunk)
        if quantizer is None or quantizer.baked:
            return x
        return quantizer.layout.join(quantizer.simulate_with(quantizer.layout.split(x), quantizer.params()))


def _same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _error_alone(quantizer: Quantizer, x: Tensor, objective: Objective) -> Callable[[Params], Tensor]:
    """(K, G) score of a group's own values (G, n)."""
    simulate = quantizer.simulator(x)

    def error(params: Params) -> Tensor:
        tried = simulate({name: value[..., None] for name, value in params.items()})
        return objective(tried.sub_(x)[:, :, None], x[:, None])

    return error


def simulator(quantizer: Quantizer, x: Tensor) -> Callable[[Params], Tensor]:
    """Of K candidates, each (K, G), what they make of x: (K, *x.shape)."""
    layout = quantizer.layout
    wide = layout.split(x)
    simulate, ones = quantizer.simulator(wide), (1,) * (wide.ndim - layout.ndim)

    def simulated(params: Params) -> Tensor:
        shaped = {name: value.reshape(len(value), *ones, *layout.scale_shape) for name, value in params.items()}
        return layout.join(simulate(shaped))

    return simulated


def _for_each(score: Tensor, groups: int) -> Tensor:
    """(K, G) of a score (K, 1), or (K, R) where several groups in a row of a weight are judged together."""
    return score.repeat_interleave(groups // score.shape[1], dim=1)


def _arranged(x: Tensor, dims: tuple[int, ...], most: int) -> Tensor:
    """(K, ...) as (K, G, R, C): the dimensions that keep groups apart come first, the last of the others last.

    Heads that share a group, of which there are `most`, lie side by side.
    """
    front = sorted(d if d < 0 else d - (x.ndim - 1) for d in dims)
    rest = [d for d in range(1 - x.ndim, 0) if d not in front]
    groups = min(math.prod(x.shape[d] for d in front), most)
    moved = x.permute(0, *front, *rest)
    return moved.reshape(len(x), groups, -1, x.shape[rest[-1]])
