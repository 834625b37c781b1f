"""Watch sites while the model runs, with the model in float or on its already quantized prefix.

Two flows, streamed in the micro-batches that the data come in:

- *parallel*: every site sees what the float model gives it; one go over the data serves all sites.
- *prefix*: every site sees what quantized predecessors give it. With one micro-batch a single forward does:
  each site is finished when it is reached. With more, the work goes block by block: a site is finished when
  all micro-batches have reached it, and block inputs are kept between (calibrate/store.py), so memory does
  not grow with the model, and hardly with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.store import Store
from vitq.core.batches import Batches
from vitq.core.progress import Progress, Task
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site


class Watcher(Protocol):
    """What looks at the values of one site."""

    def observe(self, x: Tensor, images: int) -> None:
        """Take in the site's tensor of one micro-batch, which holds so many images."""

    def finish(self) -> None:
        """All micro-batches have been seen: act on them, for example fit and switch on the quantizer."""


class _Stop(Exception):  # noqa: N818  it is a way out of a forward, not an error
    """Nothing further of this forward is needed."""


@torch.no_grad()
def watch_parallel(
    qmodel: QuantModel, sites: list[Site], make: Callable[[Site], Watcher], data: Batches, progress: Progress
) -> None:
    """Show every site the values that the float model gives it, then finish all of them."""
    active = {site.id: make(site) for site in sites}
    states = {s.id: qmodel.quantizers[s].state for s in qmodel.sites()}
    qmodel.set_state("off", [s for s in qmodel.sites() if not qmodel.quantizers[s].baked])
    try:
        with progress.task("observing", len(data.sizes)) as task:
            for batch, images in zip(data, data.sizes, strict=True):
                for site in sites:
                    _observe_with(qmodel, site, partial(active[site.id].observe, images=images))
                data.forward(qmodel.model, batch)
                task.advance()
    finally:
        for name, state in states.items():
            qmodel.quantizers[name].observer = None
            qmodel.quantizers[name].state = state
    for watcher in active.values():
        watcher.finish()


@torch.no_grad()
def watch_prefix(
    qmodel: QuantModel, sites: list[Site], make: Callable[[Site], Watcher], data: Batches, progress: Progress
) -> None:
    """Show every site the values that the quantized prefix gives it, and finish it before the next one."""
    pending = {site.id: site for site in sites}
    try:
        if len(data.sizes) == 1:
            with progress.task("calibrating on the quantized prefix", len(sites)) as task:
                _finish_as_reached(qmodel, pending, make, task, data.count)
                data.forward(qmodel.model, next(iter(data)))
        else:
            with progress.task("calibrating block by block", len(sites)) as task:
                _Stages(qmodel, pending, make, data, task).run()
    finally:
        for site in sites:
            qmodel.quantizers[site].observer = None


def _observe_with(qmodel: QuantModel, site: Site, look: Callable[[Tensor], None]) -> None:
    qmodel.quantizers[site].observer = lambda quantizer, x: look(x)


def _finish_as_reached(
    qmodel: QuantModel, pending: dict[str, Site], make: Callable[[Site], Watcher], task: Task, images: int
) -> None:
    def finish(site: Site, x: Tensor) -> None:
        qmodel.quantizers[site].observer = None
        watcher = make(site)
        watcher.observe(x, images)
        watcher.finish()
        task.advance()

    for site in pending.values():
        _observe_with(qmodel, site, partial(finish, site))


class _Stages:
    """The quantized prefix over several micro-batches: one site after the other, block by block."""

    def __init__(
        self,
        qmodel: QuantModel,
        pending: dict[str, Site],
        make: Callable[[Site], Watcher],
        data: Batches,
        task: Task,
    ) -> None:
        self.qmodel = qmodel
        self.pending = pending
        self.make = make
        self.data = data
        self.task = task
        self.reached: Site | None = None
        self.watcher: Watcher | None = None
        self.images = 0

    def run(self) -> None:
        blocks = [b for b in self.qmodel.graph.blocks if any(s.block == b for s in self.pending.values())]
        chained = self._chained(blocks)
        inputs: Store | None = None
        for number, name in enumerate(blocks):
            block = self.qmodel.model.get_submodule(name)
            if inputs is None:
                inputs = self._inputs_of(block)
            self._finish_sites(inputs, partial(_call, block))
            follows = number + 1 < len(blocks) and chained[number]
            inputs = self._through(block, inputs) if follows else None
        self._finish_sites(self.data, lambda batch: self.data.forward(self.qmodel.model, batch))

    def _finish_sites(self, items: Iterable[Any], run: Callable[[Any], Any]) -> None:
        """Run all items again and again, each time up to the first pending site, until none is reached."""
        while self.pending:
            self.reached = self.watcher = None
            with self._stopping_at_pending():
                for item, images in zip(items, self.data.sizes, strict=True):
                    self.images = images
                    with suppress(_Stop):
                        run(item)
            if self.reached is None or self.watcher is None:
                return
            self.watcher.finish()
            del self.pending[self.reached.id]
            self.task.advance()

    @contextmanager
    def _stopping_at_pending(self) -> Iterator[None]:
        def look(site: Site, x: Tensor) -> None:
            if self.reached is None:
                self.reached, self.watcher = site, self.make(site)
            if site is self.reached and self.watcher is not None:
                self.watcher.observe(x, self.images)
            raise _Stop

        for site in self.pending.values():
            _observe_with(self.qmodel, site, partial(look, site))
        try:
            yield
        finally:
            for site in self.pending.values():
                self.qmodel.quantizers[site].observer = None

    def _inputs_of(self, block: nn.Module) -> Store:
        """Inputs of a block from the start of the model; sites outside of blocks on the way are finished."""
        store = Store()

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            store.append(_plain((args, kwargs)))
            raise _Stop

        handle = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            # The last go, which meets no pending site before the block, is the one that fills the store.
            self._finish_sites(self.data, lambda batch: self.data.forward(self.qmodel.model, batch))
        finally:
            handle.remove()
        return store

    def _through(self, block: nn.Module, inputs: Store) -> Store:
        outputs = Store()
        for args, kwargs in inputs:
            out = block(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            outputs.append(_plain(((first, *args[1:]), kwargs)))
        return outputs

    def _chained(self, blocks: list[str]) -> list[bool]:
        """Whether each block's input is the output of the one before, and its other inputs are the same."""
        calls: dict[str, tuple[Any, Any, Any]] = {}
        handles = []
        for name in blocks:

            def note(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                calls[name] = (args, kwargs, out[0] if isinstance(out, tuple) else out)

            handles.append(self.qmodel.model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
        try:
            self.data.forward(self.qmodel.model, _one(next(iter(self.data))))
        finally:
            for handle in handles:
                handle.remove()
        return [_follows(calls.get(a), calls.get(b)) for a, b in pairwise(blocks)]


def _call(block: nn.Module, item: tuple[Any, Any]) -> Any:
    # A copy, because a block may change its input in place (x += ...) and runs many times on it.
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, item)
    return block(*args, **kwargs)


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


def _one(batch: Any) -> Any:
    return pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.ndim else t, batch)


def _plain(item: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, item)
