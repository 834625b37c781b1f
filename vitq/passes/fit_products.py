"""Choose scales by the error of the products that they are used in, one operand after the other.

Formula: argmin over candidates p of objective(Q_p(A) Q(B), A B), alternating between the operands
Source:  the alternating search of Liu et al., arXiv 2106.14156, section 3.3, and PTQ4ViT, arXiv 2111.12293, algorithm 1

Differs from their code in that results are judged on a sample of their rows (where gradients are given, one that
follows them) instead of on all, so that a candidate costs a small part of a forward; and in that what a site has
already takes part, so that the objective never gets worse on what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

import torch
from torch import Tensor

from vitq.calibrate.judge import Judge
from vitq.calibrate.linears import watchable
from vitq.calibrate.objective import OBJECTIVES
from vitq.calibrate.products import Product, Samples, products
from vitq.calibrate.sensitivity import run_backward
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import SOFTMAX_OUT
from vitq.quantizers.base import Params, Quantizer


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
        rows: sample of rows of a linear; entries, per_entry: images or windows of a product of activations, and rows
            of each. 0 takes all.

    Einsums, products of one weight with several inputs, and dynamic formats are left as they are.
    """

    name = "fit_products"
    slot = "fit"
    needs = frozenset({ACT_SCALES, WEIGHT_SCALES})
    gives = frozenset({ACT_SCALES, WEIGHT_SCALES})
    cost = "one forward of the calibration images, two to three backwards if the objective needs gradients; the search"

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
        self.steps, self.weights, self.rounds, self.seed = steps, weights, rounds, seed
        self.rows, self.entries, self.per_entry = rows, entries, per_entry

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("fitting scales by the error of products needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fit every product."""
        assert data is not None
        found = products(qmodel)
        sampled = self._sample(qmodel, found, data, progress)
        fitted = 0
        gains = []
        with progress.task("fitting products", len(found)) as task:
            for product in found:
                samples = sampled.pop(product)
                samples.merge()
                gain = None
                if samples.chunks and not samples.unusable:
                    judge = Judge(qmodel.model, product, samples.chunks, samples.quantizers, self.objective)
                    gain = self._fit(judge, samples)
                if gain is not None:
                    gains.append(gain)
                    fitted += 1
                task.advance()
        mean = sum(gains) / len(gains) if gains else 1.0
        qmodel.log[self.name] = {
            "fitted": fitted,
            "kept": len(found) - fitted,
            "error_of_before": round(mean, 4),
        }

    def _sample(
        self, qmodel: QuantModel, found: list[Product], data: Batches, progress: Progress
    ) -> dict[Product, Samples]:
        everything = 2**62
        sampled = {}
        for product in found:
            both = (_quantizer(qmodel, product.left.id), _quantizer(qmodel, product.right.id))
            sampled[product] = Samples(
                product, both, self.rows or everything, self.entries or everything, self.per_entry or everything,
                data.count,
            )  # fmt: skip
        states = {s.id: qmodel.quantizers[s].state for s in qmodel.sites()}
        sites = list({s.id: s for p in found for s in (p.left, p.right)}.values())
        with watchable(qmodel, sites), progress.task("observing products", len(data.sizes)) as task:
            try:
                qmodel.set_state("off", [s for s in qmodel.sites() if not qmodel.quantizers[s].baked])

                def watch(seen: int, images: int, live: Callable[[], bool] | None = None) -> None:
                    for product, samples in sampled.items():
                        qmodel.quantizers[product.left].observer = partial(_show, samples.see_left)
                        if product.right.param is None:
                            qmodel.quantizers[product.right].observer = partial(_show, samples.see_right)
                        look = partial(samples.see_made, seen=seen, images=images, live=live)
                        qmodel.quantizers[product.left].product_observer = look

                if self.objective.probe is None:
                    seen = 0
                    for batch, images in zip(data, data.sizes, strict=True):
                        watch(seen, images)
                        data.forward(qmodel.model, batch)
                        seen += images
                        task.advance()
                else:
                    run_backward(qmodel, data, self.objective.probe, self.seed, watch, task)
            finally:
                for site in sites:
                    quantizer = qmodel.quantizers[site]
                    quantizer.observer = quantizer.product_observer = None
                    quantizer.state = states.get(site.id, "off")
                for name, state in states.items():
                    qmodel.quantizers[name].state = state
        return sampled

    def _fit(self, judge: Judge, samples: Samples) -> float | None:
        """Alternate until nothing changes; the share of the error that is left."""
        product = judge.product
        sides = ["right", "left"] if product.kind in ("linear", "conv") else ["left", "right"]
        sides = [side for side in sides if self._searched(judge, side)]
        if not sides:
            return None
        before = judge.error()
        for _ in range(self.rounds):
            changed = [self._search(judge, side, samples) for side in sides]
            if not any(changed) or len(sides) == 1:
                break
        return judge.error() / before if before > 0 else 1.0

    def _searched(self, judge: Judge, side: str) -> bool:
        quantizer = judge.quantizers[side == "right"]
        if quantizer is None or quantizer.baked:
            return False
        parameter = judge.product.right.param is not None
        return side == "left" or (judge.product.owns_right and (self.weights or not parameter))

    def _search(self, judge: Judge, side: str, samples: Samples) -> bool:
        """Take the best of the candidates and of what there is; whether that is something new."""
        quantizer = judge.quantizers[side == "right"]
        assert quantizer is not None
        now = {name: value.reshape(1, -1) for name, value in quantizer.params().items()}
        tried = self._candidates(judge, side, quantizer, samples)
        tried = {name: torch.cat([now[name], tried[name]]) for name in quantizer.fields}
        best = judge.best(side, tried)
        if not bool(best.any()):
            return False
        quantizer.set_params({name: value.gather(0, best)[0] for name, value in tried.items()})
        return True

    def _candidates(self, judge: Judge, side: str, quantizer: Quantizer, samples: Samples) -> Params:
        site = judge.product.left if side == "left" else judge.product.right
        low, high = self.softmax if site.role == SOFTMAX_OUT else self.linear
        if side in samples.ranges:
            bottom, top = samples.ranges[side]
        else:
            bottom, top = torch.aminmax(quantizer.layout.by_group(judge.operand(side, samples.chunks[0])), dim=1)
        factors = torch.linspace(low, high, self.steps, device=bottom.device)[:, None]
        return _different(quantizer.variants(quantizer.range_to_params(factors * bottom, factors * top)))


def _different(params: Params) -> Params:
    """Without candidates that are the same in every group: some formats do not follow every range."""
    rows = torch.cat(list(params.values()), dim=1)
    number = torch.unique(rows, dim=0, return_inverse=True)[1]
    at = torch.arange(len(rows), device=rows.device)
    kept = at.new_full((int(number.max()) + 1,), len(rows)).scatter_reduce_(0, number, at, "amin").sort().values
    return {name: value[kept] for name, value in params.items()}


def _quantizer(qmodel: QuantModel, site: str) -> Quantizer | None:
    if site not in qmodel.quantizers:  # left float
        return None
    found = qmodel.quantizers[site]
    return found if isinstance(found, Quantizer) else None


def _show(look: object, quantizer: object, x: Tensor) -> None:
    assert callable(look)
    look(x)
