"""What "better" means when candidates for a scale are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.calibrate.observe import Statistics
from vitq.quantizers.base import Params, Quantizer

CHUNK = 2**18  # candidate-values scored at a time: they stay in the cache


def mse(quantizer: Quantizer, params: Params, stats: Statistics) -> Tensor:
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
