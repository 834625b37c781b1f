"""Record one forward: every torch function, which tensors went in and came out, and which module made the call.

The record is made at the level at which calls are intercepted later (torch functions inside a module's
forward), so what is found is what can be quantized, for any module that runs at all; nothing is exported.
docs/decisions/tracing.md says why this replaces torch.export as the first choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from vitq.graph.ops import PRODUCTS, Product

# Uses a tensor's type and device, not its values.
METADATA = frozenset(
    {
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "size", "dim", "numel"),
    }
)
# Take the values of their first argument only.
FIRST_ONLY = frozenset({"type_as", "to", "expand_as", "view_as", "reshape_as"})
OUTSIDE = "made outside of any module's forward"


@dataclass
class Node:
    """One torch function call.

    Attributes:
        name: the function's name ("linear", "softmax", "__getitem__").
        inputs, outputs: tensor numbers, in argument order.
        owner: name of the innermost module whose forward was running.
        product: what kind of matrix product it is, if any.
        ordinal: its number among the products of its kind within this call of the owner.
        operands: operand name -> tensor number, for products.
        inner: name -> shape of operands that exist only inside the call (attention probabilities).
        bias: tensor number of what a product adds along its output channels, if anything.
        constant: nothing it reads depends on the model's inputs.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    owner: str
    constant: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    product: Product | None = None
    ordinal: int = 0
    operands: dict[str, int] = field(default_factory=dict)
    inner: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bias: int | None = None
    unsupported: str = ""
    macs: int = 0


@dataclass
class Record:
    """One forward, recorded.

    Attributes:
        nodes: in execution order.
        shapes: tensor number -> shape.
        params: tensor number -> parameter name.
        inputs, outputs: tensor numbers of the model's inputs and outputs.
        order: module names in the order of their first call.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    params: dict[int, str] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    producer: dict[int, Node] = field(default_factory=dict)
    consumers: dict[int, list[Node]] = field(default_factory=dict)
    result: Any = None


def record(model: nn.Module, run: Callable[[nn.Module], Any], example: Any) -> Record:
    """Run the model once and record it.

    Args:
        model: any module; its state is not changed.
        run: calls the model on the example.
        example: the pytree that `run` passes in; its tensors count as the model's inputs.
    """
    recorder = _Recorder(model, example)
    with torch.no_grad(), _module_stack(model, recorder), recorder:
        out = run(model)
    recorder.log.result = out
    recorder.log.outputs = {recorder.number(t) for t in _tensors(out)}
    return recorder.log


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.log = Record()
        self.stack: list[tuple[str, dict[str, int]]] = []
        self._numbers = WeakTensorKeyDictionary()  # a record must not hold what a forward lets go of
        self._count = 0
        self._dynamic: set[int] = set()
        self._outside: dict[str, int] = {}
        for name, param in model.named_parameters(remove_duplicate=True):
            self.log.params[self.number(param)] = name
        for tensor in _tensors(example):
            self.log.inputs.add(self.number(tensor))
        self._dynamic |= self.log.inputs

    def number(self, tensor: Tensor) -> int:
        known: int | None = self._numbers.get(tensor)
        return self._new_number(tensor) if known is None else known

    def _new_number(self, tensor: Tensor) -> int:
        number, self._count = self._count, self._count + 1
        self._numbers[tensor] = number
        self.log.shapes[number] = tuple(tensor.shape)
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        given = _tensors((args, kwargs))
        read = [] if name in METADATA else given[:1] if name in FIRST_ONLY else given
        inputs = tuple(self.number(t) for t in read)
        constant = not any(n in self._dynamic for n in inputs)
        node = Node(name, inputs, (), self.stack[-1][0] if self.stack else "", constant)
        self._note_product(node, func, args, kwargs)
        versions = [_version(t) for t in given]
        if node.unsupported:
            from torch.utils.flop_counter import FlopCounterMode  # slow to import

            with FlopCounterMode(display=False) as counter:
                out = func(*args, **kwargs)
            # torch's own count; it does not know recurrent layers and products of vectors.
            node.macs = int(counter.get_total_flops()) // 2 or self._own_count(node, out, args, kwargs)
        else:
            out = func(*args, **kwargs)
        written = [t for t, version in zip(given, versions, strict=True) if _version(t) != version]
        # A function that gives back its argument untouched (x.contiguous()) made nothing.
        made = [t for t in _tensors(out) if not any(t is g for g in given) or any(t is w for w in written)]
        if written:
            # A tensor written in place, and every view of its memory, is a new value under the same object.
            made += [t for t in self._sharing(written) if not any(t is m for m in made)]
        if not made:
            return out
        if node.product is not None and not node.unsupported:
            node.macs = node.product.macs(out, *args, **kwargs)
        node.outputs = tuple(self._new_number(t) for t in made)
        if not constant:
            self._dynamic.update(node.outputs)
        node.args = pytree.tree_map(lambda a: None if isinstance(a, Tensor) else a, args)
        node.kwargs = pytree.tree_map(lambda a: None if isinstance(a, Tensor) else a, kwargs)
        self.log.nodes.append(node)
        for number in node.outputs:
            self.log.producer[number] = node
        for number in set(inputs):
            self.log.consumers.setdefault(number, []).append(node)
        return out

    def _own_count(self, node: Node, out: Any, args: Any, kwargs: Any) -> int:
        return node.product.macs(out, *args, **kwargs) if node.product is not None else 0

    def _sharing(self, written: list[Tensor]) -> list[Tensor]:
        storages = {_storage(t) for t in written}
        return [t for t in self._numbers.keys() if _storage(t) in storages]  # noqa: SIM118  what is iterated is weak

    def _note_product(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        product = PRODUCTS.get(func)
        if product is None:
            return
        counts = self.stack[-1][1] if self.stack else self._outside
        node.product = product
        node.ordinal = counts.get(product.kind, 0)
        counts[product.kind] = node.ordinal + 1
        node.unsupported = product.unsupported(*args, **kwargs) if self.stack else OUTSIDE
        if not node.unsupported:
            node.operands = {k: self.number(t) for k, t in product.operands(*args, **kwargs).items()}
            node.inner = product.inner(*args, **kwargs)
            bias = product.bias(*args, **kwargs)
            node.bias = None if bias is None else self.number(bias)

    def entering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A module's forward, which says that it runs."""

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if name not in self.log.order:
                self.log.order.append(name)
            if not self.stack:
                # What the caller made of an example without tensors, or of an array in it, is an input as well.
                given, all_of_them = _tensors((args, kwargs)), not self.log.inputs
                fresh = {self.number(t) for t in given if all_of_them or t not in self._numbers}
                self.log.inputs |= fresh
                self._dynamic |= fresh
            self.stack.append((name, {}))
            try:
                return forward(*args, **kwargs)
            finally:
                self.stack.pop()

        return noted


@contextmanager
def _module_stack(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    # The forward itself is wrapped, not the call: that is what `insert` replaces, so hooks of the user, and a
    # forward called by its name, count for the same owner here and there.
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            patched.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = recorder.entering(name, module.forward)
        yield
    finally:
        for module, own in patched:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def function_name(func: Any) -> str:
    """What a torch function is called, an attribute by its own name."""
    name = getattr(func, "__name__", str(func))
    # Attributes (x.T, x.data) arrive as the __get__ of their descriptor.
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
