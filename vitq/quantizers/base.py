"""Quantizer: value <-> code, for one site.

Shapes:  x, value, code   any; a scale group is named by the dimensions the layout keeps
         scale            broadcastable to x (after group splitting)
States:  those of quantizers/common.py

A class is abstract or final. `docs/decisions/format_states.md` has the life of a format.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitq.core.errors import DataError, InputError, NotFittedError
from vitq.quantizers.common import AnyQuantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.ranked import in_order

MIDDLE = 0.9  # share of the values below the upper end of their middle, and above the lower one

Params = dict[str, Tensor]


class Quantizer(AnyQuantizer):
    """Base of every static format: one scale per group, chosen once, then fixed.

    Args:
        bits: code width.
        layout: which dimensions keep a scale of their own.

    A subclass names its parameters in `fields` (each a buffer of `layout.scale_shape`, NaN while unfitted)
    and implements `range_to_params`, `encode_with`, `decode_with`. Everything else is here, once.
    """

    fields: tuple[str, ...] = ("scale",)
    learned: tuple[str, ...] = ("scale",)  # fields that `learn` trains; a zero-point stays a whole number
    descending = False  # True if a larger code means a smaller value
    one_sided = False  # True if the range starts at zero
    affine = False  # True if value = scale * (code - zero_point) with a whole zero_point

    def __init__(self, bits: int, layout: Layout | None = None) -> None:
        super().__init__(bits)
        self.layout = layout or Layout()
        self.noise: Tensor | None = None  # (C,) added to x before it is coded, taken off the value
        for name in self.fields:
            self.register_buffer(name, torch.full(self.layout.scale_shape, math.nan))

    # -- what a format is ----------------------------------------------------------------------------

    @abstractmethod
    def range_to_params(self, low: Tensor, high: Tensor) -> Params:
        """Parameters that make codes cover [low, high]; any leading dimensions, float32, finite results."""

    @abstractmethod
    def encode_with(self, x: Tensor, params: Params) -> Tensor:
        """Codes of x as whole float32 numbers in [0, code_count)."""

    @abstractmethod
    def decode_with(self, code: Tensor, params: Params) -> Tensor:
        """Values of codes."""

    def variants(self, params: Params) -> Params:
        """Parameters worth comparing for (K, G) ranges: more than K where a format has more to choose than a range."""
        return params

    def alternatives(self, params: Params, share: float) -> Params:
        """(A, G) what else to try with a range (1, G): for whole zero-points, on this share of the codes."""
        return self.variants(params)

    def middle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(G,) ends of where most of the values (G, n) are: there, a search of ranges starts."""
        ordered, last = in_order(x), x.shape[1] - 1
        return ordered[:, round((1 - MIDDLE) * last)], ordered[:, round(MIDDLE * last)]

    def simulate_with(self, x: Tensor, params: Params) -> Tensor:
        """decode(encode(x)); a subclass may have a shorter way to the same bits."""
        return self.decode_with(self.encode_with(x, params), params)

    def simulator(self, x: Tensor) -> Callable[[Params], Tensor]:
        """simulate_with of the same x (what `layout.split` gives) under K candidates: params (K, ...) -> (K, *x.shape).

        Without gradients. A subclass may prepare x, so that each candidate takes less.
        """
        return lambda params: self.simulate_with(x.expand(len(params[self.fields[0]]), *x.shape), params)

    @property
    def code_count(self) -> int:
        """Number of codes."""
        return int(2**self.bits)

    def side_bits(self) -> int:
        """Bits that the parameters of this site take: float32 each, whole zero-points as many as a code."""
        return 32 * self.layout.groups * len(self.fields)

    def relayout(self, layout: Layout) -> None:
        """Take another granularity; the quantizer is unfitted afterwards."""
        self.layout = layout
        for name in self.fields:
            old = getattr(self, name)
            setattr(self, name, torch.full(layout.scale_shape, math.nan, device=old.device))

    # -- fitted state --------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether every parameter has been chosen; part of the state dict, as NaN means no."""
        return not any(bool(torch.isnan(getattr(self, name)).any()) for name in self.fields)

    def set_params(self, params: Params) -> None:
        """Choose the parameters; each has `layout.groups` elements.

        Raises:
            InputError: a parameter is missing, not finite or has another number of elements.
        """
        for name in self.fields:
            value = params[name].detach().to(torch.float32)
            if value.numel() != self.layout.groups or not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"{type(self).__name__}.{name}: needs {self.layout.groups} finite values, got "
                    f"{value.numel()} of which {int(torch.isfinite(value).sum())} are finite"
                )
            old = getattr(self, name)
            old.data = value.reshape(self.layout.scale_shape).to(old.device)
        self.rounded = self.noise = None

    def round_to(self, values: Tensor) -> None:
        """Use these values wherever the quantizer is on: decoded codes that a pass chose for a weight.

        Raises:
            InputError: they are not values of the format.
        """
        values = values.detach()
        if not torch.equal(self.decode(self.encode(values)).to(values.dtype), values):
            raise InputError(f"{self.where or self}: the values given are not those of any codes")
        self.rounded = values

    def unfit(self) -> None:
        """Forget the parameters, and what was chosen with them."""
        self.rounded = self.noise = None
        for name in self.fields:
            getattr(self, name).data.fill_(math.nan)

    def learn(self) -> None:
        """Make the scales parameters, to be trained."""
        self._require_fitted()
        for name in self.learned:
            value = getattr(self, name)
            if not isinstance(value, nn.Parameter):
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(value.clone()))
        self.state = "learn"

    def freeze(self) -> None:
        """Make the scales buffers again, and quantize."""
        self._require_fitted()
        for name in self.fields:
            value = getattr(self, name)
            if isinstance(value, nn.Parameter):
                delattr(self, name)
                self.register_buffer(name, value.detach().clone())
        self.state = "on"

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                f"{self} has no scale yet. Put a fitting pass, for example PassSpec('fit'), before this step "
                f"of the recipe, or load fitted scales."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # Moving a model to bfloat16 must not round its scales: parameters follow the device, never the type.
        exact = {name: getattr(self, name).detach().clone() for name in self.fields}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = value.to(moved.device)
        if self.rounded is not None:
            self.rounded = fn(self.rounded)
        if self.noise is not None:
            self.noise = self.noise.to(fn(self.noise).device)
        return self

    # -- use -----------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Codes of x, whole numbers, in x's shape. Raises NotFittedError without scales."""
        self._require_fitted()
        return self.layout.join(self.encode_with(self._split(self._with_noise(x)), self.params()))

    def decode(self, code: Tensor) -> Tensor:
        """float32 values of codes, in their shape. Raises NotFittedError without scales."""
        self._require_fitted()
        return self._without_noise(self.layout.join(self.decode_with(self._split(code), self.params())))

    def quantized(self, x: Tensor) -> Tensor:
        """decode(encode(x)) in x's dtype. Raises NotFittedError without scales."""
        if not torch.compiler.is_compiling():
            self._require_fitted_cheaply()
        with torch.autocast(x.device.type, enabled=False):
            wide = self._split(self._with_noise(x))
            return self._without_noise(self.layout.join(self.simulate_with(wide, self.params()))).to(x.dtype)

    def _with_noise(self, x: Tensor) -> Tensor:
        return x if self.noise is None else x.to(torch.float32) + self.noise

    def _without_noise(self, value: Tensor) -> Tensor:
        return value if self.noise is None else value - self.noise

    def _split(self, x: Tensor) -> Tensor:
        try:
            return self.layout.split(x.to(torch.float32))
        except DataError as error:
            raise DataError(f"{self.where or self}: {error}") from None

    def _require_fitted_cheaply(self) -> None:
        # One element decides: set_params never leaves a parameter partly NaN.
        first = getattr(self, self.fields[0])
        if first.device.type == "cpu" and math.isnan(first.flatten()[0].item()):
            self._require_fitted()

    # -- lowered form --------------------------------------------------------------------------------

    def lower(self) -> Lowered:
        """Thresholds and levels per scale group: what export, runtime and loading build on.

        Raises:
            NotFittedError: no scales yet.
            InputError: the format has more values than 2**bits, or none of its own (`exportable`).
        """
        self._require_fitted()
        if not self.exportable:
            raise InputError(
                f"{self} uses a paper's own arithmetic, which does not fit {self.bits}-bit codes; "
                f"quantize without parity mode to export"
            )
        return lower(self)

    def extra_repr(self) -> str:
        """Bits and granularity."""
        return f"bits={self.bits}, groups={self.layout.groups}"


