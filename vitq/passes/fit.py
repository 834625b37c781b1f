"""Fit: choose the scales of every site that has none."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.calibrate.capture import IMAGES, Watcher, watch_parallel, watch_prefix
from vitq.calibrate.padding import without_zero_rows
from vitq.calibrate.search import Search
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.quantizers.base import Params, Quantizer

FLOWS = {"parallel": watch_parallel, "prefix": watch_prefix}


@PASSES.register("fit")
class Fit(Pass):
    """Choose scales of sites without any, weights first, and switch their quantizers on.

    Args:
        method: how activation ranges are chosen (calibrate/search.py).
        weight_method: how weight ranges are chosen.
        percentile: the clip of "percentile".
        flow: "parallel" (every site sees the float model's values) or "prefix" (the quantized prefix's).
        exact: score on every activation value instead of exact tails and a sample (parity mode).
    """

    name = "fit"
    slot = "fit"
    gives = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "one forward of the calibration images; on the quantized prefix about six if these are too many to hold"

    def __init__(
        self,
        method: str = "minmax",
        weight_method: str = "minmax",
        percentile: float = 0.9999,
        flow: str = "parallel",
        exact: bool = False,
    ) -> None:
        if flow not in FLOWS:
            raise CompositionError(f"pass 'fit': unknown flow {flow!r}; use one of {', '.join(FLOWS)}")
        self.search = Search(method, percentile, exact)
        self.weight_search = Search(weight_method, percentile, exact=True)
        self.flow = flow

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Fit what is unfitted.

        Raises:
            DataError: activations are to be fitted and there are no calibration images.
        """
        todo = [site for site in qmodel.sites() if not qmodel.quantizers[site].fitted]
        weights = [site for site in todo if qmodel.weight(site) is not None]
        for site in weights:
            weight, quantizer = qmodel.weight(site), _quantizer(qmodel, site)
            assert weight is not None
            self.weight_search.fit(quantizer, weight.data)
            quantizer.state = "on"
        # Weights that are computed (from other parameters) are seen only while the model runs.
        rest = [site for site in todo if qmodel.weight(site) is None]
        if not rest:
            return
        if data is None or data.count == 0:
            raise DataError(
                f"{len(rest)} activation sites need calibration images; give data= (or --calib), or quantize weights "
                f"only with bits such as w4a16"
            )
        single, last = len(data.sizes) == 1, _Last()
        at_once = single and (self.flow == "prefix" or data.count <= IMAGES)
        images = None if at_once else data.count
        FLOWS[self.flow](qmodel, rest, lambda site: self._watcher(qmodel, site, images, last, single), data, progress)
        missed = [site.id for site in rest if not qmodel.quantizers[site].fitted]
        if missed:
            raise DataError(
                f"{len(missed)} sites saw no values, for example {missed[0]}: the model took another way than when it "
                f"was traced, or found nothing in the calibration images"
            )
        for site in rest:
            qmodel.quantizers[site].state = "on"

    def _watcher(self, qmodel: QuantModel, site: Site, images: int | None, last: _Last, single: bool) -> Watcher:
        search = self.weight_search if site.role == WEIGHT else self.search
        return _Fitting(site, _quantizer(qmodel, site), search, images, last, single)


class _Last:
    """What was seen last: several linears often take the same tensor (query, key, value)."""

    tensor: Tensor | None = None
    watcher: _Fitting | None = None


class _Fitting:
    """Gathers the statistics of one site, then fits its quantizer and switches it on."""

    def __init__(
        self, site: Site, quantizer: Quantizer, search: Search, images: int | None, last: _Last, single: bool
    ) -> None:
        self.site = site
        self.quantizer = quantizer
        self.search = search
        self.sketch = search.sketch(quantizer, images)
        self.last = last
        self.single = single
        self.same_as: _Fitting | None = None
        self.params: Params = {}

    def observe(self, x: Tensor, images: int) -> None:
        other = self.last.watcher
        if self.single and other is not None and self.last.tensor is x and self._like(other):
            self.same_as = other
            return
        self.last.tensor, self.last.watcher = x if self.single else None, self
        if self.quantizer.layout.keep in ((), (-1,)):  # tokens that have scales of their own are all needed
            x = without_zero_rows(self.site, x)
        try:
            self.sketch.observe(self.quantizer.layout.by_group(x.to(torch.float32)), images)
        except DataError as error:
            raise DataError(f"{self.site.id}: {error}; look at the weights and the images") from None

    def finish(self) -> None:
        if self.same_as is not None:
            self.params = self.same_as.params
        else:
            try:
                self.params = self.search.params(self.quantizer, self.sketch.statistics())
            except DataError as error:
                raise DataError(f"{self.site.id}: {error}") from None
            self.sketch = self.search.sketch(self.quantizer)  # free what was gathered
        self.quantizer.set_params(self.params)
        self.quantizer.state = "on"

    def _like(self, other: _Fitting) -> bool:
        a, b = self.quantizer, other.quantizer
        return (type(a), a.bits, a.layout, a.fields, a.settings()) == (
            type(b),
            b.bits,
            b.layout,
            b.fields,
            b.settings(),
        )


def _quantizer(qmodel: QuantModel, site: Site) -> Quantizer:
    quantizer = qmodel.quantizers[site]
    assert isinstance(quantizer, Quantizer)
    return quantizer
