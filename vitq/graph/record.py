"""Record one forward: every torch function, which tensors went in and came out, and which module made the call.

The record is made at the level at which calls are intercepted later (torch functions inside a module's
forward), so what is found is what can be quantized, for any module that runs at all; nothing is exported.
docs/decisions/tracing.md says why this replaces torch.export as the first choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from vitq.graph.ops import PRODUCTS, Product

# Uses a tensor's type and device, not its values.
METADATA = frozenset(
    {
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "size", "dim", "numel"),
    }
)


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
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # keeps ids from being used again
        self._dynamic: set[int] = set()
        for name, param in model.named_parameters(remove_duplicate=True):
            self.log.params[self.number(param)] = name
        for tensor in _tensors(example):
            self.log.inputs.add(self.number(tensor))
        self._dynamic |= self.log.inputs

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._new_number(tensor)
        return self._numbers[id(tensor)]

    def _new_number(self, tensor: Tensor) -> int:
        number = len(self._alive)
        self._alive.append(tensor)
        self._numbers[id(tensor)] = number
        self.log.shapes[number] = tuple(tensor.shape)
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(self.number(t) for t in _tensors((args, kwargs)))
        name = getattr(func, "__name__", str(func))
        if name in METADATA:
            inputs = ()
        constant = not any(n in self._dynamic for n in inputs)
        node = Node(name, inputs, (), "", constant)
        if self.stack:
            node.owner, counts = self.stack[-1]
            self._note_product(node, counts, func, args, kwargs)
        out = func(*args, **kwargs)
        tensors = _tensors(out)
        if not tensors:
            return out
        # A tensor written in place is a new value under the same object.
        node.outputs = tuple(self._new_number(t) for t in tensors)
        if not constant:
            self._dynamic.update(node.outputs)
        if node.product is not None and not node.unsupported:
            node.macs = node.product.macs(out, *args, **kwargs)
        node.args = pytree.tree_map(lambda a: None if isinstance(a, Tensor) else a, args)
        node.kwargs = pytree.tree_map(lambda a: None if isinstance(a, Tensor) else a, kwargs)
        self.log.nodes.append(node)
        for number in node.outputs:
            self.log.producer[number] = node
        for number in set(inputs):
            self.log.consumers.setdefault(number, []).append(node)
        return out

    def _note_product(self, node: Node, counts: dict[str, int], func: Any, args: Any, kwargs: Any) -> None:
        product = PRODUCTS.get(func)
        if product is None:
            return
        node.product = product
        node.ordinal = counts.get(product.kind, 0)
        counts[product.kind] = node.ordinal + 1
        node.unsupported = product.unsupported(*args, **kwargs)
        if not node.unsupported:
            node.operands = {k: self.number(t) for k, t in product.operands(*args, **kwargs).items()}
            node.inner = product.inner(*args, **kwargs)


@contextmanager
def _module_stack(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []

    def entered(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if name not in recorder.log.order:
                recorder.log.order.append(name)
            recorder.stack.append((name, {}))

        return hook

    def left(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entered(name)))
        handles.append(module.register_forward_hook(left))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
