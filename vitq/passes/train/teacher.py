"""The float model as a teacher: its features before the heads, and their main directions.

Shapes:  features for each head (B, T, d), as in calibrate/features.py    basis (d, k)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vitq.calibrate.features import Made, Watched
from vitq.calibrate.moments import Moments
from vitq.core.batches import moved
from vitq.core.progress import Progress
from vitq.core.training import Draw, Training, order_of

ROUND_TO = 32  # directions, as in the paper
NOTHING = 1e-6  # of the largest variance: moments are sums of float32 products
LOOKED_AT = 4096  # examples for the main directions
KEPT = 2**28  # bytes of targets that are kept instead of computed again


class Teacher:
    """What the float model makes of the examples.

    Args:
        model: the float model, watched.
        training: where each example looks the same in every epoch, what the model makes of all of them is computed
            once, before training, if there is room.

    Attributes:
        needed: bytes that the targets of all examples take, None where they are not to be kept.
        kept: the targets, None if there is no room.
    """

    def __init__(self, model: Watched, training: Training, device: torch.device, progress: Progress) -> None:
        self.model, self.training, self.device = model, training, device
        self.needed: int | None = None
        self.kept: list[Made] | None = None
        if training.examples.fixed and training.epochs > 1:
            self.needed = self._needed()
            if 0 < self.needed <= KEPT:
                self.kept = self._all(progress)
            else:
                told = f"targets of the float model take {self.needed:,} bytes, too many to keep: once more each epoch"
                with progress.task(told, 1) as task:
                    task.advance()

    @torch.no_grad()
    def __call__(self, inputs: Any, draws: Sequence[Draw]) -> Made:
        """Features and outputs of these examples."""
        if self.kept is None:
            return self.model(inputs)
        rows = [self.kept[number] for _, number in draws]
        features, outputs = (
            [torch.stack(each) for each in zip(*(row[part] for row in rows), strict=True)] for part in (0, 1)
        )
        return features, outputs

    def _needed(self) -> int:
        """As one example tells."""
        features, outputs = next(self._in_order([0]))
        return sum(t.nbytes for t in (*features, *outputs)) * len(self.training.examples)

    def _all(self, progress: Progress) -> list[Made]:
        kept: list[Made] = []
        count = len(self.training.examples)
        with progress.task(f"targets of the float model, {self.needed or 0:,} bytes", count) as task:
            for features, outputs in self._in_order(range(count)):
                made = len((*features, *outputs)[0])
                kept += [([t[at] for t in features], [t[at] for t in outputs]) for at in range(made)]
                task.advance(made)
        return kept

    @torch.no_grad()
    def _in_order(self, numbers: Sequence[int]) -> Iterator[Made]:
        size = self.training.micro_batch
        draws = [[(0, number) for number in numbers[at : at + size]] for at in range(0, len(numbers), size)]
        for inputs, _ in self.training.examples.stream(draws):
            yield self.model(moved(inputs, self.device))

    def bases(self, share: float, seed: int) -> list[Tensor]:
        """For each head the directions that have this share of its features' variance, on examples the seed draws."""
        moments: list[Moments] = []
        for features, _ in self._in_order(order_of(len(self.training.examples), seed)[:LOOKED_AT]):
            moments = moments or [Moments(t.shape[-1], t.device) for t in features]
            for each, rows in zip(moments, features, strict=True):
                each.add(rows)
        return [principal(each.covariance, share).float() for each in moments]


def principal(covariance: Tensor, share: float) -> Tensor:
    """(d, k) eigenvectors of the largest eigenvalues, enough for this share of their sum.

    The number is rounded to the nearest multiple of 32, at least 32 (GPLQ, arXiv 2506.11784, section 3.2), and is no
    more than have any variance: few examples leave directions of which nothing is known.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    wanted = int((values.cumsum(0) < share * values.sum()).sum()) + 1
    rounded = max(ROUND_TO, (wanted + ROUND_TO // 2) // ROUND_TO * ROUND_TO)
    known = int((values > NOTHING * values[0]).sum())
    basis: Tensor = vectors[:, : max(1, min(rounded, known))]
    return basis
