"""Choose the scales of one site from its statistics: candidates, an objective, the best per scale group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.calibrate import candidates
from vitq.calibrate.observe import TAIL, Sketch, Statistics
from vitq.core.errors import InputError
from vitq.quantizers.base import Params, Quantizer

CHUNK = 2**18  # candidate-values scored at a time: they stay in the cache


@dataclass(frozen=True)
class Search:
    """How ranges are chosen.

    Attributes:
        method: "minmax", "percentile" (one clip, no scoring), "percentile_mse" (RepQ-ViT's three clips, the
            best by squared error) or "mse" (100 shrunken ranges, the best by squared error).
        percentile: the clip of "percentile".
        exact: score on every value instead of exact tails and a sample of the body.
    """

    method: str = "minmax"
    percentile: float = 0.9999
    exact: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown fitting method {self.method!r}; use one of {', '.join(METHODS)}")
        if not 0.999 <= self.percentile <= 1.0:
            raise InputError(f"percentile {self.percentile} is not in [0.999, 1]; it is a probability")

    def sketch(self, quantizer: Quantizer, images: int | None = None) -> Sketch:
        """What gathers the statistics that this search needs."""
        needs = {"minmax": "range", "percentile": "tails"}.get(self.method, "sample")
        tail = 1 - self.percentile if self.method == "percentile" else TAIL  # each keeps what it asks for
        return Sketch(keep_all=self.exact, images=images, one_sided=quantizer.one_sided, needs=needs, tail=tail)

    def params(self, quantizer: Quantizer, stats: Statistics) -> Params:
        """The best parameters, each (G,)."""
        low, high = METHODS[self.method](self, quantizer, stats)
        low, high = _not_inverted(stats, low, high)
        tried = quantizer.range_to_params(low, high)
        if low.shape[0] == 1:
            return {name: value[0] for name, value in tried.items()}
        score = sketch_error(quantizer, tried, stats)
        best = score.argmin(0, keepdim=True)
        return {name: value.gather(0, best)[0] for name, value in tried.items()}

    def fit(self, quantizer: Quantizer, x: Tensor) -> None:
        """Choose the quantizer's parameters from one tensor in the site's own shape."""
        sketch = self.sketch(quantizer)
        sketch.observe(quantizer.layout.by_group(x.detach().to(torch.float32)))
        quantizer.set_params(self.params(quantizer, sketch.statistics()))


def sketch_error(quantizer: Quantizer, params: Params, stats: Statistics) -> Tensor:
    """(K, G) mean squared error of every candidate on a site's own values.

    Args:
        params: each (K, G).

    Clipping errors come from the exact tails, rounding errors of the body from its sample
    (calibrate/observe.py); with `stats.exact` both are exact.
    """
    total = _error(quantizer, params, stats.body) * stats.body_weight
    for tail in (stats.bottom, stats.top):
        if tail.shape[1]:
            total = total + _error(quantizer, params, tail)
    return total / stats.count


def _error(quantizer: Quantizer, params: Params, x: Tensor) -> Tensor:
    """(K, G) summed squared error over (G, n) values, NaN counted as nothing; float64 sums."""
    wide = {name: value[..., None] for name, value in params.items()}
    some = next(iter(params.values()))
    step = max(1, CHUNK // some.numel())
    total = torch.zeros(some.shape, dtype=torch.float64, device=x.device)
    for part in x.split(step, dim=1):
        error = quantizer.simulate_with(part.expand(*some.shape[:1], *part.shape), wide).sub_(part).square_()
        total += error.nansum(-1, dtype=torch.float64)
    return total


def _not_inverted(stats: Statistics, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Percentiles of a nearly constant group can coincide though it has outliers: then take the whole range.

    Differs from the official RepQ-ViT code also in parity mode: there such a candidate scores NaN and is passed over.
    """
    collapsed = (high <= low) & (stats.high > stats.low)
    return torch.where(collapsed, stats.low, low), torch.where(collapsed, stats.high, high)


def _minmax(search: Search, quantizer: Quantizer, stats: Statistics) -> candidates.Ranges:
    return candidates.minmax(stats)


def _percentile(search: Search, quantizer: Quantizer, stats: Statistics) -> candidates.Ranges:
    return candidates.percentiles(stats, [search.percentile], one_sided=quantizer.one_sided)


def _percentile_mse(search: Search, quantizer: Quantizer, stats: Statistics) -> candidates.Ranges:
    return candidates.percentiles(stats, one_sided=quantizer.one_sided)


def _mse(search: Search, quantizer: Quantizer, stats: Statistics) -> candidates.Ranges:
    return candidates.shrunken(stats)


METHODS: dict[str, Callable[[Search, Quantizer, Statistics], candidates.Ranges]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "percentile_mse": _percentile_mse,
    "mse": _mse,
}
