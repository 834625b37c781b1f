"""Linears of the model and their inputs, whether these are quantized or not. A convolution is a linear of patches.

Shapes:  x what the call takes    rows (n, in): one per token or patch    weight as a matrix (out, in)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.core.batches import Batches, first_of
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.graph.insert import attach
from vitq.quantizers.common import AnyQuantizer


@dataclass(frozen=True)
class Linear:
    """One linear, or convolution without groups, whose weight is a quantized parameter.

    Attributes:
        input: the site of its input, of the first call that uses the weight.
        weight: the site of its weight.
        module: name of the nn.Linear or nn.Conv2d, or None where something else makes the call.
    """

    input: Site
    weight: Site
    module: str | None

    def rows(self, model: nn.Module, x: Tensor) -> Tensor:
        """The inputs as rows that the weight, as a matrix, is multiplied with."""
        if self.input.op == "linear":
            return x.reshape(-1, x.shape[-1])
        conv = model.get_submodule(self.module or "")
        assert isinstance(conv, nn.Conv2d)
        patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])


class _Port(nn.Module):
    """Stands at a site that is left float, so that it can be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.baked, self.observer, self.product_observer, self.bits = "off", False, None, None, 32
        self.rounded = None
        self.fitted = True

    @property
    def active(self) -> bool:
        return self.observer is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            with torch._C.DisableTorchFunction():
                self.observer(self, x)
        return x


def linears(qmodel: QuantModel) -> list[Linear]:
    """Every linear and plain convolution with a quantized weight of its own, in execution order; each weight once."""
    found: dict[str, Linear] = {}
    for call in qmodel.graph.calls:
        if call.reason is not None:
            continue
        sites = {name: qmodel.graph.sites[s] for name, s in zip(call.operands, call.sites, strict=True)}
        weight = sites.get("weight")
        if weight is None or weight.role != WEIGHT or weight.param is None or weight.id not in qmodel.quantizers:
            continue
        owner = qmodel.model.get_submodule(call.owner)
        own = isinstance(owner, (nn.Linear, nn.Conv2d)) and weight.param == f"{call.owner}.weight".lstrip(".")
        if call.op == "linear" or (own and _plain(owner)):
            found.setdefault(weight.id, Linear(sites["input"], weight, call.owner if own else None))
    return list(found.values())


@torch.no_grad()
def used_once(qmodel: QuantModel, data: Batches, found: list[Linear]) -> list[Linear]:
    """Those whose weight serves one call in a forward, so that what its inputs ask for holds for all it does."""
    calls = Counter(site for call in qmodel.graph.calls for site in set(call.sites))
    seen = Counter[str]()
    sites = [linear.input for linear in found]
    with watchable(qmodel, sites):
        for site in sites:
            qmodel.quantizers[site].observer = lambda quantizer, x, name=site.id: seen.update([name])
        try:
            data.forward(qmodel.model, first_of(next(iter(data))))
        finally:
            for site in sites:
                qmodel.quantizers[site].observer = None
    return [linear for linear in found if calls[linear.weight.id] == seen[linear.input.id] == 1]


def _plain(module: nn.Module) -> bool:
    """A convolution that multiplies patches with one matrix."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


@contextmanager
def watchable(qmodel: QuantModel, sites: list[Site]) -> Iterator[None]:
    """Give sites that are left float something to watch, for a while."""
    bare = [site for site in sites if site.id not in qmodel.quantizers]
    if not bare:
        yield
        return
    names = [site.id.replace(".", "|") for site in bare]
    try:
        for name in names:
            qmodel.quantizers.add_module(name, _Port())
        attach(qmodel.model, qmodel.graph, qmodel.quantizers)  # type: ignore[arg-type]
        yield
    finally:
        for name in names:
            delattr(qmodel.quantizers, name)
        attach(qmodel.model, qmodel.graph, qmodel.quantizers)  # type: ignore[arg-type]


def as_used(quantizer: Any, x: Tensor) -> Tensor:
    """What the product sees of x, without showing x to an observer."""
    return x if quantizer.state == "off" else quantized(quantizer, x)


def quantized(quantizer: Any, x: Tensor) -> Tensor:
    """x on the site's grid, be it switched on or not; x itself at a site that is left float."""
    return quantizer.quantized(x) if isinstance(quantizer, AnyQuantizer) else x
