"""How much each row of a linear's output matters to the model's output: tokens are not alike.

Shapes:  weights (n,), one for each row that `Linear.rows` gives of all images, in their order; mean 1
Formula: w = EVEN + (1 - EVEN) |g|^2 / mean |g|^2, g the gradient at the row (calibrate/sensitivity.py), the mean over
         the rows of its image: images count alike, whether the model is sure of them or not
Source:  GuidedQuant, Kim et al., ICML 2025, arXiv 2505.07004, section 3, with one group of output channels

Differs from it in the gradients, which are those of the Gauss-Newton Hessian of the divergence and need no labels, in
that images count alike, and in that a part of all rows does: behind the last block of a classifier only one token in
two hundred has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitq.calibrate.capture import switched_off
from vitq.calibrate.linears import Linear, watchable
from vitq.calibrate.selected import behind_choices
from vitq.calibrate.sensitivity import GRADIENT_IMAGES, run_backward
from vitq.core.batches import Batches, split
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel

EVEN = 0.1  # of all weight goes to rows alike
PROBE = "hessian"
TINY = torch.finfo(torch.float32).tiny
SAME = 1e-3  # differences of float rounding, not of order


class RowWeights:
    """Weights of rows that come in order, some at a time; None where all count alike."""

    def __init__(self, weights: Tensor | None) -> None:
        self.weights, self.seen = weights, 0

    def of(self, rows: Tensor) -> Tensor | None:
        """Those of the next rows."""
        start, self.seen = self.seen, self.seen + len(rows)
        return None if self.weights is None else self.weights[start : self.seen]


def row_weights(
    qmodel: QuantModel, data: Batches, found: list[Linear], progress: Progress, seed: int = 0
) -> dict[str, Tensor]:
    """Weights by the id of each linear's weight site, from the model with its quantizers off.

    Linears that are called several times in a forward, that nothing behind depends on, whose rows do not come image
    by image (tokens first, as inside some attention modules), or are what the model chose by its values (a detector's
    regions) are left out: their rows count alike.
    """
    loose = behind_choices(qmodel, data)
    found = [linear for linear in found if linear.input.call not in loose]
    sites = [linear.input for linear in found]
    squares: dict[str, list[Tensor]] = {linear.weight.id: [] for linear in found}
    with watchable(qmodel, sites), switched_off(qmodel, sites):
        separate = _image_by_image(qmodel, data, found)
        for site in sites:  # an observer keeps products in sight
            qmodel.quantizers[site].observer = _look_away

        def watch(seen: int, images: int, live: Callable[[], bool]) -> None:
            for linear in found:
                channel = 1 if linear.input.op != "linear" else -1
                note = partial(_note, squares[linear.weight.id], images, channel)
                qmodel.quantizers[linear.input].product_observer = note

        with progress.task("weighing tokens", len(data.sizes)) as task:
            run_backward(qmodel, data, PROBE, seed, watch, task)
    weights = {}
    for name in separate:
        every = torch.cat(squares[name])
        if float(every.sum()) > 0:
            weights[name] = EVEN + (1 - EVEN) * every / every.mean()
    return weights


def _note(squares: list[Tensor], images: int, channel: int, made: Tensor) -> None:
    """Room for the squared norms of these rows' gradients in parts of their image's, filled when they come."""
    number = len(squares)
    squares.append(made.new_zeros(made.numel() // made.shape[channel], dtype=torch.float32))

    def take(g: Tensor) -> None:
        rows = g.detach().float().movedim(channel, -1).square().sum(-1).flatten()
        each = rows.reshape(images, -1) if len(rows) % images == 0 else rows[None]
        squares[number] = (each / each.sum(1, keepdim=True).clamp(min=TINY)).flatten()

    if made.requires_grad:
        made.register_hook(take)


@torch.no_grad()
def _image_by_image(qmodel: QuantModel, data: Batches, found: list[Linear]) -> list[str]:
    """Weight sites that are used once in a forward, on rows that are in the same order for a few images at a time."""
    few = next(split(next(iter(data)), GRADIENT_IMAGES))
    together, apart = ({linear.weight.id: list[Tensor]() for linear in found} for _ in range(2))
    for noted, parts in ((together, [few]), (apart, split(few, GRADIENT_IMAGES // 2))):
        for linear in found:
            look = partial(_note_sums, qmodel, linear, noted[linear.weight.id])
            qmodel.quantizers[linear.input].observer = look
        for part in parts:
            data.forward(qmodel.model, part)
    return [site for site, sums in together.items() if len(sums) == 1 and _same(sums[0], torch.cat(apart[site]))]


def _note_sums(qmodel: QuantModel, linear: Linear, sums: list[Tensor], quantizer: object, x: Tensor) -> None:
    sums.append(linear.rows(qmodel.model, x).float().sum(1))


def _look_away(quantizer: object, x: Tensor) -> None: ...


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= SAME * float(a.abs().max())
