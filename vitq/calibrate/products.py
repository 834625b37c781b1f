"""Matrix products, with samples of their operands and results: what a search by output error looks at.

Shapes:  linear  left (n, in) or (m, T, in)   right (out, in)       made (..., out)
         conv    left (m, in, ...)            right (out, in, ...)  made (m, out, ...)
         scores  left (m, ..., R, D)          right (m, ..., S, D)  made (m, ..., R, S)
         rows    left (m, ..., R, S)          right (m, ..., S, D)  made (m, ..., R, D)
         (right operands of fewer heads serve several of the left ones each)
         m entries of the first dimension (images, windows), R rows of each, n rows of all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calibrate.observe import ends
from vitq.core.qmodel import QuantModel
from vitq.core.site import Call, Site
from vitq.graph.attention import shared
from vitq.quantizers.base import Quantizer

EVEN = 0.5  # share of all weight that errors have alike, whatever the gradients are: these are those of one draw

_OPERANDS = {
    "linear": (("linear", "input", "weight"),),
    "conv": (("conv", "input", "weight"),),
    "matmul": (("rows", "lhs", "rhs"),),
    "sdpa": (("scores", "query", "key"), ("rows", "softmax", "value")),
    "mha": (
        ("linear", "input", "weight"),
        ("scores", "query", "key"),
        ("rows", "softmax", "value"),
        ("linear", "out_input", "out_weight"),
    ),
}


@dataclass(frozen=True)
class Product:
    """One matrix product with a quantized operand.

    Attributes:
        kind: how it multiplies: "linear", "conv", "scores" (left right^T) or "rows" (left right).
        left, right: sites of its operands.
        module: owner of the call.
        owns_right: no earlier product has the same right operand (a tied weight).
    """

    kind: str
    left: Site
    right: Site
    module: str
    owns_right: bool = True

    def multiply(self, model: nn.Module, left: Tensor, right: Tensor) -> Tensor:
        """The product, without bias; one of the operands may have a further leading dimension of candidates."""
        if self.kind == "linear":
            if right.ndim == 2:
                return F.linear(left, right)
            made: Tensor = right.flatten(0, 1) @ left.flatten(0, -2).T  # rows of a weight stay together
            return made.reshape(*right.shape[:2], *left.shape[:-1]).movedim(1, -1)
        if self.kind == "conv":
            return _convolved(model.get_submodule(self.module), left, right)
        right = shared(right, left)
        return left @ (right.mT if self.kind == "scores" else right)

    def groups_of(self, side: str, quantizer: Quantizer) -> tuple[int, ...] | None:
        """Dimensions of the result along which the errors of that operand's scale groups stay apart; None: they mix."""
        keep, ndim = quantizer.layout.keep, quantizer.layout.ndim
        if quantizer.layout.groups == 1:  # one in all, or one for the only head of keys that all queries share
            return ()
        if self.kind in ("linear", "conv"):
            if side == "right":  # (out, ...), in groups or not
                first = -ndim == keep[0]
                return ((-1,) if self.kind == "linear" else (1,)) if first else None
            return keep if self.kind == "linear" and not quantizer.layout.group and keep[0] <= -2 else None
        if quantizer.layout.group or len(keep) != 1:
            return None
        moves = {("left", -2): -2, ("right", -2): -1 if self.kind == "scores" else None}
        moves |= {("left", -1): None, ("right", -1): -1 if self.kind == "rows" else None}
        dim = moves.get((side, keep[0]), keep[0])
        return None if dim is None else (dim,)


