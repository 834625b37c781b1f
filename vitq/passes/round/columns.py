"""Choose weight codes column by column, so that later columns make up for the errors of earlier ones.

Shapes:  W (out, in) weights    H (in, in) mean of x x^T over calibration tokens, x the (quantized) inputs
Formula: minimise tr((W - Q) H (W - Q)^T) greedily: column j is rounded, and (w_j - q_j) / U_jj * U_j,j+1: is taken
         off the columns behind it, U the upper Cholesky factor of the inverse of H
Source:  GPTQ, Frantar et al., ICLR 2023, arXiv 2210.17323, algorithm 1; OBQ, arXiv 2208.11580, equation 2
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from vitq.calibrate.capture import watch_prefix
from vitq.calibrate.importance import RowWeights, row_weights
from vitq.calibrate.linears import Linear, as_used, linears, watchable
from vitq.calibrate.moments import ErrorMoments, Moments
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.passes.biases import Biases
from vitq.passes.round.absorb import absorbed
from vitq.quantizers.base import Params, Quantizer

COLUMNS = 128  # are corrected one by one; those behind them once per so many


@PASSES.register("round_columns")
@final
class RoundColumns(Pass):
    """Choose the codes of every linear's weight by the error of its output on the quantized prefix.

    Args:
        damp: added to the diagonal of H, in parts of its mean. The paper's 0.01 is for 128 long texts; with 32 images
            it makes up for errors that other images do not have (`benchmarks/rounding.py`).
        order: take columns in the order of falling diagonal of H ("activation order"), which costs nothing as scales
            are fixed before; False takes them as they stand.
        weighted: tokens count by their gradients (calibrate/importance.py), which takes a backward more.
        absorb: weights first make up for what quantizing their own inputs loses (passes/round/absorb.py): the ridge, 0
            for not at all. A head behind a class token, with few images, keeps its weights.
        biases: correct each bias (passes/biases.py) as soon as the codes are chosen: those behind are chosen
            on top of it, and no forward more on the quantized prefix is needed.

    Nearest rounding stays where there are fewer tokens than inputs (a head behind a class token, with few images), and
    for rows that come out worse. Weights that are computed, of convolutions with groups, and inside fused attention
    functions keep it, too; the log says how many.
    """

    name = "round_columns"
    slot = "round"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "one forward of the calibration images (about three with more than 32), and a factorisation per linear"

    def __init__(
        self,
        damp: float = 0.3,
        order: bool = True,
        weighted: bool = False,
        biases: bool = False,
        absorb: float = 0.0,
    ) -> None:
        if not 0 < damp <= 1:
            raise CompositionError(f"pass 'round_columns': damp {damp} must be in (0, 1]")
        if absorb < 0:
            raise CompositionError(f"pass 'round_columns': absorb {absorb} must not be negative")
        self.damp = damp
        self.order = order
        self.weighted = weighted
        self.biases = biases
        self.absorb = absorb
        self.keeps_float_output = not biases

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("rounding by the error of the outputs needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Round every linear, each on what the ones before it give."""
        assert data is not None
        found = linears(qmodel)
        gains: list[float] = []
        at = {linear.input.id: linear for linear in found}
        sites = [linear.input for linear in found]
        weights = row_weights(qmodel, data, found, progress) if self.weighted else {}

        with watchable(qmodel, sites):
            biases = Biases(qmodel, found, weights, data, progress) if self.biases else None

            def watcher(site: Site) -> _Rounding:
                linear = at[site.id]
                return _Rounding(qmodel, linear, self, gains, RowWeights(weights.get(linear.weight.id)), biases)

            watch_prefix(qmodel, sites, watcher, data, progress)
            if biases is not None:
                biases.keep()
        mean = sum(gains) / len(gains) if gains else 1.0
        kept = len(qmodel.sites(WEIGHT)) - len(gains)
        qmodel.log["round_columns"] = {"rounded": len(gains), "kept": kept, "error_of_nearest": round(mean, 4)}


