"""Divide the input channels of a linear where nothing before it can take up the division: it is done at run time.

Shapes:  C input channels
Cost:    C multiplications for every row, which a kernel can do while it quantizes, and C numbers
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from vitq.core.rewrite import REWRITES, Rewrite

CHILD = "input_ratio"
BITS = 32


class InputRatio(nn.Module):
    """What the input of its parent, a linear, is divided by. Its tensor is the rewrite's, not the model's."""

    ratio: Tensor

    def __init__(self, ratio: Tensor) -> None:
        super().__init__()
        self.register_buffer("ratio", ratio, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input divided, in its dtype."""
        return x / self.ratio.to(x.dtype)


def _divide(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a linear."""
    x = args[0] if args else kwargs["input"]
    return (linear.get_submodule(CHILD)(x),), {}


@REWRITES.register("divide_input")
@final
class DivideInputRewrite(Rewrite):
    """Divide the input channels of an nn.Linear by ratio at run time; its weight undoes it.

    args: `module`; tensors: ratio (C,) float32.
    """

    name = "divide_input"

    def prepare(self, model: nn.Module) -> None:
        """Hang the division on the linear."""
        linear = model.get_submodule(self.args["module"])
        linear.add_module(CHILD, InputRatio(self.tensors["ratio"]))
        linear.register_forward_pre_hook(_divide, with_kwargs=True)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Multiply the columns of the weight, in place; arithmetic in float64."""
        weight = model.get_parameter(f"{self.args['module']}.weight".lstrip("."))
        weight.data = (weight.double() * self.tensors["ratio"].double()).to(weight.dtype)

    def extra_bits(self) -> int:
        """Of the ratio."""
        return BITS * self.tensors["ratio"].numel()
