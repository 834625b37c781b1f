"""Watch sites while the model runs, with the model in float or on its already quantized prefix.

Two flows, streamed in the micro-batches that the data come in:

- *parallel*: every site sees what the float model gives it; one go over the data, a few images at a time, serves all
  sites.
- *prefix*: every site sees what quantized predecessors give it. With one micro-batch a single forward does:
  each site is finished when it is reached. With more, all micro-batches wait for one another at each site
  (calibrate/lockstep.py), which takes a single forward, too. Where that would hold too much, the work goes block
  by block: a site is finished when all micro-batches have reached it, and block inputs are kept between
  (calibrate/store.py), so memory does not grow with the model, and hardly with the data. Outside of blocks they
  may hold more than inside before they are run again for every site instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from vitq.calibrate.blocks import Stop, call_block, stream_blocks
from vitq.calibrate.heap import give_back
from vitq.calibrate.lockstep import Lockstep, Room, most, possible
from vitq.core.batches import Batches, device_of, first_of, leading_size, split
from vitq.core.progress import Progress, Task
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site

AT_ONCE = 2**31  # bytes that micro-batches may hold inside of the model, so as to run it once and not for every site
IMAGES = 8  # at a time where many sites keep something of every forward: activations are small beside that


class Watcher(Protocol):
    """What looks at the values of one site."""

    def observe(self, x: Tensor, images: int) -> Tensor | None:
        """Take in the site's tensor of one micro-batch, which holds so many images.

        May return what the site's quantizer makes of it, as far as `finish` does not change that.
        """

    def finish(self) -> None:
        """All micro-batches have been seen: act on them, for example fit and switch on the quantizer."""


@contextmanager
def switched_off(qmodel: QuantModel, watched: list[Site]) -> Iterator[None]:
    """Quantizers off for a while, weights in their decoded values excepted; observers of these sites end with it."""
    states = {site.id: qmodel.quantizers[site].state for site in qmodel.sites()}
    try:
        qmodel.set_state("off", [site for site in qmodel.sites() if not qmodel.quantizers[site].baked])
        with watching(qmodel, watched):
            yield
    finally:
        for name, state in states.items():
            qmodel.quantizers[name].state = state


@contextmanager
def watching(qmodel: QuantModel, sites: list[Site]) -> Iterator[None]:
    """Observers that these sites get in between are taken away at the end."""
    try:
        yield
    finally:
        for site in sites:
            qmodel.quantizers[site].observer = qmodel.quantizers[site].product_observer = None


@torch.no_grad()
def watch_parallel(
    qmodel: QuantModel, sites: list[Site], make: Callable[[Site], Watcher], data: Batches, progress: Progress
) -> None:
    """Show every site the values that the float model gives it, then finish all of them."""
    active = {site.id: make(site) for site in sites}
    with switched_off(qmodel, sites), progress.task("observing", len(data.sizes)) as task:
        for batch in data:
            for part in split(batch, IMAGES):
                for site in sites:
                    _observe_with(qmodel, site, partial(_shown, active[site.id], leading_size(part)))
                data.forward(qmodel.model, part)
                give_back()
            task.advance()
    for watcher in active.values():
        watcher.finish()


@torch.no_grad()
def watch_prefix(
    qmodel: QuantModel, sites: list[Site], make: Callable[[Site], Watcher], data: Batches, progress: Progress
) -> None:
    """Show every site the values that the quantized prefix gives it, and finish it before the next one."""
    pending = {site.id: site for site in sites}
    with watching(qmodel, sites):
        if len(data.sizes) == 1:
            with progress.task("calibrating on the quantized prefix", len(sites)) as task:
                _finish_as_reached(qmodel, pending, make, task, data.count)
                data.forward(qmodel.model, next(iter(data)))
        else:
            with progress.task("calibrating block by block", len(sites)) as task:
                _Stages(qmodel, pending, make, data, task).run()


def _observe_with(qmodel: QuantModel, site: Site, look: Callable[[Tensor], Tensor | None]) -> None:
    qmodel.quantizers[site].observer = lambda quantizer, x: look(x)


def _shown(watcher: Watcher, images: int, x: Tensor) -> Tensor | None:
    """Let a watcher see values, if there are any: where a detector finds nothing, its heads run on nothing."""
    return watcher.observe(x, images) if x.numel() else None


def _finish_as_reached(
    qmodel: QuantModel, pending: dict[str, Site], make: Callable[[Site], Watcher], task: Task, images: int
) -> None:
    def finish(site: Site, x: Tensor) -> Tensor | None:
        qmodel.quantizers[site].observer = None
        watcher = make(site)
        known = _shown(watcher, images, x)
        watcher.finish()
        task.advance()
        return known

    for site in pending.values():
        _observe_with(qmodel, site, partial(finish, site))


class _Seen:
    """What forwards have at sites, in a few numbers each; they may take turns, each in a thread of its own."""

    def __init__(self) -> None:
        self.values: dict[int, list[tuple[Any, ...]]] = {}
        self._running: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """This thread runs the forward of that number from now on."""
        self._running[threading.get_ident()] = number
        self.values[number] = []

    def note(self, site: Site, x: Tensor) -> None:
        """Take in a site's tensor."""
        wide = x.detach().float()
        told = site.id, tuple(x.shape), float(wide.sum()), float(torch.linalg.vector_norm(wide))
        self.values[self._running[threading.get_ident()]].append(told)


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
        self.separate = False

    def run(self) -> None:
        self.separate = self._separate()
        if self.separate and self._together(AT_ONCE):
            return
        blocks = [b for b in self.qmodel.graph.blocks if any(s.block == b for s in self.pending.values())]
        for _, block, inputs in stream_blocks(self.qmodel, self.data, blocks, self._run_model):
            self._finish_sites(inputs, partial(call_block, block))
        self._run_model()

    def _run_model(self) -> None:
        """Finish what is reached on the way, until the whole model runs (or somebody behind stops it)."""
        if not (self.separate and self._together()):
            self._finish_sites(self.data, self._forward)

    def _forward(self, batch: Any) -> Any:
        return self.data.forward(self.qmodel.model, batch)

    def _separate(self) -> bool:
        """Whether two forwards that wait for one another see at every site what each sees alone.

        Some models keep things on their modules on the way through.
        """
        if len(self.data.sizes) > most() or not possible():
            return False
        examples = [first_of(batch) for batch in islice(self.data, 2)]
        alone, together = _Seen(), _Seen()
        with self._observed(lambda site: partial(alone.note, site)):
            for number, example in enumerate(examples):
                alone.begin(number)
                self._forward(example)
        lockstep, order = Lockstep(self._room()), list(self.pending)

        def run(number: int) -> None:
            together.begin(number)
            self._forward(examples[number])

        def look(site: Site, x: Tensor) -> None:
            together.note(site, x)
            lockstep.pause(site.id)

        try:
            with self._observed(lambda site: partial(look, site)):
                lockstep.run([partial(run, n) for n in range(2)], lambda places: min(places, key=order.index))
        except Exception:  # of a model that two at a time confuse; any other comes again
            return False
        return alone.values == together.values

    def _room(self, most: int | None = None) -> Room:
        return Room(device_of(self.qmodel.model), most)

    def _together(self, most: int | None = None) -> bool:
        """One run of every micro-batch, all of which wait at each site; False if that took too much memory.

        Args:
            most: bytes; a share of what the machine has if it is not given.
        """
        if not self.pending:
            return True
        lockstep, order = Lockstep(self._room(most)), list(self.pending)
        watchers: dict[str, Watcher] = {}

        def look(site: Site, images: dict[int, int], x: Tensor) -> None:
            if site.id not in self.pending:  # finished while this forward was elsewhere
                return
            if site.id not in watchers:
                watchers[site.id] = self.make(site)
            _shown(watchers[site.id], images[threading.get_ident()], x)
            lockstep.pause(site.id)

        def choose(places: list[str]) -> str | None:
            name = min(places, key=order.index)
            watchers.pop(name).finish()
            self._finished(name)
            return name if self.pending else None

        counts: dict[int, int] = {}

        def run(batch: Any, images: int) -> None:
            counts[threading.get_ident()] = images
            self._forward(batch)

        with self._observed(lambda site: partial(look, site, counts)):
            lockstep.run((partial(run, *one) for one in zip(self.data, self.data.sizes, strict=True)), choose)
        return not lockstep.full

    def _finished(self, name: str) -> None:
        self.qmodel.quantizers[name].observer = None
        del self.pending[name]
        self.task.advance()

    def _finish_sites(self, items: Iterable[Any], run: Callable[[Any], Any]) -> None:
        """Run all items again and again, each time up to the first pending site, until none is reached."""
        while self.pending:
            self.reached = self.watcher = None
            with self._observed(lambda site: partial(self._look_and_stop, site)):
                for item, images in zip(items, self.data.sizes, strict=True):
                    self.images = images
                    with suppress(Stop):
                        run(item)
                give_back()
            if self.reached is None or self.watcher is None:
                return
            self.watcher.finish()
            self._finished(self.reached.id)

    def _look_and_stop(self, site: Site, x: Tensor) -> None:
        if self.reached is None:
            self.reached, self.watcher = site, self.make(site)
        if site is self.reached and self.watcher is not None:
            _shown(self.watcher, self.images, x)
        raise Stop

    @contextmanager
    def _observed(self, look: Callable[[Site], Callable[[Tensor], None]]) -> Iterator[None]:
        watched = list(self.pending.values())
        for site in watched:
            _observe_with(self.qmodel, site, look(site))
        try:
            yield
        finally:
            for site in watched:
                self.qmodel.quantizers[site].observer = None
