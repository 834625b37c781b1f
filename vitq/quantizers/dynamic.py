"""Dynamic formats: what they need besides codes is taken from every tensor anew, and goes along with the codes.

Shapes:  x any; its rows (..., S) lie along the dimension that the product sums over, so that what a row has in common
         stands before the sum
Decision: docs/decisions/dynamic_formats.md
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vitq.core.errors import InputError
from vitq.quantizers.common import AnyQuantizer

Side = dict[str, Tensor]


class DynamicQuantizer(AnyQuantizer):
    """Base of every dynamic format: nothing to fit, nothing stored, no table of levels.

    Args:
        bits: code width.
        summed: the dimension that the product sums over.

    A subclass implements `encode_rows`, `decode_rows` and `row_bits`.
    """

    exportable = False

    def __init__(self, bits: int, summed: int = -1) -> None:
        super().__init__(bits)
        self.summed = summed
        self.state = "on"  # there is nothing to wait for

    # -- what a format is ----------------------------------------------------------------------------

    @abstractmethod
    def encode_rows(self, x: Tensor) -> tuple[Tensor, Side]:
        """Codes of (..., S) as whole float32 numbers in [0, 2**bits), and the side information of each row."""

    @abstractmethod
    def decode_rows(self, code: Tensor, side: Side) -> Tensor:
        """Values of codes."""

    @abstractmethod
    def row_bits(self, size: int) -> int:
        """Bits of the side information of a row of so many values."""

    # -- life ----------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Always: there is nothing to choose."""
        return True

    def set_params(self, params: dict[str, Tensor]) -> None:
        """Nothing to choose."""

    def unfit(self) -> None:
        """Nothing to forget."""

    def learn(self) -> None:
        """Nothing to train; gradients pass on to what comes before."""
        self.state = "learn"

    def freeze(self) -> None:
        """Quantize."""
        self.state = "on"

    def side_bits(self) -> int:
        """Nothing is stored."""
        return 0

    def carried_bits(self, shape: tuple[int, ...]) -> int:
        """Side information of all rows."""
        size = shape[self.summed]
        return torch.Size(shape).numel() // size * self.row_bits(size)

    # -- use -------------------------------------------------------------------------------------------

    def quantized(self, x: Tensor) -> Tensor:
        """x as its codes and their side information give it back."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(torch.float32).movedim(self.summed, -1)
            return self.decode_rows(*self.encode_rows(rows)).movedim(-1, self.summed).to(x.dtype)

    def lower(self) -> None:
        """Refuse: levels differ from row to row.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.where or self} has a dynamic format, whose levels differ from row to row: there is no table of "
            f"them. Choose a static format there to lower it"
        )

    def extra_repr(self) -> str:
        """Bits and direction."""
        return f"bits={self.bits}, summed={self.summed}"
