"""Give back to each linear's bias what quantization took off its mean output.

Shapes:  W (out, in) float weights, Q quantized ones    x, q (in,) mean inputs of the float and the quantized model
Formula: bias += W x - Q q
Source:  bias correction: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2, with means from calibration images as
         in appendix D; for transformers Liu et al., NeurIPS 2021, arXiv 2106.14156, section 3.3
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from vitq.calibrate.capture import watch_parallel, watch_prefix
from vitq.calibrate.linears import Linear, as_used, linears, watchable
from vitq.calibrate.moments import Moments
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.core.site import Site


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


@PASSES.register("correct_bias")
@final
class CorrectBias(Pass):
    """Make the mean output of every linear that of the float model, each on what the ones before it give.

    Weights that are tied, computed or used by something else than an nn.Linear or nn.Conv2d are left as they are;
    the log says how many were corrected.
    """

    name = "correct_bias"
    slot = "compensate"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "two forwards of the calibration images; about four with more than 32"

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Correct every bias.

        Raises:
            DataError: no calibration images.
        """
        if data is None or data.count == 0:
            raise DataError("correcting biases needs calibration images; give data= (or --calib)")
        found = [linear for linear in linears(qmodel) if linear.module is not None]
        at: dict[str, list[Linear]] = {}
        for linear in found:
            at.setdefault(linear.input.id, []).append(linear)
        sites = list({linear.input.id: linear.input for linear in found}.values())
        modules = [str(linear.module) for linear in found]
        rewrite = ShiftBiasRewrite({"modules": modules}, {})
        rewrite.prepare(qmodel.model)
        wanted: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}
        with watchable(qmodel, sites):
            watch_parallel(qmodel, sites, lambda s: _Mean(qmodel, s, at[s.id], wanted), data, progress)
            watch_prefix(qmodel, sites, lambda s: _Shift(qmodel, s, at[s.id], wanted, shifts), data, progress)
        # Each was applied as soon as it was known: those behind were found on top of it.
        rewrite.tensors = {str(number): shifts[name] for number, name in enumerate(modules)}
        qmodel.rewrites.append(rewrite)
        qmodel.log["correct_bias"] = {"corrected": len(modules)}


class _Mean:
    """The mean output, without bias, that the float model's linears have."""

    def __init__(self, qmodel: QuantModel, site: Site, users: list[Linear], found: dict[str, Tensor]) -> None:
        self.qmodel, self.users, self.found = qmodel, users, found
        self.quantizer = qmodel.quantizers[site]
        weight = qmodel.weight(users[0].weight)
        assert weight is not None
        self.moments = Moments(weight[0].numel(), weight.device, second=False)

    def observe(self, x: Tensor, images: int) -> None:
        self.moments.add(self.users[0].rows(self.qmodel.model, self._seen(x)))

    def _seen(self, x: Tensor) -> Tensor:
        return x

    def finish(self) -> None:
        for user in self.users:
            weight = self.qmodel.weight(user.weight)
            assert weight is not None
            self.found[str(user.module)] = weight.flatten(1).double() @ self.moments.mean


class _Shift(_Mean):
    """The same of the quantized linears, and the difference put into their biases."""

    def __init__(
        self,
        qmodel: QuantModel,
        site: Site,
        users: list[Linear],
        wanted: dict[str, Tensor],
        shifts: dict[str, Tensor],
    ) -> None:
        super().__init__(qmodel, site, users, {})
        self.wanted, self.shifts = wanted, shifts

    def _seen(self, x: Tensor) -> Tensor:
        return as_used(self.quantizer, x)

    def finish(self) -> None:
        for user in self.users:
            weight, name = self.qmodel.weight(user.weight), str(user.module)
            assert weight is not None
            used = self.qmodel.quantizers[user.weight](weight.data).flatten(1).double()
            self.shifts[name] = (self.wanted[name] - used @ self.moments.mean).float()
            add_to_bias(self.qmodel.model, name, self.shifts[name])
