"""Logarithmic formats for values in [0, scale]: attention probabilities.

Shapes:  x, code, value  any      scale  broadcastable to x
Units:   a code counts steps of `base` below scale; code 0 is the largest value
Formula: code = clamp(round(-log_base(x / scale)), 0, 2**bits - 2), or 2**bits - 1 for zero; value = scale * base**-code
Source:  base 2        FQ-ViT,   arXiv 2111.13824
         base sqrt(2)  RepQ-ViT, arXiv 2212.08254

Differs from the papers' code, all of which use 2**bits codes *and* send what lies beyond them to zero, that
is 2**bits + 1 values: here the last code means zero. What becomes zero is the same as in theirs (from 2**bits - 1/2
steps below the scale on); what would have had the code that now means zero goes to its neighbour, the smallest
level. `extra_zero_level=True` reproduces theirs (parity mode); such a format has no bits-wide form and export
refuses it.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from vitq.core.rounding import straight_through
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.registry import QUANTIZERS

# Powers of two are taken from and put into the exponent bits of float32: exact, and faster than a logarithm and its
# inverse.
EXPONENT = 0x7F800000
EXPONENT_SHIFT = 23
EXPONENT_BIAS = 127
LAST_CODE = 124  # codes from here on are zero: with them, powers stay normal numbers
SMALLEST = 1e-30  # a scale for a group that is all zero
LARGEST = torch.finfo(torch.float32).max / 2  # so that twice the scale is finite


class _LogQuantizer(Quantizer):
    """value = scale * 2**(-code / steps), with a code for exact zero."""

    steps: int  # codes per factor of two
    descending = True
    one_sided = True

    def __init__(self, bits: int, layout: Layout | None = None, *, extra_zero_level: bool = False) -> None:
        super().__init__(bits, layout)
        self.extra_zero_level = extra_zero_level
        self.exportable = not extra_zero_level
        self.zero_code = 2**bits if extra_zero_level else 2**bits - 1

    def settings(self) -> dict[str, bool | int | float | str]:
        """Options as keywords."""
        return {"extra_zero_level": self.extra_zero_level}

    @property
    def code_count(self) -> int:
        """Number of codes, the zero code included."""
        return int(self.zero_code) + 1

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """The scale is the top of the range; `low` is not used: zero always has a code."""
        return {"scale": high.clamp(SMALLEST, LARGEST)}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code in the logarithmic domain; zero and what is too small get the zero code."""
        y = (x / params["scale"]).clamp(min=2.0 ** (-LAST_CODE / self.steps))  # zero has no exponent
        z = self._squared(y.detach().clone()).mul_(math.sqrt(2))
        steps = (EXPONENT_BIAS - (z.view(torch.int32) >> EXPONENT_SHIFT)).to(y.dtype)
        if y.requires_grad:
            steps = straight_through(steps, y.log2() * -self.steps)
        code = torch.where(steps >= self._zero_from, float(self.zero_code), steps.clamp(0, self._last))
        return code.masked_fill(y.isnan(), math.nan)  # its exponent would be that of a large number

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """scale * base**-code; the zero code is 0."""
        exponent = EXPONENT_BIAS - code.detach().clamp(0, LAST_CODE).to(torch.int32)
        value = self._root((exponent << EXPONENT_SHIFT).view(torch.float32))
        if code.requires_grad:
            value = straight_through(value, torch.exp2(code / -self.steps))
        return torch.where(code <= self._last, params["scale"] * value, 0.0 * code)  # NaN stays NaN

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)), in place where there are no gradients."""
        if torch.is_grad_enabled():
            return self.decode_with(self.encode_with(x, params), params)
        # One new tensor, and no step that makes booleans, takes special values, or costs more than a few passes:
        # all powers are 2**-steps lower than in `encode_with`, and what becomes zero is 1 until `frac` removes it.
        y = torch.div(x, params["scale"]).clamp_(0.0, 1.0)
        z = self._squared(y).mul_(math.sqrt(2) * 2.0**-self.steps)
        first_kept = 2.0 ** (1 - self._zero_from - self.steps)
        torch.threshold_(z, first_kept * (1 - 2.0**-24), 1.0).clamp_(min=2.0 ** -(self._last + self.steps))
        return self._root(self._floored(z)).frac_().mul_(params["scale"] * 2)

    @property
    def _zero_from(self) -> int:
        # How many steps below the scale zero begins.
        return int(min(2**self.bits, LAST_CODE))

    @property
    def _last(self) -> int:
        # The code of the smallest level.
        return int(min(self.zero_code, LAST_CODE)) - 1

    def _squared(self, y: Tensor) -> Tensor:
        """y**steps; uses y up."""
        return y.mul_(y) if self.steps == 2 else y

    def _root(self, power: Tensor) -> Tensor:
        """power ** (1 / steps); uses it up."""
        return power.sqrt_() if self.steps == 2 else power

    @staticmethod
    def _floored(z: Tensor) -> Tensor:
        """The largest power of two that is not above z; uses z up."""
        return z.view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)


@QUANTIZERS.register("log2")
@final
class Log2Quantizer(_LogQuantizer):
    """Base 2: every code halves the value, so a product with it is a shift."""

    steps = 1


@QUANTIZERS.register("logsqrt2")
@final
class LogSqrt2Quantizer(_LogQuantizer):
    """Base sqrt(2): two codes per factor of two. Odd codes share one factor sqrt(2), so products are shifts."""

    steps = 2
