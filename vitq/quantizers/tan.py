"""A tangent format for values in [0, scale]: levels crowd at both ends of the range, the more so the steeper it is.

Shapes:  x, code, value  any      scale, center, slope  broadcastable to x
Units:   center and slope are for x / scale; slope * max(center, 1 - center) stays below pi / 2
Formula: t(y) = tan(slope * (y - center)), y = x / scale in [0, 1]
         code = round((t(y) - t(0)) / (t(1) - t(0)) * (2**bits - 1)); value = scale * t^-1 of that step
Source:  TanQ of DopQ-ViT, arXiv 2408.03291. **A reconstruction**: the abstract says that a tangent gives dense levels
         near 1 and still resolves values near 0; its formula is not public. A slope near zero is the uniform format,
         a center near one puts most levels near zero.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from vitq.core.rounding import round_ste
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.registry import QUANTIZERS

SMALLEST = 1e-30  # a scale for a group that is all zero
# The curve before one is chosen: most attention probabilities are near zero.
CENTER = 0.9
STEEPNESS = 0.8  # slope, in parts of the steepest for that center
CENTERS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
STEEPNESSES = (0.05, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96)


@QUANTIZERS.register("tan")
@final
class TanQuantizer(Quantizer):
    """Uniform steps behind a tangent; code 0 is exactly zero, the last code exactly the scale."""

    fields = ("scale", "center", "slope")
    one_sided = True

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """The scale is the top of the range; `low` is not used: zero always has a code."""
        scale = high.clamp(min=SMALLEST)
        center = torch.full_like(scale, CENTER)
        return {"scale": scale, "center": center, "slope": STEEPNESS * _steepest(center)}

    def variants(self, params: Params) -> Params:
        """Each of the K ranges with each curve."""
        scale = params["scale"]
        center = scale.new_tensor(CENTERS).repeat_interleave(len(STEEPNESSES))
        slope = scale.new_tensor(STEEPNESSES).repeat(len(CENTERS)) * _steepest(center)
        ranges, curves = scale.shape[0], len(center)
        per_range = {"center": center, "slope": slope}
        repeated = {name: value.repeat(ranges)[:, None].expand(-1, scale.shape[1]) for name, value in per_range.items()}
        return {"scale": scale.repeat_interleave(curves, dim=0), **repeated}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code behind the tangent."""
        low, span = self._ends(params)
        y = (x / params["scale"]).clamp(0, 1)
        t = torch.tan(params["slope"] * (y - params["center"]))
        return round_ste((t - low) / span * (2**self.bits - 1)).clamp(0, 2**self.bits - 1)

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """scale * (center + arctan(step) / slope); the ends of the range are exact."""
        low, span = self._ends(params)
        top = 2**self.bits - 1
        y = params["center"] + torch.atan(low + code / top * span) / params["slope"]
        y = torch.where(code <= 0, 0.0, torch.where(code >= top, 1.0, y.clamp(0, 1)))
        return params["scale"] * y

    def _ends(self, params: Params) -> tuple[Tensor, Tensor]:
        """t(0), and t(1) - t(0)."""
        low = torch.tan(-params["slope"] * params["center"])
        return low, torch.tan(params["slope"] * (1 - params["center"])) - low


def _steepest(center: Tensor) -> Tensor:
    """The slope at which an end of the range meets a pole."""
    return math.pi / 2 / torch.maximum(center, 1 - center)
