"""Follow every channel of a model through one forward: where it is made, added, normalised, and where it enters.

Beside each tensor goes a tensor of labels (labels.py). What moves values (reshape, permute, cat, roll, an index, …) is
done to the labels as well, by the same function, so no rule about shapes has to be known here. Sums note which labels
mean the same channel; sums over tokens keep them; whatever else meets a label is noted with its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from vitq.graph import flow
from vitq.graph.attention import mha_arguments
from vitq.graph.channels.labels import (
    COMPUTED,
    ELEMENTS,
    GATE,
    NORM,
    ROWS,
    ZERO,
    Trail,
    distinct,
    distinct_pairs,
    lies_along,
    narrowed,
    runs,
    span,
    varies,
)  # fmt: skip
from vitq.graph.ops import PRODUCTS, Product
from vitq.graph.record import METADATA, function_name

_KEEPS = frozenset(  # every value where it was
    {
        *("to", "float", "half", "bfloat16", "double", "type", "type_as", "data", "detach", "requires_grad_"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    }
)
_SUMS = frozenset({"mean", "sum"})
# Weighted sums over the last dimensions, the same for every channel: over how many; None for all but the first two.
_POOLS = {f"{kind}avg_pool{n}d": n for kind in ("", "adaptive_") for n in (1, 2, 3)} | {"interpolate": None}


def follow(model: nn.Module, run: Callable[[nn.Module], Any]) -> Trail:
    """Run a model once and follow its channels.

    Args:
        model: without quantizers, in the mode in which it is used.
        run: calls it on an example.
    """
    follower = _Follower(model)
    with torch.no_grad(), follower:
        out = run(model)
    for tensor in _tensors(out):
        follower.lose(tensor, "is an output of the model")
    return follower.trail


class _Follower(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trail = Trail()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self._labels = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        out = func(*args, **kwargs)
        given = [t for t in _tensors((args, kwargs)) if t.is_floating_point()]
        if name in METADATA or not given or not (_tensors(out) or name == "__setitem__"):
            return out
        try:
            followed = self._follow(func, name, args, kwargs, out)
        except (RuntimeError, IndexError, TypeError, ValueError):  # labels cannot do what the values did
            followed = False
        if not followed:
            for tensor in given:
                self.lose(tensor, f"goes through {name}")
            for tensor in _tensors(out):
                self._labels.pop(tensor, None)
        return out

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Give the result its labels; False where what went in cannot be followed any further."""
        product = PRODUCTS.get(func)
        if product is not None:
            return not product.unsupported(*args, **kwargs) and self._product(product, name, args, kwargs, out)
        if name in flow.NORMS:
            return self._norm(out, *args, **kwargs)
        if name == "embedding":
            return self._look_up(args[0], args[1], out)
        if not any(id(t) in self.names or t in self._labels for t in _tensors((args, kwargs))):
            return True
        if name in flow.ADDS:
            return self._add(args, out)
        if name in flow.SCALES:
            return self._scale(name, args, out)
        if name in _SUMS or name in _POOLS:
            return self._average(name, args, kwargs, out)
        if name in _KEEPS:
            labels = self.labels(args[0])
            return labels is not None and self._put(out, labels)
        return name in flow.MOVES and self._move(func, name, args, kwargs, out)

    # -- labels ----------------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor | None:
        """Those of a tensor; a parameter that is read as it is has one for each element."""
        name = self.names.get(id(tensor))
        if name is None:
            found: Tensor | None = self._labels.get(tensor)
            return found
        elements = self.trail.number(ELEMENTS, name, tensor.numel(), tensor.shape)
        return span(elements, tensor.device).reshape(tensor.shape)

    def lose(self, tensor: Tensor, reason: str) -> None:
        """A tensor goes where it is not followed."""
        name = self.names.get(id(tensor))
        if name is not None:
            self.trail.read.add(name)
        if name is None or (ELEMENTS, name) in self.trail.ranges:
            labels = self.labels(tensor)
            if labels is not None:
                self.trail.lost.append((distinct(labels), reason))

    def _put(self, tensor: Any, labels: Tensor) -> bool:
        self._labels[tensor] = labels if labels.shape == tensor.shape else labels.expand(tensor.shape).clone()
        return True

    def _unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of the sum of two tensors."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = distinct_pairs(a, b)
        beside_unknown = pairs[:, (pairs == 0).any(0)]
        self.trail.lost.append((beside_unknown[beside_unknown > 0], "is added to something that is not followed"))
        self.trail.same.append(pairs[:, (pairs > 0).all(0)])
        return torch.where(a == ZERO, b, a)

    def _joined(self, labels: Tensor, dim: int) -> Tensor:
        """Labels of a weighted sum along a dimension, which becomes 1."""
        first = labels.amax(dim, keepdim=True)
        if varies(labels, dim):
            self._unite(labels, first)
        return first

    def _labels_or_unknown(self, tensor: Tensor) -> Tensor:
        labels = self.labels(tensor)
        return torch.zeros(tensor.shape, dtype=torch.long, device=tensor.device) if labels is None else labels

    # -- products --------------------------------------------------------------------------------------

    def _product(self, product: Product, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        operands = product.operands(*args, **kwargs)
        if product.kind in ("linear", "conv"):
            weight = self.names.get(id(operands["weight"]))
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            groups = kwargs.get("groups", args[6] if len(args) > 6 else 1) if product.kind == "conv" else 1
            if weight is None or groups != 1:
                return False
            dim = 1 - operands["weight"].ndim  # of the channels; behind them are the spatial ones
            self._enter(operands["input"], weight, dim)
            if product.kind == "conv" and _pads(kwargs.get("padding", args[4] if len(args) > 4 else 0)):
                self.trail.entered[weight].append(torch.full((1, operands["input"].shape[dim]), ZERO))
            return self._leave(weight, operands["weight"].shape[0], bias, out, dim)
        if product.kind == "sdpa" and not kwargs.get("enable_gqa"):
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None:
                self.lose(mask, f"goes through {name}")
            self._score(operands["query"], operands["key"], -2, -2)
            return self._mix(operands["value"], out, -2)
        if product.kind == "matmul" and len(_tensors((args, kwargs))) == 2:
            return self._matmul(operands["lhs"], operands["rhs"], out)
        return product.kind == "mha" and self._attend(operands, mha_arguments(*args, **kwargs), out)

    def _enter(self, x: Tensor, weight: str, dim: int) -> None:
        self.trail.entered.setdefault(weight, []).append(runs(self._labels_or_unknown(x), dim))

    def _leave(self, weight: str, size: int, bias: Tensor | None, out: Tensor, dim: int) -> bool:
        name = None if bias is None else self.names.get(id(bias), COMPUTED)
        if self.trail.biases.setdefault(weight, name) != name or name == COMPUTED:
            self.trail.biases[weight] = COMPUTED
            if bias is not None:
                self.lose(bias, "is a bias together with others")
        rows = span(self.trail.number(ROWS, weight, size), out.device)
        return self._put(out, rows.reshape(-1, *(1,) * (-1 - dim)))

    def _matmul(self, a: Tensor, b: Tensor, out: Tensor) -> bool:
        if a.ndim < 2 or b.ndim < 2:
            return False
        left, right = self.labels(a), self.labels(b)
        if lies_along(left, -1) and lies_along(right, -2):
            self._score(a, b, -2, -1)
            self._labels.pop(out, None)
            return True
        if lies_along(right, -1):
            self.lose(a, "multiplies tokens")
            return self._mix(b, out, -2)
        if lies_along(left, -2):
            self.lose(b, "multiplies tokens")
            return self._mix(a, out, -1)
        return False

    def _score(self, query: Tensor, key: Tensor, over_queries: int, over_keys: int) -> None:
        """Channels of queries and keys meet, the same for all tokens."""
        q = self._joined(self._labels_or_unknown(query), over_queries).movedim(over_queries, -2)
        k = self._joined(self._labels_or_unknown(key), over_keys).movedim(over_keys, -2)
        both = narrowed(torch.cat(torch.broadcast_tensors(q, k), dim=-2), (-2, -1))
        self.trail.scores.append(both.reshape(-1, *both.shape[-2:]).cpu().unique(dim=0))

    def _mix(self, value: Tensor, out: Tensor, over: int) -> bool:
        """Tokens are summed with weights that are the same for all channels of one head."""
        kept = self._joined(self._labels_or_unknown(value), over)
        self.trail.mixed.append(runs(kept, -3 - over))  # of the last two dimensions, the other one
        return self._put(out, kept)

    def _attend(self, operands: dict[str, Tensor], a: dict[str, Any], out: Any) -> bool:
        """F.multi_head_attention_forward on one input, with its projections inside."""
        packed, projection = self.names.get(id(operands.get("weight"))), self.names.get(id(operands["out_weight"]))
        if packed is None or projection is None or "input" not in operands:
            return False
        embed = operands["input"].shape[-1]
        inside = torch.empty(3 * embed)
        self._enter(operands["input"], packed, -1)
        self._leave(packed, 3 * embed, a["in_proj_bias"], inside, -1)
        q, k, v = self._labels[inside].reshape(3, a["num_heads"], -1)
        self.trail.scores.append(torch.stack([q, k], dim=1))
        self.trail.mixed.append(v)
        self.trail.entered.setdefault(projection, []).append(v.reshape(1, embed))
        return self._leave(projection, embed, a["out_proj_bias"], out[0], -1)

    # -- everything else -------------------------------------------------------------------------------

    def _norm(
        self, out: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any,
        **__: Any,
    ) -> bool:  # fmt: skip
        names = [None if p is None else self.names.get(id(p), COMPUTED) for p in (weight, bias)]
        if len(shape) != 1 or COMPUTED in names or (names[0] is None and names[1] is not None):
            return False
        name = names[0] or f"norm {len(self.trail.normed)} without parameters"
        if self.trail.affine.setdefault(name, (names[0], names[1])) != tuple(names):
            return False
        self.trail.normed.setdefault(name, []).append(runs(self._labels_or_unknown(x), -1))
        return self._put(out, span(self.trail.number(NORM, name, shape[0]), out.device))

    def _look_up(self, index: Tensor, table: Tensor, out: Tensor) -> bool:
        """A table that is read whole is one of positions; of others (words) only a few rows are seen here."""
        if id(table) not in self.names or table.shape[0] > index.numel():
            return False
        labels = self.labels(table)
        return labels is not None and self._put(out, labels[index])

    def _add(self, args: Any, out: Tensor) -> bool:
        if len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
            return False
        a, b = self.labels(args[0]), self.labels(args[1])
        return a is not None and b is not None and self._put(out, self._unite(a, b))

    def _scale(self, name: str, args: Any, out: Tensor) -> bool:
        tensors = [a for a in args[:2] if isinstance(a, Tensor)]
        labels = [self.labels(t) for t in tensors]
        if len(tensors) == 1:
            return labels[0] is not None and self._put(out, labels[0])
        # A parameter is the factor; else what comes second is.
        x = 0 if labels[0] is not None and self.trail.parameter_of(labels[0]) is None else 1
        values, factor, other = labels[x], labels[1 - x], tensors[1 - x]
        if values is None or (name in flow.DIVISIONS and x == 1) or values.ndim < other.ndim:
            return False
        gate = None if factor is None else self.trail.parameter_of(factor)
        if all(other.shape[dim] == 1 for dim in range(-other.ndim, 0) if varies(values, dim)):
            if gate is None:
                self.lose(other, "multiplies other channels")
            return self._put(out, values)  # one factor for all channels of a token
        if factor is None or gate is None or name in flow.DIVISIONS or self.trail.parameter_of(values) is not None:
            return False
        values, element = torch.broadcast_tensors(values, factor - gate.first)
        self.trail.gated.setdefault(gate.name, []).append(distinct_pairs(values, element))
        behind = self.trail.number(GATE, gate.name, gate.size, gate.shape)
        return self._put(out, torch.where(values == ZERO, ZERO, element + behind.first))

    def _average(self, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
        labels = self.labels(args[0])
        if labels is None:
            return False
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None) if name in _SUMS else ()
        if name in _POOLS:
            dims = range(-(_POOLS[name] or labels.ndim - 2), 0)
        if dims is None:
            return False
        for dim in (dims,) if isinstance(dims, int) else dims:
            labels = self._joined(labels, dim)
        return self._put(out, labels.reshape(out.shape) if labels.numel() == out.numel() else labels)

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Do to the labels what was done to the values. Indices stay as they are."""

        def label(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return self._labels_or_unknown(value)

        moved, options = pytree.tree_map(label, (args, kwargs))
        if name == "__setitem__":
            target, index, value = moved
            target[index] = value if isinstance(value, Tensor) else 0
            return self._put(args[0], target)
        if name == "pad":
            amounts, mode, fill = _pad_arguments(*args[1:], **kwargs)
            if mode != "constant" or fill:
                return False
            made = func(moved[0], amounts, value=ZERO)
        elif name == "view":
            made = moved[0].reshape(*moved[1:], **options)
        else:
            made = func(*moved, **options)
        return all(self._put(t, labels) for t, labels in zip(_tensors(out), _tensors(made), strict=True))


def _pads(padding: Any) -> bool:
    return padding == "same" or (padding != "valid" and any(padding if isinstance(padding, tuple) else (padding,)))


def _pad_arguments(pad: Any, mode: str = "constant", value: float | None = None) -> tuple[Any, str, float | None]:
    return pad, mode, value


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
