"""Fold channel scales into the LayerNorm before them, so that one scale serves every channel.

Source:  RepQ-ViT, arXiv 2212.08254, section 3.2 (scale reparameterization)
Shapes:  C channels, O outputs of a linear
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.format import Format
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.core.site import NormLinear
from vitq.passes.reparam.tensors import bias_beside, give_bias, store
from vitq.quantizers.base import Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer


@REWRITES.register("fold_norm_scale")
@final
class FoldNormScaleRewrite(Rewrite):
    """norm(x) becomes (norm(x) + shift) / ratio, and every linear behind it undoes that. The float output is unchanged.

    Args:
        args: norm (module name), weights and biases (parameter names, aligned).
        tensors: ratio (C,), shift (C,), dead (C,) bool: constant channels, which the shift makes
            zero and whose share of the output moves into the biases altogether.
    """

    name = "fold_norm_scale"

    def prepare(self, model: nn.Module) -> None:
        """Give a zero bias to linears that have none, to take up the shift."""
        for weight, bias in zip(self.args["weights"], self.args["biases"], strict=True):
            give_bias(model, weight, bias)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Change norm, weights and biases in place; arithmetic in float64, rounded once."""
        norm = model.get_submodule(self.args["norm"])
        ratio, shift = self.tensors["ratio"].double(), self.tensors["shift"].double()
        gamma, beta = _parameter(norm, "weight"), _parameter(norm, "bias")
        store(beta, (beta.double() + shift) / ratio)
        store(gamma, gamma.double() / ratio)
        for weight_name, bias_name in zip(self.args["weights"], self.args["biases"], strict=True):
            weight, bias = model.get_parameter(weight_name), model.get_parameter(bias_name)
            wide = weight.double()
            store(bias, bias.double() - wide @ shift)
            store(weight, (wide * ratio).masked_fill(self.tensors["dead"], 0.0))


