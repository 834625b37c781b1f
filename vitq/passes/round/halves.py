"""Choose weight codes half by half, so that the linear's output on quantized inputs is that on exact ones.

Shapes:  W (out, in) weights    x, q (n, in) exact and quantized inputs of the linear    H (in, in) covariance of q
Units:   ridges (`absorb`, `damp`) are in parts of the mean of H's diagonal
Formula: absorb: A = W + W cov(x - q, q) (H + ridge I)^-1, the ridge regression of W x on q around W; A is aimed at, and
         its scales are chosen anew
         halves: the first half of the columns left is rounded to Q; refine: while it lowers |A - Q|^2 in the metric
         H11 - H12 H22^-1 H21 (that of what is left once the others have made up), the code of a row that lowers it
         most goes to A's other neighbour; compensate: A2 += (A1 - Q1) H12 H22^-1, H damped; then the rest likewise
         bias += W mean(x) - Q mean(q)
Source:  ERQ, Zhong et al., ICML 2024 / TPAMI 2025, arXiv 2407.06794: Aqer (absorb), and Wqer (refine, compensate)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from vitq.calibrate.capture import watch_prefix
from vitq.calibrate.linears import Linear, linears, quantized, used_once, watchable
from vitq.calibrate.moments import ErrorMoments
from vitq.calibrate.search import Search
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import WEIGHT
from vitq.passes.round.absorb import absorbed, strength
from vitq.passes.round.columns import better_rows, per_weight
from vitq.passes.shift_bias import ShiftBiasRewrite, add_to_bias
from vitq.quantizers.base import Params, Quantizer

FLOWS = ("parallel", "prefix")
ROWS = 2  # per input, at least: with fewer, the regression fits the images and not the linear


@PASSES.register("round_halves")
@final
class RoundHalves(Pass):
    """Choose the codes of every linear's weight, and its bias, by the error of its output.

    Args:
        absorb: ridge of the regression that takes up the error of the inputs; 0 aims at the float weights.
        flips: codes that may be flipped per row and half; 0 keeps the nearest.
        compensate: let the columns that are left make up for those that are rounded.
        damp: ridge of both metric and compensation.
        weight_method: how ranges of the absorbed weights are chosen (calibrate/search.py).
        flow: inputs are those of the float model ("parallel") or those of the quantized prefix ("prefix"), exact and
            then quantized at the linear itself.

    The float weights stay in the model, and the codes chosen go with the quantizers. Left as they are: weights with
    fewer than two tokens per input (a head behind a class token, with few images), weights that serve several calls,
    that are computed, left in float, or inside fused attention functions; the log says how many.
    """

    name = "round_halves"
    slot = "round"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False  # biases
    cost = (
        "one forward of the calibration images (about three with more than 32), two products of squares of the inputs, "
        "and two factorisations per linear"
    )

    def __init__(
        self,
        absorb: float = 1.0,
        flips: int = 100,
        compensate: bool = True,
        damp: float = 0.3,
        weight_method: str = "mse",
        flow: str = "parallel",
    ) -> None:
        if absorb < 0 or flips < 0:
            raise CompositionError(f"pass 'round_halves': absorb {absorb} and flips {flips} must not be negative")
        if damp <= 0:
            raise CompositionError(f"pass 'round_halves': damp {damp} must be positive")
        if flow not in FLOWS:
            raise CompositionError(f"pass 'round_halves': unknown flow {flow!r}; use one of {', '.join(FLOWS)}")
        self.absorb, self.flips, self.compensate, self.damp = absorb, flips, compensate, damp
        self.search = Search(weight_method, exact=True)
        self.flow = flow

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("rounding by the error of the outputs needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Round every linear."""
        assert data is not None
        found = {linear.input.id: linear for linear in used_once(qmodel, data, linears(qmodel))}
        sites = [linear.input for linear in found.values()]
        names = [linear.module for linear in found.values() if linear.module is not None]
        rewrite = ShiftBiasRewrite({"modules": names}, {})
        rewrite.prepare(qmodel.model)
        done = _Done({}, [])
        on = [s for s in qmodel.sites() if qmodel.quantizers[s].state != "off" and not qmodel.quantizers[s].baked]
        if self.flow == "parallel":
            qmodel.set_state("off", on)
        try:
            with watchable(qmodel, sites):
                watch_prefix(qmodel, sites, lambda s: _Rounding(qmodel, found[s.id], self, done), data, progress)
        finally:
            qmodel.set_state("on", on)
        for number, name in enumerate(names):
            rewrite.tensors[str(number)] = done.shifts.get(name, _zeros(qmodel.model, name))
        if self.flow == "parallel":  # on the quantized prefix, each was applied when it was found
            rewrite.apply(qmodel.model)
        if names:
            qmodel.rewrites.append(rewrite)
        mean = sum(done.gains) / len(done.gains) if done.gains else 1.0
        kept = len(qmodel.sites(WEIGHT)) - len(done.gains)
        qmodel.log[self.name] = {"rounded": len(done.gains), "kept": kept, "error_of_nearest": round(mean, 4)}


