"""What passes that correct biases share: mean outputs of the float model, given to the quantized linears one by one.

Shapes:  W (out, in) float weights, Q quantized ones    x, q (in,) mean inputs of the float and the quantized model
Formula: bias += W x - Q q
Source:  passes/compensate/bias.py says whose
"""

from __future__ import annotations

from torch import Tensor

from vitq.calibrate.capture import watch_parallel
from vitq.calibrate.importance import RowWeights
from vitq.calibrate.linears import Linear, as_used
from vitq.calibrate.moments import Moments
from vitq.core.batches import Batches
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.passes.shift_bias import ShiftBiasRewrite, add_to_bias


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
        sites = [linear.input for linear in own.values()]
        wanted: dict[str, Tensor] = {}
        watch_parallel(
            qmodel, sites, lambda s: _Mean(qmodel, own[s.id], self.rows(s, own), wanted, data.count), data, progress
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
        self.qmodel.log["correct_bias"] = {"corrected": len(self.wanted), "kept": kept}


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
        self, qmodel: QuantModel, linear: Linear, weights: RowWeights, found: dict[str, Tensor], images: int
    ) -> None:
        super().__init__(qmodel, linear, weights)
        self.found, self.left = found, images

    def observe(self, x: Tensor, images: int) -> None:
        self.left -= images
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
