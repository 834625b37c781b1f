"""Keep only the inputs of blocks for the backward: less memory for a second forward of every block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from vitq.core.qmodel import QuantModel


@contextmanager
def recomputed(qmodel: QuantModel, on: bool) -> Iterator[None]:
    """For a while, blocks are run again in the backward."""
    blocks = [qmodel.model.get_submodule(name) for name in qmodel.graph.blocks] if on else []
    before: list[Any] = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
