"""Ranges worth trying, as (K, G) lows and highs: K candidates for each of G scale groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq.calibrate.observe import Statistics

Ranges = tuple[Tensor, Tensor]
# RepQ-ViT's three percentiles (its code, quantizer.py); true minimum and maximum are not among them.
PERCENTILES = (0.999, 0.9999, 0.99999)


def minmax(stats: Statistics) -> Ranges:
    """The whole range: one candidate."""
    return stats.low[None], stats.high[None]


def percentiles(stats: Statistics, probabilities: Sequence[float] = PERCENTILES, *, one_sided: bool = False) -> Ranges:
    """[quantile(1 - p), quantile(p)] for every p; with `one_sided` the low end is 0."""
    high = torch.stack([stats.quantile(p) for p in probabilities])
    low = torch.zeros_like(high) if one_sided else torch.stack([stats.quantile(1.0 - p) for p in probabilities])
    return low, high


def shrunken(stats: Statistics, steps: int = 100, smallest: float = 0.2) -> Ranges:
    """The whole range scaled by `steps` factors from 1 down to `smallest`, both ends alike."""
    factors = torch.linspace(1.0, smallest, steps, device=stats.low.device)[:, None]
    return factors * stats.low, factors * stats.high
