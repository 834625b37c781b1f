"""Choose the formats of attention probabilities by what they do to the product with the values.

Shapes:  A probabilities (M, R, S): M matrices, R of their rows    V values (M, S, D)
Formula: argmin over parameters p of sum ((Q_p(A) - A) V)**2
Source:  the criterion of PTQ4ViT, arXiv 2111.12293, section 3.2 (error of the product, not of the operand), without its
         Hessian weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor

from vitq.calibrate.sample import Places
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, Pass
from vitq.core.roles import SOFTMAX_OUT, VALUE
from vitq.quantizers.base import Params, Quantizer

CHUNK = 2**21  # candidate-values scored at a time


@PASSES.register("fit_attention")
@final
class FitAttention(Pass):
    """Fit probabilities again, on the quantized model, by the error of their product with the values.

    Args:
        tops: the tops of the range that are tried, in parts of the largest probability.
        matrices: how many attention matrices are looked at, evenly spread over images, heads and windows. Which
            they are does not depend on the micro-batches.
        rows: how many rows of each.

    Sites whose scale is not one per tensor, dynamic formats, and products that are not rows of probabilities times
    values, keep what they have; the log says how many.
    """

    name = "fit_attention"
    slot = "fit"
    needs = frozenset({ACT_SCALES})
    gives = frozenset({ACT_SCALES})
    cost = "one forward of the calibration images, and the search"

    def __init__(
        self, tops: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55, 0.4), matrices: int = 24, rows: int = 16
    ) -> None:
        if not tops or not all(0 < top <= 1 for top in tops):
            raise CompositionError(f"pass 'fit_attention': tops {tops} must be in (0, 1]")
        if matrices < 1 or rows < 1:
            raise CompositionError("pass 'fit_attention': matrices and rows must be at least 1")
        self.tops = tuple(tops)
        self.matrices = matrices
        self.rows = rows

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fit every site that has probabilities beside values."""
        pairs = _pairs(qmodel)
        if data is None or not pairs:
            qmodel.log["fit_attention"] = {"fitted": 0, "kept": len(pairs)}
            return
        place = Places(self.matrices, data.count)
        seen = {softmax: _Operands(place, self.rows) for softmax, _ in pairs}
        try:
            for softmax, value in pairs:
                qmodel.quantizers[softmax].observer = partial(_show, seen[softmax].see_probabilities)
                qmodel.quantizers[value].observer = partial(_show, seen[softmax].see_values)
            for batch, images in zip(data, data.sizes, strict=True):
                if place.at(images):
                    data.forward(qmodel.model, batch)
        finally:
            for softmax, value in pairs:
                qmodel.quantizers[softmax].observer = qmodel.quantizers[value].observer = None
        fitted = 0
        with progress.task("fitting attention by its product", len(pairs)) as task:
            for softmax, _ in pairs:
                fitted += self._fit(qmodel.quantizers[softmax], seen[softmax])
                task.advance()
        qmodel.log["fit_attention"] = {"fitted": fitted, "kept": len(pairs) - fitted}

    def _fit(self, quantizer: object, operands: _Operands) -> bool:
        if not isinstance(quantizer, Quantizer) or quantizer.layout.groups != 1:
            return False
        if not operands.probabilities or not operands.usable:
            return False
        ranges = operands.top * torch.tensor(self.tops, device=operands.top.device)[:, None]
        tried = quantizer.variants(quantizer.range_to_params(torch.zeros_like(ranges), ranges))
        # What the site has now takes part, so that this pass cannot make it worse on what it looks at.
        tried = {name: torch.cat([quantizer.params()[name].reshape(1, 1), tried[name]]) for name in quantizer.fields}
        best = int(_error(quantizer, tried, operands).argmin())
        quantizer.set_params({name: value[best] for name, value in tried.items()})
        return True


def _pairs(qmodel: QuantModel) -> list[tuple[str, str]]:
    """(probabilities, values) of the calls where both are quantized."""
    found = []
    for call in qmodel.graph.calls:
        sites = {qmodel.graph.sites[s].role: s for s in call.sites if s in qmodel.quantizers}
        if SOFTMAX_OUT in sites and VALUE in sites:
            found.append((sites[SOFTMAX_OUT], sites[VALUE]))
    return found


def _show(look: object, quantizer: object, x: Tensor) -> None:
    assert callable(look)
    look(x)


@dataclass
class _Operands:
    """A sample of one product's operands, gathered over micro-batches."""

    place: Places
    rows: int
    probabilities: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    top: Tensor = field(default_factory=lambda: torch.zeros(1))
    usable: bool = True
    chosen: list[int] = field(default_factory=list)
    front: torch.Size = field(default_factory=torch.Size)

    def see_probabilities(self, x: Tensor) -> None:
        """(..., N, S)"""
        self.front = x.shape[:-2]
        flat = x.detach().reshape(-1, *x.shape[-2:])
        if len(flat) % self.place.images:
            self.usable = False
            return
        self.chosen = self.place.chosen(len(flat))
        some = flat[self.chosen].float()
        self.top = torch.maximum(self.top.to(x.device), some.max().reshape(1))
        self.probabilities.append(some[:, _spread(some.shape[1], self.rows)])

    def see_values(self, x: Tensor) -> None:
        """(..., S, D)"""
        if not self.usable:
            return
        last = self.probabilities[-1]
        try:
            flat = x.detach().expand(*self.front, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
        except RuntimeError:
            self.usable = False
            return
        if flat.shape[1] != last.shape[2]:  # the values are on the left
            self.usable = False
            return
        self.values.append(flat[self.chosen].float())


def _spread(count: int, wanted: int) -> Tensor:
    """Indices of evenly spread places."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def _error(quantizer: Quantizer, params: Params, operands: _Operands) -> Tensor:
    """(K,) squared error of A V for every candidate, float64."""
    some = next(iter(params.values()))
    total = torch.zeros(len(some), dtype=torch.float64, device=some.device)
    for a, v in zip(operands.probabilities, operands.values, strict=True):
        step = max(1, CHUNK // a.numel())
        for start in range(0, len(some), step):
            few = {name: value[start : start + step, :, None, None] for name, value in params.items()}
            wrong = quantizer.simulate_with(a.expand(len(few[quantizer.fields[0]]), *a.shape), few) - a
            total[start : start + step] += (wrong @ v).square().sum(dim=(1, 2, 3), dtype=torch.float64)
    return total