@PASSES.register("fold_norm_scale")
@final
class FoldNormScale(Pass):
    """Turn per-channel scales after a LayerNorm into one scale, without changing a code.

    Args:
        aggregate: the one scale is the "mean" (RepQ-ViT) or "median" (DopQ-ViT) of the channels'.
        parity: reproduce the official code's arithmetic: a fractional mean zero-point, and constant channels
            averaged in like any other.

    Differs from the official code, unless `parity`, in two ways. The zero-point is a whole number in code
    range, as an integer kernel needs; any whole one gives the same codes, because the shift takes up the
    difference. Channels that are constant after the norm (gamma 0) have no scale of their own: they are left
    out of the mean, and their share moves into the bias.

    Where the linears behind one norm have different formats (a wider key, by an override), one transform cannot
    suit all: that of the narrowest is taken, and the others are fitted again, per tensor, by the next fit.
    """

    name = "fold_norm_scale"
    slot = "fit"
    needs = frozenset({ACT_SCALES})
    drops = frozenset({WEIGHT_SCALES})
    gives = frozenset({ACT_SCALES})
    cost = "nothing"

    def __init__(self, aggregate: str = "mean", parity: bool = False) -> None:
        if aggregate not in ("mean", "median"):
            raise CompositionError(f"pass 'fold_norm_scale': unknown aggregate {aggregate!r}; use mean or median")
        self.aggregate = aggregate
        self.parity = parity

    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fold every norm whose linears' inputs have channel scales; their weights must be fitted again."""
        folded = 0
        for pair in qmodel.graph.pairs:
            quantized = [s for s in pair.inputs if s in qmodel.quantizers and qmodel.formats[s].per == "channel"]
            if quantized:
                self._fold(qmodel, pair, quantized)
                folded += 1
        qmodel.log["fold_norm_scale"] = {"norms": folded}

    @torch.no_grad()
    def _fold(self, qmodel: QuantModel, pair: NormLinear, quantized: list[str]) -> None:
        narrowest = min(quantized, key=lambda site: qmodel.formats[site].bits)
        first = qmodel.quantizers[narrowest]
        if not isinstance(first, UniformQuantizer):
            raise CompositionError(
                f"{narrowest}: only uniform channel scales can be folded, not {type(first).__name__}"
            )
        scale, zero_point = first.scale.reshape(-1), first.zero_point.reshape(-1)
        dead = torch.zeros_like(scale, dtype=torch.bool) if self.parity else constant_channels(qmodel, pair)
        one_scale, one_zero = self._aggregate(scale, zero_point, dead, first.bits)
        ratio = (scale / one_scale).double()
        shift = scale.double() * (zero_point.double() - one_zero.double())
        fold(qmodel, pair, ratio, shift, dead)
        same = [site for site in quantized if qmodel.formats[site] == qmodel.formats[narrowest]]
        for site in same:
            self._merge(qmodel, site, one_scale, one_zero)
        for site in pair.inputs:
            if site in qmodel.quantizers and site not in same:
                self._refit(qmodel, site)
        for site in pair.weights:
            if site in qmodel.quantizers:
                qmodel.quantizers[site].unfit()

    def _aggregate(self, scale: Tensor, zero_point: Tensor, dead: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        if bool(dead.all()):
            return scale.new_ones(()), scale.new_zeros(())
        live, zeros = scale[~dead], zero_point[~dead]
        middle = torch.mean if self.aggregate == "mean" else torch.median
        if self.parity:
            return middle(live), middle(zeros)
        return middle(live), middle(zeros).round().clamp(0, 2**bits - 1)

    def _refit(self, qmodel: QuantModel, site: str) -> None:
        """The values at this site have changed in a way that its scales do not follow."""
        quantizer, old = qmodel.quantizers[site], qmodel.formats[site]
        quantizer.unfit()
        quantizer.state = "off"
        if old.per == "channel":
            assert isinstance(quantizer, Quantizer)
            quantizer.relayout(Layout())
            qmodel.formats[site] = Format(old.kind, old.bits, "tensor", old.options)

    def _merge(self, qmodel: QuantModel, site: str, scale: Tensor, zero_point: Tensor) -> None:
        quantizer = qmodel.quantizers[site]
        assert isinstance(quantizer, UniformQuantizer)
        state = quantizer.state
        quantizer.relayout(Layout())
        quantizer.keep_fraction(self.parity)
        quantizer.set_params({"scale": scale, "zero_point": zero_point})
        quantizer.state = state
        old = qmodel.formats[site]
        qmodel.formats[site] = Format.of(
            old.kind, old.bits, "tensor", **{k: v for k, v in quantizer.settings().items() if v}
        )


def constant_channels(qmodel: QuantModel, pair: NormLinear) -> Tensor:
    """(C,) bool: channels that the norm makes the same for every input."""
    return _parameter(qmodel.model.get_submodule(pair.norm), "weight").detach() == 0


@torch.no_grad()
def fold(qmodel: QuantModel, pair: NormLinear, ratio: Tensor, shift: Tensor, dead: Tensor) -> None:
    """Rewrite a norm and the linears behind it; what is dead becomes zero whatever its ratio and shift."""
    beta = _parameter(qmodel.model.get_submodule(pair.norm), "bias").double()
    ratio, shift = torch.where(dead, 1.0, ratio), torch.where(dead, -beta, shift)
    weights = [_param(qmodel, site) for site in pair.weights]
    biases = [b or bias_beside(w) for w, b in zip(weights, pair.biases, strict=True)]
    args = {"norm": pair.norm, "weights": weights, "biases": biases}
    tensors = {"ratio": ratio.float(), "shift": shift.float(), "dead": dead}
    qmodel.apply_rewrite(FoldNormScaleRewrite(args, tensors))


def _param(qmodel: QuantModel, site: str) -> str:
    name = qmodel.graph.sites[site].param
    assert name is not None, "a pair's weights are parameters"
    return name


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = getattr(module, name)
    assert isinstance(found, nn.Parameter)
    return found
