"""Put quantizers where the trace found products, without touching the module tree.

An owner (the innermost module whose forward makes a product) keeps its place, name, parameters and class
name; its class becomes a subclass whose forward runs the original one under a mode that hands the operands
of its products to their quantizers. Works in eager mode, torch.export and torch.compile.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitq.core.errors import TraceError
from vitq.core.site import Graph
from vitq.graph import integer
from vitq.graph.ops import PRODUCTS
from vitq.graph.record import OUTSIDE

# (kind, ordinal) -> operand -> quantizer, None for an operand left float; no operands: a call left float.
Table = dict[tuple[str, int], dict[str, nn.Module | None]]

# Classes of torch with a kernel of their own for the whole forward, which they take unless a mode is active.
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _Interception(TorchFunctionMode):
    """Counts an owner's products and passes their operands through the quantizers of their sites."""

    def __init__(self, owner: str, table: Table) -> None:
        super().__init__()
        self.owner = owner
        self.table = table
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is None:
            return func(*args, **kwargs)
        ordinal = self.seen.get(product.kind, 0)
        self.seen[product.kind] = ordinal + 1
        quantizers = self.table.get((product.kind, ordinal))
        if quantizers is None:
            raise TraceError(
                f"{self.owner or 'the model'} made a call ({product.kind} number {ordinal}) that it did not make while "
                f"it was traced; trace it with an example that takes the same way, in the same mode"
            )
        if product.unsupported(*args, **kwargs):
            # Known since the trace, and left float. Outer owners must not count it again.
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if not any(q is not None and q.active for q in quantizers.values()):
            return product.plain(*args, **kwargs)
        if product.integer is not None and integer.wanted():
            found = product.integer(quantizers, *args, **kwargs)
            if found is not None:
                return found

        port = _Quantizing(quantizers, f"{self.owner or 'the model'}: {product.kind} number {ordinal}")
        return product.run(port, *args, **kwargs)


class _Quantizing:
    """The port that passes operands through their quantizers, and shows results to who asked for them there."""

    def __init__(self, quantizers: dict[str, nn.Module | None], where: str) -> None:
        self.quantizers, self.where = quantizers, where

    def __call__(self, operand: str, tensor: Tensor) -> Tensor:
        if operand not in self.quantizers:
            raise TraceError(
                f"{self.where} has an operand {operand!r} that it did not have while it was traced (had "
                f"{', '.join(self.quantizers)}); trace it with an example that takes the same way"
            )
        quantizer = self.quantizers[operand]
        return tensor if quantizer is None else quantizer(tensor)

    def made(self, operand: str, result: Tensor) -> Tensor:
        look = getattr(self.quantizers.get(operand), "product_observer", None)
        if look is not None:
            with torch._C.DisableTorchFunction():
                look(result)
        return result


class QuantizedOwner(nn.Module):
    """Mixed into the class of a module that makes products; holds its quantizers by call."""

    _vitq_owner: str
    _vitq_table: Table
    _vitq_forward: Callable[..., Any] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with its products intercepted."""
        with _Interception(self._vitq_owner, self._vitq_table):
            if self._vitq_forward is not None:
                return self._vitq_forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by name.
        _, args, *state = tuple(super().__reduce_ex__(2))
        return _revived, (type(self).__bases__[1], *args[1:]), *state


def attach(model: nn.Module, graph: Graph, quantizers: Mapping[str, nn.Module]) -> None:
    """Route every product of the graph through the quantizers of its sites, in place.

    Args:
        model: the module that was traced, or one of the same structure.
        quantizers: site id -> quantizer; sites without one stay float.
    """
    modules = dict(model.named_modules())
    chosen = dict(quantizers.items())
    tables: dict[str, Table] = {}
    for call in graph.calls:
        if call.detail == OUTSIDE:
            continue
        table = tables.setdefault(call.owner, {})
        operands = zip(call.operands, call.sites, strict=True)
        table[(call.op, call.ordinal)] = {o: chosen.get(s) for o, s in operands}
    for name, module in modules.items():
        if isinstance(module, _FAST_PATHS):
            tables.setdefault(name, {})
    for owner, table in tables.items():
        _take_over(modules[owner], owner, table)


def detach(model: nn.Module) -> None:
    """Undo `attach`: every module gets its own class back."""
    for module in model.modules():
        if isinstance(module, QuantizedOwner):
            forward = module._vitq_forward
            left = module.__dict__.get("forward")
            if getattr(left, "__func__", None) is QuantizedOwner.forward:
                del module.__dict__["forward"]  # put there by somebody who wrapped it for a while
            module.__class__ = type(module).__bases__[1]
            for name in ("_vitq_owner", "_vitq_table", "_vitq_forward"):
                delattr(module, name)
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def detached(model: nn.Module, graph: Graph, quantizers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model without its quantizers, for a while."""
    detach(model)
    try:
        yield
    finally:
        attach(model, graph, quantizers)


def _take_over(module: nn.Module, owner: str, table: Table) -> None:
    if not isinstance(module, QuantizedOwner):
        # A forward patched onto the instance would hide the class's.
        module._vitq_forward = module.__dict__.pop("forward", None)
        module.__class__ = _owner_class(type(module))
    assert isinstance(module, QuantizedOwner)
    module._vitq_owner = owner
    module._vitq_table = table


_CLASSES: dict[type, type] = {}


def _owner_class(cls: type) -> type:
    # One class per original class, so that torch.compile treats equal layers alike.
    if cls not in _CLASSES:
        looks = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _CLASSES[cls] = type(cls.__name__, (QuantizedOwner, cls), looks)
    return _CLASSES[cls]


def _revived(cls: type, *args: Any) -> Any:
    """An empty owner of that original class, for pickle and copy to fill."""
    return copyreg.__newobj__(_owner_class(cls), *args)  # type: ignore[attr-defined]
