"""What the simulated model has at its sites, and how far the values of a file are from it, in codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitq.core.batches import default_forward
from vitq.core.qmodel import QuantModel
from vitq.export.marked import Uses
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer

SAME = 1e-5  # of the largest value: a dynamic format has no codes that could be compared
FAR = 2**15  # steps, for a value that is no value of the format


@dataclass(frozen=True)
class AtSite:
    """One use of a site in a forward of the simulated model: its codes where it has bytes, and its values."""

    quantizer: AnyQuantizer
    codes: Tensor | None
    values: Tensor


@torch.no_grad()
def simulated(qmodel: QuantModel, batch: Any) -> tuple[dict[tuple[str, int], AtSite], Any]:
    """(site, use) -> what is there, and the output."""
    found: dict[tuple[str, int], AtSite] = {}
    uses = Uses()

    def look(quantizer: Any, x: Tensor) -> Tensor:
        values: Tensor = quantizer.quantized(x)
        coded = isinstance(quantizer, Quantizer) and quantizer.affine and quantizer.bits <= 8
        codes = quantizer.encode(x).to(torch.uint8).cpu() if coded else None
        found[(quantizer.where, uses.next(quantizer.where))] = AtSite(quantizer, codes, values.cpu())
        return values

    with _seen_by(qmodel, look):
        output = default_forward(qmodel, batch)
    return found, output


@torch.no_grad()
def disturbed(qmodel: QuantModel, batch: Any, noise: float, draw: torch.Generator) -> Any:
    """The output where whatever enters a site is off by that share of itself, as other float kernels have it."""

    def look(quantizer: Any, x: Tensor) -> Tensor:
        values: Tensor = quantizer.quantized(x * (1 + noise * torch.randn(x.shape, generator=draw).to(x)))
        return values

    with _seen_by(qmodel, look):
        return default_forward(qmodel, batch)


@contextmanager
def _seen_by(qmodel: QuantModel, look: Any) -> Iterator[None]:
    """While this lasts, values at every site of activations are what `look` makes of what enters."""
    watched = [qmodel.quantizers[site] for site in qmodel.sites() if not qmodel.quantizers[site].baked]
    try:
        for quantizer in watched:
            quantizer.observer = look
        yield
    finally:
        for quantizer in watched:
            quantizer.observer = None


class Steps:
    """How far values of a file are from the simulated ones. Levels of a quantizer are listed once."""

    def __init__(self) -> None:
        self._ranks: dict[Quantizer, _Ranks] = {}

    def apart(self, at: AtSite, got: Tensor) -> Tensor:
        """Levels between each pair of values; FAR for what is no value of the format."""
        if not isinstance(at.quantizer, Quantizer):
            near = (got - at.values).abs() <= SAME * at.values.abs().max()
            return torch.where(near, 0, FAR)
        if at.quantizer not in self._ranks:
            self._ranks[at.quantizer] = _Ranks(at.quantizer)
        ranks = self._ranks[at.quantizer]
        return (ranks.of(got) - ranks.of(at.values)).abs().clamp(max=FAR)


class _Ranks:
    """The place of a value among the different levels that its scale group reaches."""

    def __init__(self, quantizer: Quantizer) -> None:
        lowered, self.layout = quantizer.lower(), quantizer.layout
        self.levels = lowered.levels.cpu().contiguous()
        ends = torch.nn.functional.pad(lowered.thresholds.cpu(), (1, 0), value=-torch.inf)
        ends = torch.nn.functional.pad(ends, (0, 1), value=torch.inf)
        reached = ends[:, 1:] > ends[:, :-1]
        # A level counts once, at the first index that is reached and has it.
        shown = torch.where(reached, self.levels, torch.nan)
        new = torch.stack([_first_of_its_kind(row) for row in shown])
        self.rank = new.cumsum(1)

    def of(self, values: Tensor) -> Tensor:
        """int64, in the shape of the values; far away for what is no level."""
        rows = self.layout.by_group(values.float())
        index = torch.searchsorted(self.levels, rows, right=True).sub_(1).clamp_(min=0)
        rank = self.rank.gather(1, index)
        known = self.levels.gather(1, index) == rows
        rank = torch.where(known, rank, 2 * FAR)
        return self._back(rank, values)

    def _back(self, rows: Tensor, values: Tensor) -> Tensor:
        # by_group of the places says where each went.
        places = self.layout.by_group(torch.arange(values.numel()).reshape(values.shape))
        flat = torch.empty(values.numel(), dtype=torch.int64)
        flat[places.flatten()] = rows.flatten()
        return flat.reshape(values.shape)


def _first_of_its_kind(row: Tensor) -> Tensor:
    """Which entries of an ascending row, NaN for what does not count, differ from the last one that counts."""
    filled = row.nan_to_num(nan=-torch.inf).cummax(0).values
    before = torch.nn.functional.pad(filled[:-1], (1, 0), value=-torch.inf)
    return (~row.isnan()) & (filled > before)
