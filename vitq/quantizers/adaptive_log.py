"""A logarithmic format whose base is chosen: 2**(q / 37) with a whole q.

Shapes:  x, code, value  any      scale, q  broadcastable to x
Units:   a code counts steps of q / 37 octaves below scale; code 0 is the largest value
Formula: code = clamp(round(37 / q * log2(scale / (x + c))), 0, 2**bits - 2), or 2**bits - 1 for zero
         value = scale * 2**-floor(code q / 37) * T - c, T = 2**-frac(code q / 37) rounded to a multiple of
         1 / (2**(bits + 1) - 2): a shift and a short factor from a table
         c = 0, or SHIFT with `shifted`: minus the least value of GELU, so that what is quantized is not negative
Source:  AdaLog, arXiv 2407.12951, section 3.2 and 3.3; official code GoatWu/AdaLog at 75a57d2, logarithm.py

Differs from the official code as `log.py` does: the last code means zero; `extra_zero_level=True` gives zero a code of
its own (parity mode, which export refuses). Levels end OCTAVES below the scale, where those of many bits could go on.
No logarithm is computed: codes lie between bounds, so they are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from vitq.core.errors import InputError
from vitq.core.rounding import straight_through
from vitq.quantizers.base import MIDDLE, Params, Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.ranked import Ranked, in_order
from vitq.quantizers.registry import QUANTIZERS

STEPS = 37  # of an octave: q counts them
FIRST, LAST = 10, 137  # q that are tried: bases 1.2 to 13
BASE_TWO = 37.0  # q before one is chosen
SHIFT = 0.16997124254703522  # GELU(x) >= -SHIFT
OCTAVES = 20  # levels further below the scale are zero: float32 has no room for them beside SHIFT
SMALLEST = 1e-30  # a scale for a group that is all zero
LARGEST = torch.finfo(torch.float32).max / 2
CHUNK = 2**17  # values looked up at a time: they stay in the cache, and are enough for a few threads

# The bits of a float32, read as a whole number, are a line through its logarithm: never above it, and at most 0.0861
# octaves below. So they name a step or the one after it, as long as a step has more octaves than that.
UNIT = 2**23
BIAS = 127
SLACK = 1e-3  # of a step: what float32 loses on the way


@QUANTIZERS.register("adaptive_log")
@final
class AdaptiveLogQuantizer(Quantizer):
    """value = scale * 2**(-code q / 37), with a code for exact zero.

    Args:
        bits: code width.
        layout: scale groups.
        shifted: for values from -SHIFT on, the output of GELU.
        unit: the scale is one, for probabilities; only the base is chosen.
        fixed: q, where it is not to be chosen; 18.5 is base sqrt(2).
        extra_zero_level: 2**bits levels, and zero besides (parity mode).
    """

    fields = ("scale", "q")
    descending = True

    def __init__(
        self,
        bits: int,
        layout: Layout | None = None,
        *,
        shifted: bool = False,
        unit: bool = False,
        fixed: float = 0.0,
        extra_zero_level: bool = False,
    ) -> None:
        super().__init__(bits, layout)
        if fixed and not FIRST <= fixed <= LAST:
            raise InputError(f"format 'adaptive_log': fixed q {fixed} is not in {FIRST} to {LAST}; 0 lets it be chosen")
        self.shifted, self.unit, self.fixed = shifted, unit, fixed
        self.extra_zero_level = extra_zero_level
        self.exportable = not extra_zero_level
        self.zero_code = 2**bits if extra_zero_level else 2**bits - 1
        self.one_sided = not shifted

    def settings(self) -> dict[str, bool | int | float | str]:
        """Options as keywords."""
        names = ("shifted", "unit", "fixed", "extra_zero_level")
        return {name: getattr(self, name) for name in names}

    @property
    def code_count(self) -> int:
        """Number of codes, the zero code included."""
        return int(self.zero_code) + 1

    @property
    def shift(self) -> float:
        """What is added to values before they are quantized, and taken off afterwards."""
        return SHIFT if self.shifted else 0.0

    def unshift(self) -> float:
        """From now on values come with the shift added, and stay so; what the shift was."""
        shift, self.shifted, self.one_sided = self.shift, False, True
        return shift

    def side_bits(self) -> int:
        """A float32 scale and a q of one byte per group."""
        return self.layout.groups * (32 + 8)

    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """The scale is the top of the range; `low` is not used: zero, or -SHIFT, always has a code."""
        scale = (high.clamp(min=0) + self.shift).clamp(SMALLEST, LARGEST)
        return {
            "scale": torch.ones_like(scale) if self.unit else scale,
            "q": torch.full_like(scale, self.fixed or BASE_TWO),
        }

    def variants(self, params: Params) -> Params:
        """Each of the K ranges with each base."""
        if self.fixed:
            return params
        scale = params["scale"]
        q = torch.arange(FIRST, LAST + 1, device=scale.device, dtype=scale.dtype)
        repeated = q.repeat(len(scale))[:, None].expand(-1, scale.shape[1])
        return {"scale": scale.repeat_interleave(len(q), dim=0), "q": repeated}

    def middle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Up to the value that MIDDLE of the positive ones are below."""
        below = ((1 - MIDDLE) * x.gt(0).sum(1, keepdim=True)).long()
        return x.new_zeros(len(x)), in_order(x).gather(1, x.shape[1] - 1 - below)[:, 0]

    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Nearest code in the logarithmic domain; zero and what is too small get the zero code."""
        q, y = params["q"], self._share(x, params)
        code = self._looked_up(y.detach(), q, self._bounds(q), self._codes(q).float())
        return straight_through(code, y.log2() * (-STEPS / q)) if y.requires_grad else code

    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """scale * base**-code - shift; the zero code is -shift."""
        q, number = params["q"], code.detach().nan_to_num(0.0).clamp(0, self.zero_code)
        every = torch.arange(self.code_count, device=q.device)
        level = _picked(self._levels(q, every.expand(*q.shape, -1)), number)
        soft = straight_through(level, torch.exp2(code * (-q / STEPS))) if code.requires_grad else level
        value = torch.where(level > 0, params["scale"] * soft, 0.0) + 0.0 * code  # NaN stays NaN
        return value - self.shift if self.shifted else value

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)), piece by piece; gradients are those of these two."""
        if torch.compiler.is_compiling():
            return self.decode_with(self.encode_with(x, params), params)
        if torch.is_grad_enabled() and (x.requires_grad or params["scale"].requires_grad):
            made_with: Tensor = _Simulated.apply(x, params["scale"], params["q"], self)
            return made_with
        q = params["q"]
        bounds, levels = self._bounds(q), self._levels(q, self._codes(q))
        if q.numel() == 1:
            return self._in_pieces(x, params, bounds, levels)
        return self._simulated(x, params, bounds, levels)

    def simulator(self, x: Tensor) -> Callable[[Params], Tensor]:
        """See the base class: the steps of one scale group are stretches of x in order."""
        if self.layout.groups > 1 or x.device.type != "cpu" or bool(x.isnan().any()):
            return super().simulator(x)
        ranked = Ranked(x)

        def simulate(params: Params) -> Tensor:
            scale, q = params["scale"].reshape(-1, 1), params["q"].reshape(-1)
            bounds, levels = self._bounds(q).flip(-1), self._levels(q, self._codes(q)).flip(-1)
            values = levels.mul_(scale).sub_(self.shift) if self.shifted else levels.mul_(scale)
            made = torch.empty(len(q), *x.shape)
            for one, bound, value, to in zip(scale, bounds, values, made, strict=True):
                # The first bound is 0, which all reach.
                edges = torch.searchsorted(self._share(ranked.ordered, {"scale": one}), bound[1:])
                ranked.stepped(edges.tolist(), value.tolist(), to.view(-1))
            return made

        return simulate

    def _in_pieces(self, x: Tensor, params: Params, bounds: Tensor, levels: Tensor) -> Tensor:
        made = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        params = {name: value.reshape(1) for name, value in params.items()}
        bounds, levels = bounds.reshape(1, -1), levels.reshape(1, -1)
        for part, to in zip(x.reshape(-1).split(CHUNK), made.view(-1).split(CHUNK), strict=True):
            to.copy_(self._simulated(part, params, bounds, levels))
        return made

    def _simulated(self, x: Tensor, params: Params, bounds: Tensor, levels: Tensor) -> Tensor:
        y = self._looked_up(self._share(x, params), params["q"], bounds, levels).mul_(params["scale"])
        return y.sub_(self.shift) if self.shifted else y

    def _share(self, x: Tensor, params: Params) -> Tensor:
        """A new tensor of x in parts of the scale, in [2**-(OCTAVES + 2), 1]: what is smaller is zero anyway."""
        y = (x + self.shift) / params["scale"] if self.shifted else x / params["scale"]
        return y.clamp(2.0 ** -(OCTAVES + 2), 1.0) if y.requires_grad else y.clamp_(2.0 ** -(OCTAVES + 2), 1.0)

    def slope_tables(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(*q.shape, 2**bits + 1) each: bounds of steps, their levels, and these without the rounding of T."""
        codes = self._codes(q)
        levels = self._levels(q, codes)
        exact = torch.where(levels > 0, torch.exp2(codes * q.double()[..., None] / -STEPS), 0.0).float()
        return self._bounds(q), levels, exact

    def slopes(
        self, x: Tensor, grad: Tensor, params: Params, tables: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What a gradient of the values is for x and for the scale, both of the shape of x.

        With y = (x + shift) / scale and B the base, value = scale B**-code - shift, and code follows -log y / log B: so
        the slope by x is B**-code / y, and that by the scale is the level less B**-code (the two are a rounding of T
        apart); above the scale it is 0 and the level, and both are 0 where the value is zero.
        """
        bounds, levels, exact = tables
        wide = (x + self.shift) / params["scale"]
        y = wide.clamp(2.0 ** -(OCTAVES + 2), 1.0)
        steps = self._steps(y, params["q"], bounds)
        followed = _picked(exact, steps).mul_(wide.eq(y))
        by_scale = _picked(levels, steps).sub_(followed).mul_(grad)
        return followed.div_(y).mul_(grad), by_scale

    def _looked_up(self, y: Tensor, q: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
        """table (*q.shape, steps), a value for each number of steps below the scale, at the steps of y; NaN for NaN."""
        return _picked(table, self._steps(y, q, bounds)).add_(y, alpha=0)

    def _steps(self, y: Tensor, q: Tensor, bounds: Tensor) -> Tensor:
        """Steps below the scale, at most 2**bits."""
        per_octave = STEPS / q
        steps = y.view(torch.int32).to(torch.float32).mul_(per_octave / -UNIT)
        steps = steps.add_(BIAS * per_octave - (0.5 - SLACK)).clamp_(0, 2**self.bits).floor_()
        return steps.add_(_picked(bounds, steps).gt_(y))  # the right one, or the one before it

    def _bounds(self, q: Tensor) -> Tensor:
        """(*q.shape, 2**bits + 1) least float32 that is nearest to each number of steps (ties to even); the last 0."""
        step = torch.arange(2**self.bits + 1, device=q.device, dtype=torch.float64)
        bound = torch.exp2((step + 0.5) * q.double()[..., None] / -STEPS)
        near = bound.float()
        below = near < bound
        below |= (near == bound) & (step % 2 == 1)
        near = torch.where(below, near.nextafter(torch.ones_like(near)), near)
        return near.masked_fill(step == 2**self.bits, 0.0)

    def _codes(self, q: Tensor) -> Tensor:
        """(*q.shape, 2**bits + 1) the code of each number of steps."""
        step = torch.arange(2**self.bits + 1, device=q.device)
        zero_from = (self._longest(q) + 1).clamp(max=2**self.bits)
        kept = torch.minimum(step, self._last(q))
        return torch.where(step >= zero_from, self.zero_code, kept)

    def _levels(self, q: Tensor, code: Tensor) -> Tensor:
        """Values of codes (*q.shape, any), in parts of the scale; float32."""
        position = code * q.double()[..., None]
        octave = (position / STEPS).floor()
        top = 2 ** (self.bits + 1) - 2
        factor = (torch.exp2((octave * STEPS - position) / STEPS) * top).round() / top
        return torch.where(code <= self._last(q), factor * torch.exp2(-octave), 0.0).float()

    def _longest(self, q: Tensor) -> Tensor:
        """(*q.shape, 1) whole steps in OCTAVES."""
        return (OCTAVES * STEPS / q.double()[..., None]).floor()

    def _last(self, q: Tensor) -> Tensor:
        """(*q.shape, 1) code of the smallest level."""
        return self._longest(q).clamp(max=self.zero_code - 1)


class _Simulated(torch.autograd.Function):
    """Keeps x alone for the backward, and looks its level up again there; autograd would keep ten such tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, q: Tensor, quantizer: AdaptiveLogQuantizer) -> Tensor:
        ctx.save_for_backward(x, scale, q)
        ctx.quantizer = quantizer
        with torch.no_grad():
            return quantizer.simulate_with(x, {"scale": scale, "q": q})

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, q = ctx.saved_tensors
        if q.numel() > 1:
            by_x, by_scale = ctx.quantizer.slopes(x, grad, {"scale": scale, "q": q}, ctx.quantizer.slope_tables(q))
            return by_x, by_scale.sum_to_size(scale.shape), None, None
        params, total = {"scale": scale.reshape(1), "q": q.reshape(1)}, torch.zeros_like(scale)
        tables = ctx.quantizer.slope_tables(params["q"])
        by_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
        parts = zip(x.reshape(-1).split(CHUNK), grad.reshape(-1).split(CHUNK), by_x.view(-1).split(CHUNK), strict=True)
        for part, part_grad, to in parts:
            slopes, of_scale = ctx.quantizer.slopes(part, part_grad, params, tables)
            to.copy_(slopes)
            total += of_scale.sum()
        return by_x, total, None, None


def _picked(table: Tensor, index: Tensor) -> Tensor:
    """table (*shape, n) at whole numbers `index`, which broadcasts with that shape."""
    each, rows = table.shape[-1], table.shape[:-1]
    number = index.to(torch.int32)
    if math.prod(rows) > 1:
        start = torch.arange(math.prod(rows), device=table.device, dtype=torch.int32).mul_(each)
        number = number + start.reshape(rows)
    return table.reshape(-1).index_select(0, number.reshape(-1)).reshape(number.shape)
