"""Add to biases: a rewrite for every pass that finds what a linear's output lacks on average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq.core.rewrite import REWRITES, Rewrite


@REWRITES.register("shift_bias")
class ShiftBiasRewrite(Rewrite):
    """Add to biases.

    args: `modules`, nn.Linear or nn.Conv2d each; tensors: one (out,) per module, in the same order, as "0", "1", …
    """

    name = "shift_bias"

    def prepare(self, model: nn.Module) -> None:
        """Give a zero bias to modules that have none."""
        for name in self.args["modules"]:
            module = model.get_submodule(name)
            if module.bias is None:
                weight = module.weight
                assert isinstance(weight, Tensor)
                module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Add, in place; float32 sums, rounded once."""
        for number, name in enumerate(self.args["modules"]):
            add_to_bias(model, name, self.tensors[str(number)])


def add_to_bias(model: nn.Module, module: str, shift: Tensor) -> None:
    """bias += shift, in the bias's own dtype."""
    bias = model.get_submodule(module).bias
    assert isinstance(bias, Tensor)
    bias.data = (bias.data.float() + shift.to(bias.device)).to(bias.dtype)
