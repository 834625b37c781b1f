"""Move a constant that a format adds to its input into the model: it is added before, and the bias takes it off.

Shapes:  W (out, in) the weight as it is used, c the constant, 1 a row of ones
Formula: W Q(x) + b with Q(x) = L(x + c) - c  =  W L(x + c) + (b - c W 1)
Source:  bias reparameterization of AdaLog, ECCV 2024, arXiv 2407.12951, section 3.3
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import nn

from vitq.calibrate.linears import Linear, linears
from vitq.core.batches import Batches
from vitq.core.format import Format
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.passes.shift_bias import ShiftBiasRewrite
from vitq.quantizers.adaptive_log import AdaptiveLogQuantizer


@REWRITES.register("shift_input")
@final
class ShiftInputRewrite(Rewrite):
    """Add a constant to the inputs of linears. args: `modules`, `shift`."""

    name = "shift_input"

    def prepare(self, model: nn.Module) -> None:
        """Hang the sum on each module."""
        for name in self.args["modules"]:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(partial(_add, float(self.args["shift"])), with_kwargs=True)

    def apply(self, model: nn.Module) -> None:
        """Nothing more: the value came with the structure."""


def _add(shift: float, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook of a linear."""
    if args:
        return (args[0] + shift, *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"] + shift}


@PASSES.register("fold_input_shift")
@final
class FoldInputShift(Pass):
    """Leave logarithmic formats of GELU outputs nothing to take off again: their codes are powers, as a shift needs.

    Weights must have the codes that they will keep. Shared biases, weights left float and linears that are no modules
    keep a format that takes its constant off itself, which computes the same; the log says how many.
    """

    name = "fold_input_shift"
    slot = "finish"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "nothing"

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fold every such constant."""
        every: dict[str, object] = dict(qmodel.quantizers.items())
        shifted = {name: q for name, q in every.items() if isinstance(q, AdaptiveLogQuantizer) and q.shifted}
        found = [linear for linear in linears(qmodel) if linear.input.id in shifted and _own_bias(qmodel, linear)]
        shift, taken = 0.0, {}
        for linear in found:
            weight, site = qmodel.weight(linear.weight), linear.input.id
            assert weight is not None
            shift, old = shifted[site].unshift(), qmodel.formats[site]
            options = {name: value for name, value in shifted[site].settings().items() if value}
            qmodel.formats[site] = Format.of(old.kind, old.bits, old.per, **options)
            used = qmodel.quantizers[linear.weight](weight.data)
            taken[str(linear.module)] = (-shift * used.double().sum(1)).float()
        if found:
            tensors = {str(number): value for number, value in enumerate(taken.values())}
            qmodel.apply_rewrite(ShiftBiasRewrite({"modules": list(taken)}, tensors))
            qmodel.apply_rewrite(ShiftInputRewrite({"modules": list(taken), "shift": shift}, {}))
        qmodel.log[self.name] = {"folded": len(found), "kept": len(shifted) - len(found)}


def _own_bias(qmodel: QuantModel, linear: Linear) -> bool:
    """Whether the constant can go into the bias of a module, and only there."""
    module = None if linear.module is None else qmodel.model.get_submodule(linear.module)
    if not isinstance(module, nn.Linear):
        return False
    every = (m.bias for m in qmodel.model.modules() if getattr(m, "bias", None) is not None)
    return module.bias is None or sum(bias is module.bias for bias in every) == 1
