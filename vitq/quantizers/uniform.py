"""Uniform formats: equally spaced levels.

Shapes:  x, value, code  any      scale, zero_point  broadcastable to x
Units:   scale is the value of one step; zero_point is the code of real zero, a whole number
Formula: code = clamp(round(x / scale) + zero_point, 0, 2**bits - 1); value = scale * (code - zero_point)
Source:  Jacob et al., CVPR 2018, arXiv 1712.05877, equation 1
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from vitq.core.grid import on_grid
from vitq.core.rounding import round_ste
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.registry import QUANTIZERS

# A range this small beside its own magnitude is a constant: its step would be float noise.
DEAD_RANGE = 1e-6
FINEST_STEP = 2.0**-22  # … and with more codes that is so earlier: beyond 2**22 steps from zero, rounding goes wrong
SMALLEST = 1e-30  # a range below it is zero
LARGEST = torch.finfo(torch.float32).max / 2  # so that high - low is finite
NEUTRAL_MAGNITUDE = 1e-5
ZERO_POINTS = 16  # at most so many are tried with a scale


@QUANTIZERS.register("uniform")
@final
class UniformQuantizer(Quantizer):
    """Affine uniform codes, or symmetric ones around zero.

    Args:
        bits: code width.
        layout: scale groups.
        symmetric: the range is [-m, m] and zero has code 2**(bits-1); else it is [low, high].
        fractional_zero_point: keep a zero-point that is not whole, as the official RepQ-ViT code does after
            averaging channels (parity mode). Such a format has no integer form: export refuses it.

    A group whose values are all one constant c (to float precision) gets the neutral step
    max(|c|, 1e-5) / (2**bits - 1) and zero at the end of the range that makes c exact: neither 0/0 nor a huge
    zero-point. `is_dead` names them.
    """

    fields = ("scale", "zero_point")

    def __init__(
        self,
        bits: int,
        layout: Layout | None = None,
        *,
        symmetric: bool = False,
        fractional_zero_point: bool = False,
    ) -> None:
        super().__init__(bits, layout)
        self.symmetric = symmetric
        self.keep_fraction(fractional_zero_point)

    def keep_fraction(self, keep: bool) -> None:
        """Allow a zero-point that is not whole, or no longer."""
        self.fractional_zero_point = keep
        self.exportable = self.affine = not keep

    def settings(self) -> dict[str, bool | int | float | str]:
        """Options as keywords."""
        return {"symmetric": self.symmetric, "fractional_zero_point": self.fractional_zero_point}

    def side_bits(self) -> int:
        """A float32 step and a zero-point in the narrowest whole bytes that hold it, as stored, per group."""
        zero_point = self.params()["zero_point"]
        low, high = float(zero_point.min()), float(zero_point.max())
        width = 8 if low >= 0 and high < 2**8 else 16 if max(-low, high) < 2**15 else 32
        return self.layout.groups * (32 + (0 if self.symmetric else width))

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """Step and zero-point of [low, high]; a constant range gets a neutral step."""
        top = 2**self.bits - 1
        low, high = low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST)
        magnitude = torch.maximum(low.abs(), high.abs())
        if self.symmetric:
            scale = torch.where(magnitude < SMALLEST, NEUTRAL_MAGNITUDE, magnitude) / (2 ** (self.bits - 1) - 0.5)
            return {"scale": scale, "zero_point": torch.full_like(scale, 2.0 ** (self.bits - 1))}
        dead = is_dead(low, high, self.bits)
        neutral = magnitude.clamp(min=NEUTRAL_MAGNITUDE) / top
        scale = torch.where(dead, neutral, (high - low) / top)
        zero_point = torch.where(dead, torch.where(low < 0, float(top), 0.0), (-low / scale).round())
        return {"scale": scale, "zero_point": zero_point}

    def alternatives(self, params: Params, share: float) -> Params:
        """A window of zero-points around the one that there is, in code range; a symmetric one stays."""
        if self.symmetric:
            return params
        scale, count = params["scale"], min(ZERO_POINTS, int(2**self.bits * share))
        first = (params["zero_point"].round() - count // 2).clamp(0, 2**self.bits - count)
        window = torch.arange(count, device=scale.device, dtype=scale.dtype)[:, None]
        return {"scale": scale.expand(count, -1), "zero_point": first + window}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code, ties to even."""
        zero_point = params["zero_point"]
        return (round_ste(x / params["scale"]) + zero_point).clamp(0, 2**self.bits - 1)

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """scale * (code - zero_point)."""
        return (code - params["zero_point"]) * params["scale"]

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)) in four steps: adding and subtracting a whole zero-point moves into the clamp."""
        if self.fractional_zero_point:
            return self.decode_with(self.encode_with(x, params), params)
        scale, zero_point = params["scale"], params["zero_point"]
        return on_grid(x, scale, -zero_point, 2**self.bits - 1 - zero_point)


def is_dead(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Which ranges hold one constant only (a LayerNorm channel with gamma 0), or less than float32 can resolve."""
    share = max(DEAD_RANGE, FINEST_STEP * (2**bits - 1))
    magnitude = torch.maximum(low.abs(), high.abs())
    noise = (magnitude * share).clamp(min=SMALLEST)
    return torch.le(high - low, noise)
