"""Twin uniform formats: two ranges of 2**(bits - 1) codes each, with a uniform step of their own.

Shapes:  x, code, value  any      scale, shift, fine  broadcastable to x
Units:   scale is the step of the upper range R2, fine that of the lower range R1; h = 2**(bits - 1) codes are in each
Formula: softmax  R1 = {0 … h-1} fine below the split h fine, R2 = {0 … h-1} scale above; fine = scale * 2**-shift
         GELU     R1 = {-h … -1} fine below zero, R2 = {0 … h-1} scale above; fine = 0.16997 / h, GELU's minimum
Source:  T_k of PTQ4ViT, Yuan et al., ECCV 2022, arXiv 2111.12293, section 3.1

Differs from the paper in that a value beside the split takes the nearest level of both ranges: taken literally, R2 has
its first level above zero far from a small split, and what lies between would become zero. Differs from the official
code (hahnyuan/PTQ4ViT at b42c790) in that its softmax format adds the split to every value above it (both ranges are
clamped to the split and summed), so that its search prefers small splits.

Codes of R2 below the split are not used. Where R2 meets R1 at once (shift 0), that leaves a uniform format of bits - 1.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from vitq.core.rounding import round_ste, straight_through
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.registry import QUANTIZERS

GELU_MINIMUM = 0.16997124254703522  # of -x Phi(x); x sigmoid(1.702 x), the quick GELU, ends at -0.1636
SPLITS = 20  # 2**0 … 2**-19, as published
SHIFT = 4.0  # before one is chosen: most attention probabilities are below 2**-4
SMALLEST = 1e-30  # a range below it is zero
NEUTRAL_MAGNITUDE = 1e-5
LARGEST = torch.finfo(torch.float32).max / 2  # so that the top level is finite


class _TwinQuantizer(Quantizer):
    """Codes 0 … h-1 are those of the lower range, h … 2h-1 those of the upper one."""

    def __init__(self, bits: int, layout: Layout | None = None) -> None:
        super().__init__(bits, layout)
        self.each = 2 ** (bits - 1)

    def _step(self, high: Tensor) -> Tensor:
        """The step with which R2 ends at the top of the range."""
        step: Tensor = torch.where(high < SMALLEST, NEUTRAL_MAGNITUDE, high.clamp(max=LARGEST)) / (self.each - 1)
        return step


@QUANTIZERS.register("twin_softmax")
@final
class TwinSoftmaxQuantizer(_TwinQuantizer):
    """Small probabilities on a fine grid, large ones on a grid 2**shift times as coarse; both start at zero.

    Args:
        bits: code width.
        layout: scale groups.
        unit: the coarse grid ends at 1, as probabilities do, whatever range is given: only the split is chosen.
    """

    fields = ("scale", "shift")
    one_sided = True

    def __init__(self, bits: int, layout: Layout | None = None, *, unit: bool = False) -> None:
        super().__init__(bits, layout)
        self.unit = unit

    def settings(self) -> dict[str, bool | int | float | str]:
        """Options as keywords."""
        return {"unit": self.unit}

    def side_bits(self) -> int:
        """A float32 step and a shift in one byte, per group."""
        return self.layout.groups * (32 + 8)

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """R2 ends at the top of the range; `low` is not used: zero always has a code."""
        scale = self._step(torch.ones_like(high) if self.unit else high)
        return {"scale": scale, "shift": torch.full_like(scale, SHIFT)}

    def variants(self, params: Params) -> Params:
        """Each of the K ranges with each split."""
        scale = params["scale"]
        shift = torch.arange(SPLITS, dtype=scale.dtype, device=scale.device).repeat(len(scale))[:, None]
        scale = scale.repeat_interleave(SPLITS, dim=0)
        return {"scale": scale, "shift": shift.expand_as(scale)}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Code of the nearest level."""
        fine, _, border = self._ranges(params)
        lower = round_ste(x / fine).clamp(0, self.each - 1)
        upper = round_ste(x / params["scale"]).clamp(max=self.each - 1)
        return torch.where(x < border, lower, upper + self.each)

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """Steps times the step of the range; codes that are not used have the value of the first one that is."""
        fine, first, _ = self._ranges(params)
        upper = (code - self.each).clamp(min=first) * params["scale"]
        return torch.where(code < self.each, code * fine, upper)

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)), in place where there are no gradients."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.decode_with(self.encode_with(x, params), params)
        fine, _, border = self._ranges(params)
        lower = torch.div(x, fine).round_().clamp_(0, self.each - 1).mul_(fine)
        upper = torch.div(x, params["scale"]).round_().clamp_(max=self.each - 1)
        return torch.where(x < border, lower, upper.mul_(params["scale"]))

    def _ranges(self, params: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Step of R1, first code of R2 that is not below R1, and the middle between the levels on both sides."""
        scale, ratio = params["scale"], torch.exp2(-params["shift"])
        first = (self.each * ratio).clamp(1, self.each - 1)
        last = (self.each - 1) * ratio
        return scale * ratio, first, (last + first) / 2 * scale


@QUANTIZERS.register("twin_gelu")
@final
class TwinGeluQuantizer(_TwinQuantizer):
    """Negative values on a fixed grid that ends at GELU's minimum, positive ones on a grid with a fitted end.

    A range without negative values has no grid for them: they become zero.

    Args:
        bits: code width.
        layout: scale groups.
        aligned: the step of the positive values is the power of two times that of the negative ones which is nearest
            to its scale, as the paper has it, so that partial sums of both are added after a shift. The official code
            leaves it free, and so does the default here, which measures better (docstring of recipes/ptq4vit.py).
    """

    fields = ("scale", "fine")

    def __init__(self, bits: int, layout: Layout | None = None, *, aligned: bool = False) -> None:
        super().__init__(bits, layout)
        self.aligned = aligned

    def settings(self) -> dict[str, bool | int | float | str]:
        """Options as keywords."""
        return {"aligned": self.aligned}

    def side_bits(self) -> int:
        """A float32 step per group; the one of the negative values is known."""
        return self.layout.groups * 32

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """R2 ends at the top of the range; R1 is the same for all ranges that have negative values."""
        return {"scale": self._step(high), "fine": torch.where(low < 0, GELU_MINIMUM / self.each, 0.0)}

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code of the range on the value's side of zero."""
        lower = round_ste(x / params["fine"].clamp(min=SMALLEST)).clamp(-self.each, 0)
        upper = round_ste(x / self._coarse(params)).clamp(0, self.each - 1)
        code: Tensor = torch.where(x < 0, lower, upper) + self.each
        return code

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """Steps from zero times the step of the range."""
        steps = code - self.each
        value: Tensor = steps * torch.where(steps < 0, params["fine"], self._coarse(params))
        return value

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)), in place where there are no gradients."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.decode_with(self.encode_with(x, params), params)
        coarse, fine = self._coarse(params), params["fine"]
        upper = torch.div(x, coarse).round_().clamp_(0, self.each - 1).mul_(coarse)
        lower = torch.div(x, fine.clamp(min=SMALLEST)).round_().clamp_(-self.each, 0).mul_(fine)
        return upper.add_(lower)  # one of the two is zero

    def _coarse(self, params: Params) -> Tensor:
        """Step of R2."""
        scale, fine = params["scale"], params["fine"]
        if not self.aligned:
            return scale
        unit = fine.clamp(min=SMALLEST)
        snapped = unit * torch.exp2((scale / unit).log2().round().clamp(max=100))
        return torch.where(fine > 0, straight_through(snapped, scale), scale)
