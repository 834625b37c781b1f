"""Squared error of values under many uniform steps, from sums over stretches of them in order.

Shapes:  x (G, n): n values of each of G scale groups; params (K, G): K candidates; error (K, G)
Formula: sum over levels v of (S2 - 2 v S1 + v**2 S0), with S0, S1, S2 the number, the sum and the sum of squares of the
         values nearest to v. These lie side by side in order, so a candidate takes a bisection per level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.ranked import in_order

WORTH = 24  # values per level, from which on this takes less than quantizing them


class OwnError:
    """Mean squared error of (G, n) values, in float64.

    Args:
        quantizer: a format with whole zero-points.
        x: the values, none of them NaN.
    """

    def __init__(self, quantizer: Quantizer, x: Tensor) -> None:
        self.codes = torch.arange(2**quantizer.bits, device=x.device, dtype=torch.float64)
        self.ordered = in_order(x).double()
        # Sums up to each place, of values and of their squares.
        self.first, self.second = (F.pad(t.cumsum(1), (1, 0)) for t in (self.ordered, self.ordered.square()))

    @staticmethod
    def serves(quantizer: Quantizer, x: Tensor) -> bool:
        """Whether it can be used, and pays."""
        return quantizer.affine and x.shape[1] >= WORTH * 2**quantizer.bits

    @property
    def largest(self) -> int:
        """Numbers of its largest tensor for one candidate."""
        return len(self.ordered) * len(self.codes)

    def __call__(self, params: Params) -> Tensor:
        """(K, G) of params (K, G)."""
        scale, zero_point = (params[name].double()[..., None] for name in ("scale", "zero_point"))
        values = (self.codes - zero_point) * scale
        edges = values[..., 1:] - scale / 2
        groups, n = self.ordered.shape
        at = torch.searchsorted(self.ordered, edges.movedim(0, 1).reshape(groups, -1).contiguous())
        shape = (groups, len(scale), -1)
        ends = F.pad(F.pad(at.reshape(shape), (1, 0)), (0, 1), value=n)
        flat = ends.flatten(1)
        first, second = (
            sums.gather(1, flat).reshape(ends.shape).diff().movedim(1, 0) for sums in (self.first, self.second)
        )
        count = ends.diff().movedim(1, 0)
        return (second - 2 * values * first + values.square() * count).sum(-1).clamp(min=0) / n