@dataclass(frozen=True)
class Lowered:
    """Canonical form of a static format.

    Attributes:
        thresholds: (groups, codes - 1) ascending float32; value x has index `sum(x >= thresholds)`.
        levels: (groups, codes) float32, ascending: the value of each index.
        codes: (codes,) int64: the code of each index (formats may count downwards).
    """

    thresholds: Tensor
    levels: Tensor
    codes: Tensor

    def index(self, grouped: Tensor) -> Tensor:
        """Index of each value of a (groups, n) tensor."""
        return torch.searchsorted(self.thresholds, grouped.contiguous(), right=True)


def lower(quantizer: Quantizer) -> Lowered:
    """Lower any monotone static format by bisecting its own `encode` over all float32 numbers.

    The thresholds are exact: `lowered.index(x)` names the code of every finite float32 x.
    """
    count = quantizer.code_count
    groups = quantizer.layout.groups
    params = {name: value.reshape(groups, 1) for name, value in quantizer.params().items()}
    order = torch.arange(count)
    codes = order.flip(0) if quantizer.descending else order
    levels = quantizer.decode_with(codes.to(torch.float32).expand(groups, count), params)

    def index_of(x: Tensor) -> Tensor:
        code = quantizer.encode_with(x, params)
        return (count - 1 - code if quantizer.descending else code).to(torch.int64)

    wanted = torch.arange(1, count).expand(groups, count - 1)
    # Finite floats in order are consecutive integers; find the first whose index reaches the wanted one.
    limit = _to_order(torch.tensor(torch.finfo(torch.float32).max))
    low = torch.full_like(wanted, -int(limit) - 1)
    high = torch.full_like(wanted, int(limit) + 1)
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = index_of(_from_order(middle)) >= wanted
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    # What is never reached keeps a threshold above every finite number.
    thresholds = torch.where(high > limit, torch.inf, _from_order(high.clamp(max=int(limit))))
    return Lowered(thresholds, levels, codes)


def _to_order(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _from_order(order: Tensor) -> Tensor:
    magnitude = order.abs().to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -magnitude, magnitude)
