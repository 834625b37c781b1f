"""The inputs of one transformer block after the other, kept while they are needed: memory does not grow with depth.

An item is what a block was called with, (args, kwargs), for one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.store import Store
from vitq.core.batches import Batches, first_of
from vitq.core.qmodel import QuantModel


class Stop(Exception):  # noqa: N818  it is a way out of a forward, not an error
    """Nothing further of this forward is needed."""


def stream_blocks(
    qmodel: QuantModel, data: Batches, names: list[str], run_model: Callable[[], None] | None = None
) -> Iterator[tuple[str, nn.Module, Store]]:
    """(name, block, its inputs in every micro-batch) for each block, in order.

    What is done to a block, and before it, while it is handed out is seen by those behind it.

    Args:
        run_model: runs the model on all micro-batches, through `Stop`; called where a block's inputs are not
            the outputs of the one before.
    """

    def run_all() -> None:
        for batch in data:
            with suppress(Stop):
                data.forward(qmodel.model, batch)

    chained = _chained(qmodel, data, names)
    inputs: Store | None = None
    for number, name in enumerate(names):
        block = qmodel.model.get_submodule(name)
        if inputs is None:
            inputs = _caught(block, run_model or run_all)
        yield name, block, inputs
        follows = number + 1 < len(names) and chained[number]
        inputs = _through(block, inputs) if follows else None


def call_block(block: nn.Module, item: tuple[Any, Any]) -> Any:
    """Run a block on a copy of an item: it may change its input in place (x += ...) and runs many times on it."""
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, item)
    return block(*args, **kwargs)


def first(out: Any) -> Any:
    """The hidden states among what a block returns."""
    return out[0] if isinstance(out, tuple) else out


def _caught(block: nn.Module, run_model: Callable[[], None]) -> Store:
    """Inputs of a block from the start of the model. Goes that stop before the block leave nothing."""
    store = Store()

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        store.append(_plain((args, kwargs)))
        raise Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run_model()
    finally:
        handle.remove()
    return store


def _through(block: nn.Module, inputs: Store) -> Store:
    outputs = Store()
    for args, kwargs in inputs:
        outputs.append(_plain(((first(block(*args, **kwargs)), *args[1:]), kwargs)))
    return outputs


def _chained(qmodel: QuantModel, data: Batches, names: list[str]) -> list[bool]:
    """Whether each block's input is the output of the one before, and its other inputs are the same."""
    calls: dict[str, tuple[Any, Any, Any]] = {}
    handles = []
    for name in names:

        def note(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            calls[name] = (args, kwargs, first(out))

        handles.append(qmodel.model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        data.forward(qmodel.model, first_of(next(iter(data))))
    finally:
        for handle in handles:
            handle.remove()
    return [_follows(calls.get(a), calls.get(b)) for a, b in pairwise(names)]


def _follows(before: tuple[Any, Any, Any] | None, after: tuple[Any, Any, Any] | None) -> bool:
    if before is None or after is None or not after[0] or not before[0]:
        return False
    others = [(before[0][1:], after[0][1:]), (before[1], after[1])]
    same = all(_identical(a, b) for a, b in others)
    return after[0][0] is before[2] and same


def _identical(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(left, right, strict=True)
    )


def _plain(item: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, item)