class _Rounding:
    """Gathers the inputs of a linear, then chooses its codes."""

    def __init__(
        self,
        qmodel: QuantModel,
        linear: Linear,
        settings: RoundColumns,
        gains: list[float],
        weights: RowWeights,
        biases: Biases | None,
    ) -> None:
        self.qmodel, self.linear, self.settings, self.gains, self.weights = qmodel, linear, settings, gains, weights
        self.biases = biases
        weight, quantizer = qmodel.weight(linear.weight), qmodel.quantizers[linear.weight]
        assert weight is not None
        assert isinstance(quantizer, Quantizer)
        self.weight: Tensor = weight.data
        self.quantizer: Quantizer = quantizer
        size, device = weight[0].numel(), weight.device
        self.lacking: ErrorMoments | None = ErrorMoments(size, device) if settings.absorb else None
        self.moments: Moments = self.lacking.used if self.lacking else Moments(size, device)

    def observe(self, x: Tensor, images: int) -> Tensor:
        model, used = self.qmodel.model, as_used(self.qmodel.quantizers[self.linear.input], x)
        rows = self.linear.rows(model, used)
        weights = self.weights.of(rows)
        if self.lacking is None:
            self.moments.add(rows, weights)
        else:
            self.lacking.add(self.linear.rows(model, x), rows, weights)
        return used

    def finish(self) -> None:
        if self.moments.count >= self.moments.total.numel():
            damp, order = self.settings.damp, self.settings.order
            h, aim = self.moments.matrix, self.weight.float()
            if self.lacking is not None:
                wide = absorbed(aim.flatten(1).double(), h, self.lacking.matrix, self.settings.absorb)
                aim = wide.float().reshape(aim.shape)
            values, gain = choose(aim, h, self.quantizer, damp, order=order)
            self.quantizer.round_to(values.to(self.weight.dtype))
            self.gains.append(gain)
        if self.biases is not None:
            self.biases.correct(self.linear, self.moments.mean)


def choose(w: Tensor, h: Tensor, quantizer: Quantizer, damp: float, *, order: bool = True) -> tuple[Tensor, float]:
    """Values on the quantizer's grid, and their error in parts of that of nearest rounding.

    Args:
        w: (out, …) float32.
        h: (in, in) float64, mean of x x^T.
        quantizer: fitted; one scale per tensor, per output channel, or per group of inputs.

    Raises:
        CompositionError: damp is so small that H cannot be inverted.
    """
    shape, nearest = w.shape, quantizer.decode(quantizer.encode(w)).flatten(1)
    params = {name: per_weight(quantizer, value, w).flatten(1) for name, value in quantizer.params().items()}
    w = w.flatten(1)
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.double() + damp * h.diagonal().mean().clamp(min=1e-30))
    columns = h.diagonal().argsort(descending=True) if order else torch.arange(len(h), device=h.device)
    ordered = {name: value[:, columns] for name, value in params.items()}
    picked = _greedy(w[:, columns], h[columns][:, columns], quantizer, ordered)
    chosen = torch.empty_like(w)
    chosen[:, columns] = picked
    values, ratio = better_rows(w, chosen, nearest, h)
    return values.reshape(shape), ratio


def better_rows(w: Tensor, chosen: Tensor, nearest: Tensor, h: Tensor) -> tuple[Tensor, float]:
    """Chosen values, nearest ones in rows that come out worse, and their error in parts of that of nearest rounding."""
    before, after = (_row_errors(w - q, h) for q in (nearest, chosen))
    better = after < before
    kept = torch.where(better, after, before)
    ratio = float(kept.sum() / before.sum().clamp(min=1e-300)) if float(before.sum()) else 1.0
    return torch.where(better[:, None], chosen, nearest), ratio


def per_weight(quantizer: Quantizer, value: Tensor, w: Tensor) -> Tensor:
    """A parameter of the quantizer for every single weight."""
    return quantizer.layout.join(value.expand_as(quantizer.layout.split(w)))


def _greedy(w: Tensor, h: Tensor, quantizer: Quantizer, params: Params) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(h)
    factor, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed) or bool(failed_too):
        raise CompositionError(f"the inputs of {quantizer.where} are too much alike to be told apart; raise damp")
    factor = factor.float()
    scaled = (factor / factor.diagonal()[:, None]).contiguous()  # what each column takes off those behind it
    left, params = w.T.contiguous(), {name: value.T.contiguous() for name, value in params.items()}
    picked = torch.empty_like(left)
    for start in range(0, len(left), COLUMNS):
        stop = min(start + COLUMNS, len(left))
        for j in range(start, stop):
            some = {name: value[j] for name, value in params.items()}
            picked[j] = quantizer.simulate_with(left[j], some)
            left[j].sub_(picked[j])  # from here on its error
            left[j + 1 : stop].addr_(scaled[j, j + 1 : stop], left[j], alpha=-1)
        left[stop:].addmm_(scaled[start:stop, stop:].T, left[start:stop], alpha=-1)
    return picked.T


def _row_errors(wrong: Tensor, h: Tensor) -> Tensor:
    """(out,) error of each output channel, float64."""
    wide = wrong.double()
    return ((wide @ h) * wide).sum(1)
