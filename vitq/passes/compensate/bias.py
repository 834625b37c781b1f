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
        weights = row_weights(qmodel, data, every, progress) if self.weighted else {}
        with watchable(qmodel, [linear.input for linear in every]):
            biases = Biases(qmodel, every, weights, data, progress)
            watch_prefix(qmodel, [linear.input for linear in biases.linears.values()], biases.watcher, data, progress)
            biases.keep()


class Biases:
    """Finds what the linears of the float model put out on average, and gives it to the quantized ones.

    Attributes:
        linears: those whose biases can be corrected, by input site.

    Args:
        found: linears, of which those that have no module of their own or are called several times are passed over.
        weights: of their rows, by weight site, where these do not count alike.
    """

    def __init__(
        self, qmodel: QuantModel, found: list[Linear], weights: dict[str, Tensor], data: Batches, progress: Progress
    ) -> None:
        self.qmodel, self.weights = qmodel, weights
        own = {linear.input.id: linear for linear in found if linear.module is not None}
        sites, batches = [linear.input for linear in own.values()], len(data.sizes)
        wanted: dict[str, Tensor] = {}
        watch_parallel(
            qmodel, sites, lambda s: _Mean(qmodel, own[s.id], self.rows(s, own), wanted, batches), data, progress
        )
        self.wanted = wanted
        self.linears = {site: linear for site, linear in own.items() if str(linear.module) in wanted}
        self.shifts: dict[str, Tensor] = {}
        self.rewrite = ShiftBiasRewrite({"modules": list(wanted)}, {})
        self.rewrite.prepare(qmodel.model)

    def rows(self, site: Site, of: dict[str, Linear]) -> RowWeights:
        """What the rows at an input count."""
        return RowWeights(self.weights.get(of[site.id].weight.id))

    def watcher(self, site: Site) -> _Shift:
        """Corrects one linear, on the quantized prefix."""
        return _Shift(self.qmodel, self.linears[site.id], self.rows(site, self.linears), self)

    def correct(self, linear: Linear, mean: Tensor) -> None:
        """Give a linear's bias what its output lacks now, where its inputs have this mean (in,) float64."""
        name, weight = str(linear.module), self.qmodel.weight(linear.weight)
        if linear.input.id not in self.linears or weight is None:
            return
        used = self.qmodel.quantizers[linear.weight](weight.data)
        self.shifts[name] = (self.wanted[name] - used.flatten(1).double() @ mean).float()
        add_to_bias(self.qmodel.model, name, self.shifts[name])

    def keep(self) -> None:
        """Note it in the model. Each was applied as soon as it was known: those behind were found on top of it."""
        self.rewrite.tensors = {str(number): self.shifts[name] for number, name in enumerate(self.wanted)}
        if self.wanted:
            self.qmodel.rewrites.append(self.rewrite)
        kept = len(self.qmodel.sites(WEIGHT)) - len(self.wanted)
        self.qmodel.log[CorrectBias.name] = {"corrected": len(self.wanted), "kept": kept}


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
            self.found[str(self.linear.module)] = self.weight.flatten(1).double() @ self.moments.mean


class _Shift(_Inputs):
    """Puts what the quantized linear lacks into its bias."""

    def __init__(self, qmodel: QuantModel, linear: Linear, weights: RowWeights, biases: Biases) -> None:
        super().__init__(qmodel, linear, weights)
        self.biases = biases

    def observe(self, x: Tensor, images: int) -> Tensor:
        used = as_used(self.qmodel.quantizers[self.linear.input], x)
        self.take(used)
        return used

    def finish(self) -> None:
        self.biases.correct(self.linear, self.moments.mean)
