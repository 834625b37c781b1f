"""Statistics of one site, gathered in one go over any number of micro-batches, in bounded memory.

A sketch keeps, per scale group: minimum and maximum, the exact tails (every value beyond the 0.1 % quantiles,
so any percentile from 99.9 % up and the clipping error of any clip there are exact), and a strided sample of
the body. What is estimated is only the rounding error of the body, which is the same kind of noise everywhere.

Shapes:  G scale groups, n values of a group in one micro-batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.core.errors import DataError
from vitq.quantizers.ranked import in_order

TAIL = 0.001  # share of the values that each tail holds: the lowest percentile in use is 99.9 %
SAMPLE = 2**17  # values of the body kept per site …
SAMPLE_PER_GROUP = 512  # … but at least so many per group
PENDING = 2**16  # values of tails that may wait to be merged
GUESS = 2**13  # of the sample, to guess where a tail begins


@dataclass(frozen=True)
class Statistics:
    """What a sketch has gathered.

    Attributes:
        count: values per group.
        low, high: (G,) minimum and maximum.
        bottom: (G, k) smallest values ascending; top: (G, k) largest values descending.
        exact: every value was kept, in ascending order, in the body; there are no tails.
        body: (G, m) sample of the rest, NaN where a sampled value is in a tail.
        body_weight: (G,) how many values each value of the body stands for.
    """

    count: int
    low: Tensor
    high: Tensor
    bottom: Tensor
    top: Tensor
    body: Tensor
    body_weight: Tensor
    exact: bool

    def quantile(self, probability: float) -> Tensor:
        """(G,) quantile as torch.quantile defines it, linear between neighbours, for tails or kept values.

        The probability is rounded to float32 and the rank is float64, as in torch.quantile for any number of
        values. So results equal torch's to the bit (tested against 2.15).
        """
        rank = torch.tensor(probability, dtype=torch.float32).to(torch.float64) * (self.count - 1)
        below, above = int(rank), int(rank.ceil())
        values = torch.stack([self._ordered(below), self._ordered(above)])
        weight = (rank - below).to(torch.float32)
        return torch.lerp(values[0], values[1], weight)

    def _ordered(self, rank: int) -> Tensor:
        """(G,) value of this rank, 0 the smallest."""
        if self.exact:
            return self.body[:, rank]
        if rank < self.bottom.shape[1]:
            return self.bottom[:, rank]
        from_top = self.count - 1 - rank
        if from_top < self.top.shape[1]:
            return self.top[:, from_top]
        raise DataError(
            f"rank {rank} of {self.count} is not in the tails kept ({TAIL:.1%} each); use percentiles from 99.9 up"
        )


class Sketch:
    """Gathers `Statistics` of tensors given as (G, n).

    Args:
        keep_all: keep every value, whatever the memory (parity with code that looks at all of them).
        needs: "range" (minimum and maximum), "tails" (percentiles, too) or "sample" (candidates are scored, too).
        images: how many images will be seen in all, to know the size of the tails; None if only one
            micro-batch comes.
        one_sided: the range starts at zero, so the smallest values do not matter.
        tail: share of the values that each tail holds.
    """

    def __init__(
        self,
        *,
        keep_all: bool = False,
        images: int | None = None,
        one_sided: bool = False,
        needs: str = "sample",
        tail: float = TAIL,
    ) -> None:
        self.keep_all = keep_all
        self.tail = tail
        self.needs = needs
        self.one_sided = one_sided
        self.images = images
        self._count = 0
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._tops: list[Tensor] = []
        self._bottoms: list[Tensor] = []
        self._bodies: list[Tensor] = []
        self._tail_size = 0
        self._share = 1.0

    def observe(self, x: Tensor, images: int = 1) -> None:
        """Take in one micro-batch of values, (G, n), which came from so many images.

        Raises:
            DataError: NaN or Inf in it.
        """
        low, high = ends(x)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("NaN or Inf among the values")
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            self._plan(x.shape[0], x.shape[1], images)
        else:
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._count += x.shape[1]
        if self.needs == "range":
            return
        if self._share >= 1.0:
            self._bodies.append(x.clone())  # the model may go on to change it in place
            return
        body, top, bottom = self._split(x)
        self._bodies.append(body if self.needs == "sample" else body[:, :0].clone())
        self._tops.append(top)
        self._bottoms.append(bottom)
        if sum(part.numel() for part in self._tops[1:]) > max(self._tops[0].numel(), PENDING):
            self._merge()

    def _plan(self, groups: int, values: int, images: int) -> None:
        total = values if self.images is None else math.ceil(values * self.images / max(images, 1))
        sample = max(SAMPLE // groups, SAMPLE_PER_GROUP)
        if self.keep_all or total <= 2 * sample:
            return
        self._share = sample / total
        # One more for the neighbour that interpolation needs, and slack for inputs of varying size.
        self._tail_size = math.ceil(self.tail * total) * (1 if self.images is None else 2) + 2
        self._tail_size = min(self._tail_size, values)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        body = x[:, :: prime_from(max(2, int(1 / self._share)))].clone()
        size = min(self._tail_size, x.shape[1])
        if x.shape[0] > 1:
            top = x.topk(size, dim=1).values
            bottom = x[:, :0] if self.one_sided else x.topk(size, dim=1, largest=False).values
            return body, top, bottom
        sample = in_order(body[:, :: prime_from(max(2, body.shape[1] // GUESS))])[0]
        top = _outermost(x[0], sample, size, largest=True)[None]
        return body, top, x[:, :0] if self.one_sided else _outermost(x[0], sample, size, largest=False)[None]

    def _merge(self) -> None:
        top, bottom = torch.cat(self._tops, 1), torch.cat(self._bottoms, 1)
        self._tops = [top.topk(min(self._tail_size, top.shape[1]), dim=1).values]
        self._bottoms = [bottom.topk(min(self._tail_size, bottom.shape[1]), dim=1, largest=False).values]

    def statistics(self) -> Statistics:
        """Everything gathered so far.

        Raises:
            DataError: nothing was.
        """
        if self._low is None or self._high is None:
            raise DataError(
                "the site saw no values: the model took another way than when it was traced, or found nothing in the "
                "calibration images (a detector's heads then have nothing to do); give more images, or a scope"
            )
        ones = torch.ones_like(self._low)
        body = torch.cat(self._bodies, 1) if self._bodies else self._low.new_empty(self._low.shape[0], 0)
        if self._share >= 1.0 or self.needs == "range":
            none, kept = body.new_empty(body.shape[0], 0), self.needs != "range"
            return Statistics(self._count, self._low, self._high, none, none, in_order(body), ones, kept)
        self._merge()
        top, bottom = self._tops[0], self._bottoms[0]
        # Values equal to the end of a tail belong to the body: many may be (the zeros of a ReLU).
        inside = body <= top[:, -1:]
        if bottom.shape[1]:
            inside &= body >= bottom[:, -1:]
        rest = self._count - top.shape[1] - bottom.shape[1]
        weight = rest / inside.sum(1).clamp(min=1)
        body = torch.where(inside, body, math.nan)
        return Statistics(self._count, self._low, self._high, bottom, top, body, weight, False)


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) smallest and largest of (G, n); of one row many times faster without a dimension."""
    if len(x) > 1:
        return torch.aminmax(x, dim=1)
    low, high = torch.aminmax(x)
    return low[None], high[None]


def _outermost(row: Tensor, sample: Tensor, size: int, largest: bool) -> Tensor:
    """The `size` largest or smallest values of a long row, the outermost first.

    They are found through a threshold guessed from a sorted sample.
    """
    inward = math.ceil(1.5 * size * sample.numel() / row.numel()) + 16
    if inward < sample.numel() - 1:
        beyond = _beyond(row, float(sample[-1 - inward] if largest else sample[inward]), largest)
        if beyond.numel() >= size:
            ordered = in_order(beyond[None])[0]
            return ordered.flip(0)[:size] if largest else ordered[:size]
        end = row.max() if largest else row.min()
        if int((row == end).sum()) >= size:  # a plateau, such as the zeros of a ReLU
            return end.expand(size)
    return row.topk(size, largest=largest).values


def _beyond(row: Tensor, end: float, largest: bool) -> Tensor:
    """Values beyond an end. On the CPU by numpy, which picks a few of many in a fraction of the time."""
    if row.device.type == "cpu":
        values = row.numpy()
        return torch.from_numpy(values[values > end] if largest else values[values < end])
    return row[row > end] if largest else row[row < end]


def prime_from(number: int) -> int:
    """The first prime from here on: a stride that shares no factor with channel counts."""
    while any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
