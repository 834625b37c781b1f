"""Keeps captured activations, in memory up to a budget and on disk beyond it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

BUDGET = 2**28  # bytes kept in memory: two stores are alive at a time


class Store:
    """A list of pytrees of tensors that spills to a temporary folder.

    Only tensors and plain values (numbers, strings, None, containers of them) can spill; the folder goes
    with the store.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._budget = BUDGET if budget is None else budget
        self._items: list[Any] = []
        self._used = 0
        self._folder: Path | None = None

    def append(self, item: Any) -> None:
        """Add one item at the end."""
        size = sum(t.nbytes for t in pytree.tree_leaves(item) if isinstance(t, Tensor))
        if self._used + size <= self._budget:
            self._used += size
            self._items.append(item)
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="vitq-capture-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._items):06d}.pt"
        torch.save(item, path)
        self._items.append(path)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield torch.load(item, weights_only=True) if isinstance(item, Path) else item

    def __len__(self) -> int:
        return len(self._items)

    @property
    def spilled(self) -> int:
        """How many items are on disk."""
        return sum(isinstance(item, Path) for item in self._items)
