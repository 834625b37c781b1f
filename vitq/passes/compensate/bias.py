"""Give back to each linear's bias what quantization took off its mean output.

Shapes:  W (out, in) float weights, Q quantized ones    x, q (in,) mean inputs of the float and the quantized model
Formula: bias += W x - Q q
Source:  bias correction: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2, with means from calibration images as
         in appendix D; for transformers Liu et al., NeurIPS 2021, arXiv 2106.14156, section 3.3
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from vitq.calibrate.capture import watch_parallel, watch_prefix
from vitq.calibrate.importance import RowWeights, row_weights
from vitq.calibrate.linears import Linear, as_used, linears, watchable
from vitq.calibrate.moments import Moments
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.passes.shift_bias import ShiftBiasRewrite, add_to_bias


@PASSES.register("correct_bias")
@final
class CorrectBias(Pass):
    """Make the mean output of every linear that of the float model, each on what the ones before it give.

    Args:
        weighted: of means over tokens that count by their gradients (calibrate/importance.py), which takes a backward.

    A module called several times in one forward has one bias for all of them, and is left as it is, as are weights that
    are tied, computed or used by something else than an nn.Linear or nn.Conv2d; the log says how many.
    """

    name = "correct_bias"
    slot = "compensate"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "two forwards of the calibration images; about four with more than 32"

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("correcting biases needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Correct every bias."""
        assert data is not None
        every = linears(qmodel)
        found = {linear.input.id: linear for linear in every if linear.module is not None}
        sites = [linear.input for linear in found.values()]
        wanted: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}
        batches = len(data.sizes)
        weights = row_weights(qmodel, data, list(found.values()), progress) if self.weighted else {}

        def of(site: Site) -> RowWeights:
            return RowWeights(weights.get(found[site.id].weight.id))

        with watchable(qmodel, sites):
            watch_parallel(qmodel, sites, lambda s: _Mean(qmodel, found[s.id], of(s), wanted, batches), data, progress)
            found = {site: linear for site, linear in found.items() if str(linear.module) in wanted}
            sites = [linear.input for linear in found.values()]
            rewrite = ShiftBiasRewrite({"modules": list(wanted)}, {})
            rewrite.prepare(qmodel.model)
            watch_prefix(qmodel, sites, lambda s: _Shift(qmodel, found[s.id], of(s), wanted, shifts), data, progress)
        # Each was applied as soon as it was known: those behind were found on top of it.
        rewrite.tensors = {str(number): shifts[name] for number, name in enumerate(wanted)}
        if wanted:
            qmodel.rewrites.append(rewrite)
        qmodel.log["correct_bias"] = {"corrected": len(wanted), "kept": len(qmodel.sites(WEIGHT)) - len(wanted)}


class _Inputs:
    """The mean input of a linear."""

    def __init__(self, qmodel: QuantModel, linear: Linear, weights: RowWeights) -> None:
        self.qmodel, self.linear, self.weights = qmodel, linear, weights
        weight = qmodel.weight(linear.weight)
        assert weight is not None
        self.weight = weight.data
        self.moments = Moments(self.weight[0].numel(), weight.device, second=False)

    def take(self, x: Tensor) -> None:
        """Take in the rows of a micro-batch."""
        rows = self.linear.rows(self.qmodel.model, x)
        self.moments.add(rows, self.weights.of(rows))

    def output(self, weight: Tensor) -> Tensor:
        """(out,) mean output without bias, float64."""
        return weight.flatten(1).double() @ self.moments.mean


class _Mean(_Inputs):
    """Notes what a linear of the float model puts out on average, if it is called once per forward."""

    def __init__(
        self, qmodel: QuantModel, linear: Linear, weights: RowWeights, found: dict[str, Tensor], batches: int
    ) -> None:
        super().__init__(qmodel, linear, weights)
        self.found, self.left = found, batches

    def observe(self, x: Tensor, images: int) -> None:
        self.left -= 1
        self.take(x)

    def finish(self) -> None:
        if self.left == 0:
            self.found[str(self.linear.module)] = self.output(self.weight)


class _Shift(_Inputs):
    """Puts what the quantized linear lacks into its bias."""

    def __init__(
        self,
        qmodel: QuantModel,
        linear: Linear,
        weights: RowWeights,
        wanted: dict[str, Tensor],
        shifts: dict[str, Tensor],
    ) -> None:
        super().__init__(qmodel, linear, weights)
        self.wanted, self.shifts = wanted, shifts

    def observe(self, x: Tensor, images: int) -> None:
        self.take(as_used(self.qmodel.quantizers[self.linear.input], x))

    def finish(self) -> None:
        name = str(self.linear.module)
        used = self.qmodel.quantizers[self.linear.weight](self.weight)
        self.shifts[name] = (self.wanted[name] - self.output(used)).float()
        add_to_bias(self.qmodel.model, name, self.shifts[name])