@dataclass
class _Done:
    """What was found: shifts of biases by module, and errors in parts of that of nearest rounding."""

    shifts: dict[str, Tensor]
    gains: list[float]


class _Rounding:
    """Gathers the inputs of a linear, then chooses its codes."""

    def __init__(self, qmodel: QuantModel, linear: Linear, settings: RoundHalves, done: _Done) -> None:
        self.qmodel, self.linear, self.settings, self.done = qmodel, linear, settings, done
        weight, quantizer = qmodel.weight(linear.weight), qmodel.quantizers[linear.weight]
        assert weight is not None
        assert isinstance(quantizer, Quantizer)
        self.weight: Tensor = weight.data
        self.quantizer: Quantizer = quantizer
        self.moments: ErrorMoments = ErrorMoments(weight[0].numel(), weight.device)

    def observe(self, x: Tensor, images: int) -> None:
        model, quantizer = self.qmodel.model, self.qmodel.quantizers[self.linear.input]
        self.moments.add(self.linear.rows(model, x), self.linear.rows(model, quantized(quantizer, x)))

    def finish(self) -> None:
        settings, moments, module = self.settings, self.moments, self.linear.module
        used = moments.used
        if used.count < ROWS * len(used.mean):
            return
        # What a bias takes up need not concern the weight.
        h = used.matrix if module is None else used.covariance
        cross = moments.matrix if module is None else moments.covariance
        w = self.weight.double().flatten(1)
        aim = self.weight.float()
        if settings.absorb:
            aim = absorbed(w, h, cross, settings.absorb).float().reshape(aim.shape)
            settings.search.fit(self.quantizer, aim)
        values, gain = halves(
            aim, h, self.quantizer, settings.damp, flips=settings.flips, compensate=settings.compensate
        )
        values = values.to(self.weight.dtype)
        self.quantizer.round_to(values)
        self.done.gains.append(gain)
        if module is not None:
            shift = w @ (used.mean + moments.error.mean) - values.double().flatten(1) @ used.mean
            self.done.shifts[module] = shift.float()
            if settings.flow == "prefix":
                add_to_bias(self.qmodel.model, module, self.done.shifts[module])


def halves(
    w: Tensor, h: Tensor, quantizer: Quantizer, damp: float, *, flips: int, compensate: bool = True
) -> tuple[Tensor, float]:
    """Values on the quantizer's grid, and their error in parts of that of nearest rounding.

    Args:
        w: (out, …) float32.
        h: (in, in) float64 moments of the inputs.
        quantizer: fitted; one scale per tensor, per output channel, or per group of inputs.
    """
    nearest = quantizer.decode(quantizer.encode(w)).flatten(1)
    params = {name: per_weight(quantizer, value, w).flatten(1) for name, value in quantizer.params().items()}
    h = h + damp * strength(h)
    aim, chosen = w.flatten(1).double(), nearest.clone()
    start, size = 0, len(h)
    while start < size:
        stop = start + max(1, (size - start) // 2)
        now, later = slice(start, stop), slice(stop, size)
        some = {name: value[:, now] for name, value in params.items()}
        metric, pull = h[now, now], None
        if compensate and stop < size:
            pull = torch.linalg.solve(h[later, later], h[later, now])
            metric = metric - h[now, later] @ pull
        chosen[:, now] = _refined(aim[:, now], quantizer, some, metric, flips)
        if pull is not None:
            aim[:, later] += (aim[:, now] - chosen[:, now]) @ pull.T
        start = stop
    values, ratio = better_rows(w.flatten(1), chosen, nearest, h)
    return values.reshape(w.shape), ratio


def _refined(w: Tensor, quantizer: Quantizer, params: Params, metric: Tensor, flips: int) -> Tensor:
    """Nearest values, and their neighbours on the other side of w, one per row at a time, where that helps most.

    A step t at column j changes (q - w) M (q - w)^T by t (2 g_j + t M_jj), with g = (q - w) M.
    """
    target = w.float()
    code = quantizer.encode_with(target, params)
    nearest = quantizer.decode_with(code, params)
    up = torch.where((nearest < target) ^ quantizer.descending, 1.0, -1.0)
    other = quantizer.decode_with((code + up).clamp(0, quantizer.code_count - 1), params)
    metric = metric.float()
    slope, step = (nearest - w).float() @ metric, other - nearest
    flipped = torch.zeros_like(code, dtype=torch.bool)
    rows = torch.arange(len(w), device=w.device)
    for _ in range(flips):
        change, best = (step[rows] * (2 * slope[rows] + step[rows] * metric.diagonal())).min(1)
        rows, best = rows[change < 0], best[change < 0]
        if not len(rows):
            break
        slope[rows] += step[rows, best, None] * metric[best]
        step[rows, best] *= -1
        flipped[rows, best] ^= True
    return torch.where(flipped, other, nearest)


def _zeros(model: nn.Module, module: str) -> Tensor:
    bias = model.get_submodule(module).bias
    assert isinstance(bias, Tensor)
    return torch.zeros_like(bias, dtype=torch.float32)
