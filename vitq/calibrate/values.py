"""The way of attention values: which row of a projection makes which input channel of the linear behind the attention.

Attention takes means over tokens, channel by channel. So what one divides a row of the value projection by, the linear
behind can multiply its column with. Which row that is, the model itself is asked: every projection is made to put out
the same numbers at every token, and what arrives behind the attention is looked at. No name, no shape and no order of
heads is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.capture import switched_off, watch_parallel
from vitq.calibrate.linears import watchable
from vitq.core.batches import Batches, split
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.roles import PROJ_IN, QKV_IN
from vitq.core.site import Site

BASE = 16  # rows are numbered in digits that arrive whole also in 16 bits
NEAR = 0.1  # what a number may lose on its way: probabilities in 16 bits do not add up to one
SAME = 1e-5  # of the output's magnitude: what an exact fold may change in it


@dataclass(frozen=True)
class ValuePath:
    """Values on their way into a linear.

    Attributes:
        weight: name of the linear's weight, (out, in).
        value: name of the weight of the projection that makes the values, and
        bias: of its bias, None if it has none.
        rows: (in,) which of the projection's rows makes each input channel; no row comes twice.
    """

    weight: str
    value: str
    bias: str | None
    rows: Tensor

    @torch.no_grad()
    def divide(self, model: nn.Module, ratio: Tensor) -> None:
        """Divide the values by ratio (in,), and let the linear undo it, in place; arithmetic in float64."""
        weight, value = model.get_parameter(self.weight), model.get_parameter(self.value)
        wide, rows = ratio.to(value.device, torch.float64), self.rows.to(value.device)
        weight.data = (weight.double() * wide).to(weight.dtype)
        made = [value] if self.bias is None else [value, model.get_parameter(self.bias)]
        for parameter in made:
            changed = parameter.double()
            changed[rows] /= wide.reshape(-1, *[1] * (parameter.ndim - 1))
            parameter.data = changed.to(parameter.dtype)


@torch.no_grad()
def value_paths(qmodel: QuantModel, data: Batches) -> dict[str, ValuePath]:
    """Input site of a linear -> the path to it, for those along which a ratio can be moved exactly.

    About eight forwards of one image.
    """
    one = Batches(lambda: islice(split(next(iter(data)), 1), 1), [1], data.forward)
    found = _candidates(qmodel, one)
    if not found or _exact(qmodel, one, found.values()):
        return found
    return {site: path for site, path in found.items() if _exact(qmodel, one, [path])}


# -- which row makes which channel -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """A projection that may make values: its parameters, and the number of its first row among all rows."""

    module: str
    weight: str
    bias: str
    first: int
    rows: int

    @contextmanager
    def saying(self, model: nn.Module, numbers: Tensor) -> Iterator[None]:
        """The projection puts out its part of the numbers, whatever comes in."""
        owner = model.get_submodule(self.module)
        weight, bias = getattr(owner, self.weight), getattr(owner, self.bias)
        own = numbers[self.first : self.first + self.rows].to(weight)
        try:
            setattr(owner, self.weight, nn.Parameter(torch.zeros_like(weight)))
            setattr(owner, self.bias, nn.Parameter(own))
            yield
        finally:
            setattr(owner, self.weight, weight)
            setattr(owner, self.bias, bias)


def _makers(qmodel: QuantModel) -> list[_Maker]:
    found: list[_Maker] = []
    for site in qmodel.graph.with_roles(QKV_IN):
        weight = _weight_of(qmodel, site)
        if weight is None:
            continue
        module, _, name = str(weight.param).rpartition(".")
        owner, bias = qmodel.model.get_submodule(module), name.replace("weight", "bias")
        if isinstance(owner, (nn.Linear, nn.Conv2d)) or isinstance(getattr(owner, bias, None), Tensor):
            first = found[-1].first + found[-1].rows if found else 0
            found.append(_Maker(module, name, bias, first, weight.shape[0]))
    return found


def _weight_of(qmodel: QuantModel, site: Site) -> Site | None:
    """The weight that an input is multiplied with, if it is a parameter that only this call uses."""
    weight = qmodel.graph.sites.get(f"{site.call}.{site.operand.replace('input', 'weight')}")
    if weight is None or weight.param is None:
        return None
    return weight if sum(weight.id in call.sites for call in qmodel.graph.calls) == 1 else None


def _candidates(qmodel: QuantModel, one: Batches) -> dict[str, ValuePath]:
    found: dict[str, ValuePath] = {}
    makers = _makers(qmodel)
    if not makers:
        return found
    count = makers[-1].first + makers[-1].rows
    numbers = torch.arange(count)
    digits = [_arriving(qmodel, one, makers, numbers // BASE**k % BASE) for k in range(_digits(count))]
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    arrived = _arriving(qmodel, one, makers, values)
    for site in qmodel.graph.with_roles(PROJ_IN):
        weight = _weight_of(qmodel, site)
        if weight is None or site.id not in arrived:
            continue
        number = torch.stack([each[site.id][0].round() * BASE**k for k, each in enumerate(digits)]).sum(0).long()
        sound = bool(((number >= 0) & (number < count)).all()) and len(number.unique()) == len(number)
        if not sound or not bool(((arrived[site.id] - values[number]).abs() <= NEAR).all()):
            continue
        maker = next(m for m in makers if m.first <= int(number[0]) < m.first + m.rows)
        rows = number - maker.first
        if bool(((rows >= 0) & (rows < maker.rows)).all()):
            owner = qmodel.model.get_submodule(maker.module)
            name = f"{maker.module}.".lstrip(".")
            bias = None if getattr(owner, maker.bias) is None else name + maker.bias
            found[site.id] = ValuePath(str(weight.param), name + maker.weight, bias, rows)
    return found


def _digits(count: int) -> int:
    """How many digits the numbers below count have."""
    return math.ceil(math.log(count, BASE)) + 1


def _arriving(qmodel: QuantModel, one: Batches, makers: list[_Maker], numbers: Tensor) -> dict[str, Tensor]:
    """Site -> what arrives there (tokens, in) when the projections put out these numbers."""
    found: dict[str, Tensor] = {}
    sites = qmodel.graph.with_roles(PROJ_IN)
    with ExitStack() as stack:
        for maker in makers:
            stack.enter_context(maker.saying(qmodel.model, numbers))
        stack.enter_context(watchable(qmodel, sites))
        watch_parallel(qmodel, sites, lambda site: _Arriving(site.id, found), one, Silent())
    return found


class _Arriving:
    """Keeps what is seen."""

    def __init__(self, site: str, found: dict[str, Tensor]) -> None:
        self.site, self.found = site, found

    def observe(self, x: Tensor, images: int) -> None:
        self.found[self.site] = x.reshape(-1, x.shape[-1]).float().cpu().nan_to_num(nan=-1.0)

    def finish(self) -> None:
        return


# -- whether it is exact ---------------------------------------------------------------------------------------


def _exact(qmodel: QuantModel, one: Batches, paths: Collection[ValuePath]) -> bool:
    """Whether the model puts out the same when powers of two are moved along all these paths; they are moved back."""
    generator = torch.Generator().manual_seed(0)
    before = _outputs(qmodel, one)
    ratios = [2.0 ** torch.randint(-1, 2, path.rows.shape, generator=generator) for path in paths]
    for path, ratio in zip(paths, ratios, strict=True):
        path.divide(qmodel.model, ratio)
    try:
        after = _outputs(qmodel, one)
    finally:
        for path, ratio in zip(paths, ratios, strict=True):
            path.divide(qmodel.model, 1 / ratio)
    return all(bool((a - b).abs().max() <= SAME * b.abs().max()) for a, b in zip(after, before, strict=True))


def _outputs(qmodel: QuantModel, one: Batches) -> list[Tensor]:
    """What the float model makes of the one image."""
    with switched_off(qmodel, []):
        out: Any = one.forward(qmodel.model, next(iter(one)))
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
