"""Choose scales by the error of the products that they are used in, one operand after the other.

Formula: argmin over candidates p of objective(Q_p(A) Q(B), A B), alternating between the operands
Source:  the alternating search of Liu et al., arXiv 2106.14156, section 3.3, and PTQ4ViT, arXiv 2111.12293, algorithm 1

Differs from their code in that results are judged on a sample of their rows (where gradients are given, one that
follows them) instead of on all, so that a candidate costs a small part of a forward; and in that what a site has
already takes part, so that no step makes the objective worse on what is looked at (cosine, which is taken for each
scale group by itself, can still fall for the whole result).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import final

import torch
from torch import Tensor

from vitq.calibrate.gather import gathered
from vitq.calibrate.judge import Judge
from vitq.calibrate.objective import OBJECTIVES
from vitq.calibrate.products import Product, Samples, products
from vitq.calibrate.progressive import finalists
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import SOFTMAX_OUT
from vitq.quantizers.base import Params, Quantizer

Operands = tuple[Quantizer | None, Quantizer | None]
EVERYTHING = 2**62  # more rows than there are
TOLD = 4  # one row in so many gives the error that is told; nothing is decided by it
SCANNED = 8  # of what a format has to choose besides a range, with every range


@PASSES.register("fit_products")
@final
class FitProducts(Pass):
    """Fit the operands of every matrix product again, by what they do to it; all products see float operands.

    Args:
        objective: one of calibrate/objective.py.
        low, high: the ranges that are tried: the whole range times `steps` factors from low to high.
        softmax_low, softmax_high: for attention probabilities; as the others unless given.
        steps: how many.
        weights: fit parameters, too; else they keep what they have.
        rounds: how often both operands are fitted; it ends sooner where nothing changes any more.
        search: "grid" (these ranges) or "progressive" (calibrate/progressive.py, which has ranges of its own).
        alone: fit every operand by its own error first.
        mixed: only operands whose scale groups mix in the product: channel scales of inputs, before they are folded.
        rows: sample of rows of a linear; entries, per_entry: images or windows of a product of activations, and rows
            of each. 0 takes all.

    Einsums, products of one weight with several inputs, and dynamic formats are left as they are.
    """

    name = "fit_products"
    slot = "fit"
    needs = frozenset({ACT_SCALES, WEIGHT_SCALES})
    gives = frozenset({ACT_SCALES, WEIGHT_SCALES})
    cost = "a forward of the calibration images (with gradients up to two backwards) per 144 MiB of samples; the search"

    def __init__(
        self,
        objective: str = "mse",
        low: float = 0.3,
        high: float = 1.2,
        softmax_low: float | None = None,
        softmax_high: float | None = None,
        steps: int = 100,
        weights: bool = True,
        rounds: int = 3,
        search: str = "grid",
        alone: bool = False,
        mixed: bool = False,
        rows: int = 256,
        entries: int = 16,
        per_entry: int = 32,
        seed: int = 0,
    ) -> None:
        if objective not in OBJECTIVES:
            raise CompositionError(
                f"pass 'fit_products': unknown objective {objective!r}; use one of {', '.join(OBJECTIVES)}"
            )
        self.objective = OBJECTIVES[objective]
        self.linear = (low, high)
        self.softmax = (low if softmax_low is None else softmax_low, high if softmax_high is None else softmax_high)
        if steps < 2 or rounds < 1 or not all(0 < a < b for a, b in (self.linear, self.softmax)):
            raise CompositionError("pass 'fit_products': needs 0 < low < high, two steps or more, and one round")
        if search not in ("grid", "progressive"):
            raise CompositionError(f"pass 'fit_products': unknown search {search!r}; use grid or progressive")
        self.steps, self.weights, self.rounds, self.seed = steps, weights, rounds, seed
        self.search, self.alone, self.mixed = search, alone, mixed
        self.rows, self.entries, self.per_entry = rows, entries, per_entry

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("fitting scales by the error of products needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fit every product."""
        assert data is not None
        every = products(qmodel)
        waiting = [p for p in every if self._sides(p, _quantizers(qmodel, p))]
        gains: list[float] = []
        with progress.task("fitting products", len(waiting)) as task:
            for samples in self.sampled(qmodel, waiting, data, progress):
                if samples.chunks and not samples.unusable:
                    judge = Judge(qmodel.model, samples.product, samples.chunks, samples.quantizers, self.objective)
                    gains.append(self._fit(judge, samples))
                task.advance()
        mean = sum(gains) / len(gains) if gains else 1.0
        qmodel.log[self.name] = {
            "fitted": len(gains),
            "kept": len(every) - len(gains),
            "error_of_before": round(mean, 4),
        }

    def sampled(self, qmodel: QuantModel, found: list[Product], data: Batches, progress: Progress) -> Iterator[Samples]:
        """Samples of every product in order (calibrate/gather.py)."""
        limits = (self.rows or EVERYTHING, self.entries or EVERYTHING, self.per_entry or EVERYTHING)
        every = [Samples(p, _quantizers(qmodel, p), *limits, data.count) for p in found]
        return gathered(qmodel, every, data, self.objective.probe, self.seed, progress)

    def _fit(self, judge: Judge, samples: Samples) -> float:
        """Alternate until nothing changes; the share of the error that is left."""
        sides = self._sides(judge.product, judge.quantizers)
        before = judge.error(TOLD)
        for side in sides if self.alone else ():
            self._search(judge, side, samples, alone=True)
        for _ in range(self.rounds):
            changed = [self._search(judge, side, samples) for side in sides]
            if not any(changed) or len(sides) == 1:
                break
        return judge.error(TOLD) / before if before > 0 else 1.0

    def _sides(self, product: Product, quantizers: Operands) -> list[str]:
        """Which operands are fitted, in order: weights before inputs."""
        sides = ["right", "left"] if product.kind in ("linear", "conv") else ["left", "right"]
        return [side for side in sides if self._searched(product, side, quantizers[side == "right"])]

    def _searched(self, product: Product, side: str, quantizer: Quantizer | None) -> bool:
        if quantizer is None or quantizer.baked or (self.mixed and product.groups_of(side, quantizer) is not None):
            return False
        parameter = product.right.param is not None
        return side == "left" or (product.owns_right and (self.weights or not parameter))

    def _search(self, judge: Judge, side: str, samples: Samples, *, alone: bool = False) -> bool:
        """Take the best of the candidates and of what there is; whether that is something new."""
        quantizer = judge.quantizers[side == "right"]
        assert quantizer is not None
        now = {name: value.reshape(1, -1) for name, value in quantizer.params().items()}
        found = self._progressive if self.search == "progressive" else self._grid
        tried = found(judge, side, quantizer, samples, now, alone)
        tried = {name: torch.cat([now[name], tried[name]]) for name in quantizer.fields}
        best = judge.best(side, tried, alone=alone)
        if not bool(best.any()):
            return False
        quantizer.set_params({name: value.gather(0, best)[0] for name, value in tried.items()})
        return True

    def _grid(
        self, judge: Judge, side: str, quantizer: Quantizer, samples: Samples, now: Params, alone: bool
    ) -> Params:
        site = judge.product.left if side == "left" else judge.product.right
        low, high = self.softmax if site.role == SOFTMAX_OUT else self.linear
        bottom, top = _range(judge, side, quantizer, samples)
        factors = torch.linspace(low, high, self.steps, device=bottom.device)[:, None]
        tried = quantizer.variants(quantizer.range_to_params(factors * bottom, factors * top))
        each = len(next(iter(tried.values()))) // self.steps
        if each < 2 * SCANNED:
            return _different(tried)
        # Too many for each range: the range is chosen with a few of them, then those near the best are tried with it.
        few = torch.arange(each * self.steps, device=bottom.device) % each % (each // SCANNED) == 0
        some = _different({name: value[few] for name, value in tried.items()})
        some = {name: torch.cat([now[name], value]) for name, value in some.items()}
        best = judge.best(side, some, alone=alone)
        chosen = {name: value.gather(0, best) for name, value in some.items()}
        every = quantizer.variants(chosen)
        at = _nearest(every, chosen)
        around = torch.arange(-(each // SCANNED), each // SCANNED + 1, device=bottom.device)[:, None]
        near = (at + around).clamp(0, each - 1)
        return _different({name: value.gather(0, near) for name, value in every.items()})

    def _progressive(
        self, judge: Judge, side: str, quantizer: Quantizer, samples: Samples, now: Params, alone: bool
    ) -> Params:
        ends = [_range(judge, side, quantizer, samples), _middle(judge, side, quantizer, samples)]
        whole, middle = (quantizer.range_to_params(low[None], high[None]) for low, high in ends)
        share = 1.0 if side == "left" and judge.product.kind in ("linear", "conv") else 0.5
        return finalists(quantizer, partial(judge.score, side, alone=alone, first=True), now, middle, whole, share)


def _different(params: Params) -> Params:
    """Without candidates that are the same in every group: some formats do not follow every range."""
    rows = torch.cat(list(params.values()), dim=1)
    number = torch.unique(rows, dim=0, return_inverse=True)[1]
    at = torch.arange(len(rows), device=rows.device)
    kept = at.new_full((int(number.max()) + 1,), len(rows)).scatter_reduce_(0, number, at, "amin").sort().values
    return {name: value[kept] for name, value in params.items()}


def _nearest(params: Params, one: Params) -> Tensor:
    """(1, G) which candidate is closest to another, each field in parts of its largest value."""
    away = [
        (value - one[name]).abs() / value.abs().amax(0).clamp(min=torch.finfo(value.dtype).tiny)
        for name, value in params.items()
    ]
    return torch.stack(away).sum(0).argmin(0, keepdim=True)


def _range(judge: Judge, side: str, quantizer: Quantizer, samples: Samples) -> tuple[Tensor, Tensor]:
    if side in samples.ranges:
        return samples.ranges[side]
    return torch.aminmax(quantizer.layout.by_group(judge.operand(side, samples.chunks[0])), dim=1)


def _middle(judge: Judge, side: str, quantizer: Quantizer, samples: Samples) -> tuple[Tensor, Tensor]:
    chunks = samples.chunks if side in samples.ranges else samples.chunks[:1]
    values = [quantizer.layout.by_group(judge.operand(side, chunk)) for chunk in chunks]
    return quantizer.middle(torch.cat(values, dim=1))


def _quantizers(qmodel: QuantModel, product: Product) -> Operands:
    return _quantizer(qmodel, product.left.id), _quantizer(qmodel, product.right.id)


def _quantizer(qmodel: QuantModel, site: str) -> Quantizer | None:
    if site not in qmodel.quantizers:  # left float
        return None
    found = qmodel.quantizers[site]
    return found if isinstance(found, Quantizer) else None
