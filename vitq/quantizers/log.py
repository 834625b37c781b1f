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

from typing import final

import torch
from torch import Tensor

from vitq.core.rounding import round_ste
from vitq.quantizers.base import Layout, Params, Quantizer
from vitq.quantizers.registry import QUANTIZERS

# log2 of the smallest normal float32: below it, levels are zero in float32 arithmetic too.
MIN_LOG2 = -126.0
SMALLEST = 1e-30  # a scale for a group that is all zero


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
        return {"scale": high.clamp(min=SMALLEST)}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code in the logarithmic domain; zero and what is too small get the zero code."""
        # softmax can return exactly 0, whose logarithm is -inf; the floor keeps gradients finite.
        exponent = (x / params["scale"]).clamp(min=2.0**MIN_LOG2).log2()
        steps = round_ste(exponent * -self.steps).clamp(0, 2**self.bits)
        return torch.where(steps >= 2**self.bits, float(self.zero_code), steps.clamp(max=self.zero_code - 1))

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """scale * base**-code; the zero code is 0."""
        value = params["scale"] * torch.exp2(code / -self.steps)
        return torch.where(code >= min(self.zero_code, self._underflow), 0.0, value)

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)), in place where there are no gradients."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.decode_with(self.encode_with(x, params), params)
        steps = torch.div(x, params["scale"]).clamp_(min=2.0**MIN_LOG2).log2_()
        steps = steps.mul_(-self.steps).round_().clamp_(0, 2**self.bits)
        zero = steps.ge(min(2**self.bits, self._underflow))
        value = steps.clamp_(max=self.zero_code - 1).div_(-self.steps).exp2_().mul_(params["scale"])
        return value.masked_fill_(zero, 0.0)

    @property
    def _underflow(self) -> int:
        # Codes that would denote subnormal numbers are zero, too: 2**-255 does not exist in float32.
        return int(-MIN_LOG2 * self.steps)


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
