"""What every format's module has, static or dynamic: a state, an observer, and one forward.

States:  off      the input is returned as it is
         on       fake quantization: the value of the nearest code
         learn    the same, and scales are parameters
         observe  is not a state of its own: an observer that is set sees x first, may fit the quantizer, and may return
                  what `forward` gives, if it knows that already
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

State = Literal["off", "on", "learn"]
Observer = Callable[["AnyQuantizer", Tensor], Tensor | None]


class AnyQuantizer(nn.Module):
    """Base of every format.

    Args:
        bits: code width.
    """

    fields: tuple[str, ...] = ()  # what is chosen once and stored, a buffer each
    exportable = True  # False for arithmetic that does not fit 2**bits codes

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.state: State = "off"
        self.observer: Observer | None = None
        self.product_observer: Callable[[Tensor], None] | None = None  # … of the product it is the left operand of
        self.baked = False  # the tensor at this site already holds decoded values
        self.rounded: Tensor | None = None  # decoded values of codes that a pass chose, instead of the nearest ones
        self.where = ""  # the site it is at, for messages

    # -- what is chosen once ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether every parameter has been chosen."""

    def params(self) -> dict[str, Tensor]:
        """The parameters."""
        return {name: getattr(self, name) for name in self.fields}

    @abstractmethod
    def set_params(self, params: dict[str, Tensor]) -> None:
        """Choose the parameters."""

    @abstractmethod
    def unfit(self) -> None:
        """Forget the parameters."""

    @abstractmethod
    def learn(self) -> None:
        """Make the scales parameters, to be trained."""

    @abstractmethod
    def freeze(self) -> None:
        """Make the scales buffers again, and quantize."""

    # -- what it costs ---------------------------------------------------------------------------------

    @abstractmethod
    def side_bits(self) -> int:
        """Bits that the parameters of this site take."""

    def carried_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that go along with the codes of every tensor of this shape; none in a static format."""
        return 0

    def settings(self) -> dict[str, bool | int | float | str]:
        """The options this quantizer was built with, beyond bits and layout."""
        return {}

    # -- use -------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether `forward` does anything to its input, or shows it to an observer."""
        return self.observer is not None or (self.state != "off" and not self.baked)

    @abstractmethod
    def quantized(self, x: Tensor) -> Tensor:
        """x on this site's grid, whatever the state, in x's dtype; arithmetic is float32, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """x as the product sees it."""
        if self.observer is not None:
            with torch._C.DisableTorchFunction():  # products of an observer are not the model's
                known = self.observer(self, x)
            if known is not None:
                return known
        if self.state == "off" or self.baked:
            return x
        return self.quantized(x) if self.rounded is None else self.rounded
