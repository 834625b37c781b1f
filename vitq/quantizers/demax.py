"""Attention probabilities with the largest of each row kept apart: what is left has a small range.

Shapes:  x, code, value (..., S)      kept, step, index (..., 1)
Units:   step is the value of one code; index is the place of the largest value
Formula: kept = max x; step = (second largest x) / (2**bits - 1); code = clamp(round(x / step), 0, 2**bits - 1)
         value = step * code, but kept at its place
Source:  DeMax of UQ-ViT, AAAI 2026; formulas from the official code, jiujiuwei/UQ-ViT at 3d7d4bb

Differs from the official code where the second largest is zero (one-hot rows, rows of zeros, rows of one value): the
code divides 0 by 0 there; here what is left is zero.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from vitq.core.rounding import round_ste
from vitq.quantizers.dynamic import DynamicQuantizer, Side
from vitq.quantizers.registry import DYNAMIC

SMALLEST = 1e-30  # steps below it are zero
NUMBER = 32  # bits of a float that is kept: the arithmetic is float32


@DYNAMIC.register("demax")
@final
class DeMaxQuantizer(DynamicQuantizer):
    """Uniform steps from zero to the second largest value of the row; of several largest ones the first is kept."""

    def encode_rows(self, x: Tensor) -> tuple[Tensor, Side]:
        """Codes; that of the kept value is zero."""
        top = 2**self.bits - 1
        kept, index = x.max(dim=-1, keepdim=True)
        rest = x.scatter(-1, index, 0.0)
        step = rest.amax(dim=-1, keepdim=True) / top
        some = step > SMALLEST
        step = torch.where(some, step, 0.0)
        code = round_ste(rest / torch.where(some, step, 1.0)).clamp(0, top)
        return code, {"kept": kept, "index": index, "step": step}

    def decode_rows(self, code: Tensor, side: Side) -> Tensor:
        """step * code, and the kept value at its place."""
        return (code * side["step"]).scatter(-1, side["index"], side["kept"])

    def row_bits(self, size: int) -> int:
        """The kept value, the step, and the place of the first."""
        return 2 * NUMBER + (size - 1).bit_length()