def _convolved(conv: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dims = conv.weight.ndim

    def one(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = conv._conv_forward(x, weight, None)
        return found

    if left.ndim > dims:
        made: Tensor = one(left.flatten(0, 1), right).unflatten(0, left.shape[:2])
        return made
    if right.ndim == dims:
        return one(left, right)
    if conv.groups > 1:
        return torch.stack([one(left, weight) for weight in right])
    made = one(left, right.flatten(0, 1)).unflatten(1, right.shape[:2])
    return made.movedim(1, 0)


def products(qmodel: QuantModel) -> list[Product]:
    """Every product that a search can look at, in execution order."""
    found: list[Product] = []
    taken: set[str] = set()
    for call in qmodel.graph.calls:
        for kind, left, right in _OPERANDS.get(call.op, ()) if call.reason is None else ():
            sites = dict(zip(call.operands, call.sites, strict=True))
            if left not in sites or right not in sites or not _usable(qmodel, call, kind):
                continue
            a, b = qmodel.graph.sites[sites[left]], qmodel.graph.sites[sites[right]]
            if a.id in qmodel.quantizers or b.id in qmodel.quantizers:
                found.append(Product(kind, a, b, call.owner, b.id not in taken))
                taken.add(b.id)
    return found


def _usable(qmodel: QuantModel, call: Call, kind: str) -> bool:
    owner = qmodel.model.get_submodule(call.owner)
    if kind != "conv":
        return True
    if not isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or owner.padding_mode != "zeros":
        return False  # what is padded otherwise is padded before the call
    return call.sites[1] == f"{call.id}.weight"


@dataclass
class Chunk:
    """A sample from one forward.

    Attributes:
        left, right, made: tensors as in the head of this file; right None for a parameter.
        weight: of errors in `made`, by its squared gradients, and divided by how likely their rows were to be taken;
            None where all count alike.
        by_entry: each entry of the left operand has a right one of its own, unless there is but one.
    """

    left: Tensor
    right: Tensor | None
    made: Tensor
    weight: Tensor | None
    by_entry: bool = False

    def every(self, step: int) -> Chunk:
        """One in so many of its rows or entries."""
        if step == 1 or len(self.left) < 2 * step:
            return self
        right = self.right
        if right is not None and self.by_entry and len(right) > 1:
            right = right[::step]
        weight = None if self.weight is None else self.weight[::step]
        return Chunk(self.left[::step], right, self.made[::step], weight, self.by_entry)


@dataclass
class Samples:
    """Gathers samples of one product.

    Args:
        product: of which.
        quantizers: of its operands, None for one that is left float or has a dynamic format.
        rows: how many rows to take of all images, where rows stand alone.
        entries: where they do not, how many entries (images, windows); per_entry: and rows of each.
        images: how many images there are in all.
    """

    product: Product
    quantizers: tuple[Quantizer | None, Quantizer | None]
    rows: int
    entries: int
    per_entry: int
    images: int
    chunks: list[Chunk] = field(default_factory=list)
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unusable: bool = False
    _left: Tensor | None = None
    _right: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what was gathered."""
        tensors = (t for c in self.chunks for t in (c.left, c.right, c.made, c.weight) if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    def clear(self) -> None:
        """Forget everything."""
        self.chunks, self.ranges, self.unusable = [], {}, False
        self._left = self._right = None

    def merge(self) -> None:
        """Make one chunk of those of the same shape."""
        by_shape: dict[tuple[torch.Size, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            right = torch.Size() if chunk.right is None else chunk.right.shape[1:]
            by_shape.setdefault((chunk.left.shape[1:], chunk.made.shape[1:], right), []).append(chunk)
        self.chunks = [_joined(chunks) for chunks in by_shape.values()]
        if not any(chunk.weight is not None and bool(chunk.weight.any()) for chunk in self.chunks):
            for chunk in self.chunks:  # nothing behind it depends on it
                chunk.weight = None

    def see_left(self, x: Tensor) -> None:
        """The left operand, which comes first or second."""
        self._left = x.detach()
        self._see_range("left", self._left)

    def see_right(self, x: Tensor) -> None:
        """The right operand."""
        self._right = x.detach()
        if self.product.right.param is None:
            self._see_range("right", self._right)

    def see_made(self, made: Tensor, seen: int, images: int, live: Callable[[], bool] | None = None) -> None:
        """The result, for so many images after those seen before.

        Args:
            live: wait for the gradient of the result, and take one that comes while this is true.
        """
        left, right, result = self._left, self._right, made.detach()
        assert left is not None
        self._left = self._right = None  # whole operands of every product are many times what a forward takes
        versions = _versions(left, right)

        def take(g: Tensor) -> None:
            # By now the model may have changed an operand in place: then there is no sample.
            if live is not None and live() and _versions(left, right) == versions:
                self._take(left, right, result, g.detach(), seen, images)

        if live is not None and made.requires_grad:
            made.register_hook(take)
        else:
            self._take(left, right, result, None, seen, images)

    def _see_range(self, side: str, x: Tensor) -> None:
        quantizer = self.quantizers[side == "right"]
        if quantizer is None or not x.numel():
            return
        low, high = ends(quantizer.layout.by_group(x.float()))
        if side in self.ranges:
            low, high = torch.minimum(low, self.ranges[side][0]), torch.maximum(high, self.ranges[side][1])
        self.ranges[side] = (low, high)

    def _take(self, left: Tensor, right: Tensor | None, made: Tensor, g: Tensor | None, seen: int, images: int) -> None:
        if not made.numel():  # a detector's heads where nothing was found
            return
        left, made = left.float(), made.float()
        square = None if g is None else _half_even(g)
        if self._is_flat():
            left, made = left.reshape(-1, left.shape[-1]), made.reshape(-1, made.shape[-1])
            square = None if square is None else square.reshape(-1, made.shape[-1])
            count = self._quota(self.rows, seen, images, len(left))
            at, square = _chosen(square, len(made), count)
            self._keep(left[at], right, made[at], square)
            return
        if made.ndim != left.ndim or left.ndim < (3 if self.product.kind == "conv" else 2):
            self.unusable = True
            return
        if left.ndim == 2:
            left, made = left[None], made[None]
            square = None if square is None else square[None]
        if len(made) != len(left):
            self.unusable = True
            return
        there = len(left)
        at, square = _chosen(square, there, self._quota(self.entries, seen, images, there))
        left, made = left[at], made[at]
        if self.product.kind == "linear" or self.product.kind == "conv":
            self._keep(left, right, made, square)
            return
        if right is not None:
            right = right[(None,) * (left.ndim - right.ndim)]
            if len(right) not in (1, there):  # entries that share a right one
                self.unusable = True
                return
            right = right[at] if len(right) > 1 else right
        some = self._rows(left, made, square) if len(at) else (left, made, square)
        self._keep(some[0], right, some[1], some[2], by_entry=True)

    def _keep(
        self, left: Tensor, right: Tensor | None, made: Tensor, weight: Tensor | None, *, by_entry: bool = False
    ) -> None:
        if len(left):
            right = None if right is None else right.float().clone()
            self.chunks.append(Chunk(left.clone(), right, made.clone(), weight, by_entry))

    def _is_flat(self) -> bool:
        quantizer = self.quantizers[0]
        return self.product.kind == "linear" and (quantizer is None or not set(quantizer.layout.keep) - {-1})

    def _rows(self, left: Tensor, made: Tensor, square: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows of each entry, the same for all heads."""
        quantizer = self.quantizers[0]
        rows = made.shape[-2]
        if rows <= self.per_entry or (quantizer is not None and -2 in quantizer.layout.keep):
            return left, made, square
        picked = []
        for entry in range(len(made)):
            one = None if square is None else square[entry].movedim(-2, 0)
            at, weighted = _chosen(one, rows, self.per_entry)
            picked.append((left[entry].index_select(-2, at), made[entry].index_select(-2, at), weighted))
        lefts, mades, squares = zip(*picked, strict=True)
        weight = None if square is None else torch.stack([s.movedim(0, -2) for s in squares])
        return torch.stack(lefts), torch.stack(mades), weight

    def _quota(self, wanted: int, seen: int, images: int, there: int) -> int:
        return min(there, (seen + images) * wanted // self.images - seen * wanted // self.images)


def _versions(*tensors: Tensor | None) -> list[int]:
    return [t._version for t in tensors if t is not None]


def _joined(chunks: list[Chunk]) -> Chunk:
    first = chunks[0]
    right, weight = first.right, None
    if first.weight is not None:
        weight = torch.cat([c.weight for c in chunks if c.weight is not None])
    if right is not None and first.by_entry:
        right = torch.cat([c.right.expand(len(c.left), *c.right.shape[1:]) for c in chunks if c.right is not None])
    left, made = torch.cat([c.left for c in chunks]), torch.cat([c.made for c in chunks])
    return Chunk(left, right, made, weight, first.by_entry)


def _half_even(g: Tensor) -> Tensor:
    """Squared gradients, EVEN of their sum spread over all of them."""
    square = g.float().square()
    mean = square.mean()
    return square.mul_(1 - EVEN).add_(EVEN * mean)


def _chosen(square: Tensor | None, there: int, wanted: int) -> tuple[Tensor, Tensor | None]:
    """Positions of a sample along the first dimension, and what of `square` (there, ...) it has, reweighted.

    The sample goes where the weight is: behind the last block of a classifier only one token in two hundred matters.
    Dividing by the likelihood keeps sums unbiased.
    """
    device = None if square is None else square.device
    places = (torch.arange(wanted, device=device, dtype=torch.float64) + 0.5) / max(wanted, 1)
    total = None if square is None else square.flatten(1).sum(1, dtype=torch.float64)
    if wanted == 0 or square is None or total is None or wanted >= there or not float(total.sum()) > 0:
        at = torch.arange(there, device=device) if wanted >= there else (places * there).long()
        return at, None if square is None else square[at] * (there / max(len(at), 1))
    share = total / total.sum()
    at = torch.searchsorted(share.cumsum(0), places).clamp(max=there - 1)
    scale = (1 / (share[at] * wanted)).to(square.dtype)
    return at, square[at] * scale.reshape(-1, *[1] * (square.ndim - 1))
