"""Samples of matrix products, gathered from the float model for as many products at a time as memory is to hold.

Samples of all products are many times what a float forward takes. They are gathered for the first products, as many as
SAMPLED bytes hold; when these are done with, the images are gone through again for the next ones. Without gradients the
model runs only up to the last of them, with gradients back to the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from torch import Tensor

from vitq.calibrate.blocks import Stop
from vitq.calibrate.capture import IMAGES, switched_off
from vitq.calibrate.heap import give_back
from vitq.calibrate.linears import watchable
from vitq.calibrate.products import Samples
from vitq.calibrate.sensitivity import run_backward
from vitq.core.batches import Batches, leading_size, split
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site

SAMPLED = 9 * 2**24  # bytes


def gathered(
    qmodel: QuantModel, waiting: list[Samples], data: Batches, probe: str | None, seed: int, progress: Progress
) -> Iterator[Samples]:
    """Each of these filled and merged, in order; all products see float operands.

    Args:
        waiting: empty ones, in the order in which the model computes their products.
        probe: of the gradients that samples follow (calibrate/sensitivity.py), None for none.
        seed: of its random numbers.
    """
    while waiting:
        found = _Go(qmodel, list(waiting), data).run(probe, seed, progress)
        waiting = waiting[len(found) :]
        for samples in waiting:  # what they have seen so far was to tell how much there is
            samples.clear()
        while found:
            samples = found.pop(0)
            samples.merge()
            yield samples


class _Go:
    """One go over the images, for the first of the samples."""

    def __init__(self, qmodel: QuantModel, sampled: list[Samples], data: Batches) -> None:
        self.qmodel, self.sampled, self.data = qmodel, sampled, data
        self.wanted = len(sampled)
        products = [samples.product for samples in sampled]
        self.sites: list[Site] = list({site.id: site for p in products for site in (p.left, p.right)}.values())
        self.since = {p.left.block or p.module for p in products}

    def run(self, probe: str | None, seed: int, progress: Progress) -> list[Samples]:
        """Those that were filled."""
        data, qmodel = self.data, self.qmodel
        with (
            watchable(qmodel, self.sites),
            switched_off(qmodel, self.sites),
            progress.task("observing products", len(data.sizes)) as task,
        ):
            if probe is not None:
                run_backward(qmodel, data, probe, seed, self.watch, task, self.since)
            else:
                seen = 0
                for batch in data:
                    for part in split(batch, IMAGES):
                        self.watch(seen, images := leading_size(part))
                        with suppress(Stop):
                            data.forward(qmodel.model, part)
                        seen += images
                        give_back()
                    task.advance()
        give_back()
        return self.sampled

    def cut(self, seen: int) -> None:
        """Let go of those for which there will be no room, judging by the images seen so far; the first one stays."""
        total = 0.0
        for number, samples in enumerate(self.sampled):
            total += samples.nbytes * self.data.count / max(seen, 1)
            if number and total > SAMPLED:
                del self.sampled[number:]

    def watch(self, seen: int, images: int, live: Callable[[], bool] | None = None) -> None:
        """In the next forward show operands and results to the samples, and to nobody else."""
        self.cut(seen)
        for site in self.sites:
            self.qmodel.quantizers[site].observer = self.qmodel.quantizers[site].product_observer = None
        looks: dict[str, list[Callable[[Tensor], None]]] = {}
        for number, samples in enumerate(self.sampled):
            left, right = samples.product.left, samples.product.right
            self.qmodel.quantizers[left].observer = partial(_show, samples.see_left)
            if right.param is None:
                self.qmodel.quantizers[right].observer = partial(_show, samples.see_right)
            look = partial(samples.see_made, seen=seen, images=images, live=live)
            each = looks.setdefault(left.id, [])
            each.append(look if live is not None else partial(self.see_and_stop, look, number, seen + images))
        for name, each in looks.items():
            self.qmodel.quantizers[name].product_observer = partial(_show_all, each)

    def see_and_stop(self, look: Callable[[Tensor], None], number: int, seen: int, made: Tensor) -> None:
        """End the forward where nothing behind is looked at, or there is no room for it."""
        look(made)
        if seen <= IMAGES:  # the first ones: later there is something to judge by before the forward
            self.cut(seen)
        if len(self.sampled) < self.wanted and number + 1 >= len(self.sampled):
            raise Stop


def _show(look: Callable[[Tensor], None], quantizer: object, x: Tensor) -> None:
    look(x)


def _show_all(looks: list[Callable[[Tensor], None]], x: Tensor) -> None:
    for look in looks:
        look(x)
