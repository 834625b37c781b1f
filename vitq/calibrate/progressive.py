"""Search scales from coarse to fine: score a grid, keep the best of every scale group, look around them, and again.

Shapes:  params (K, G), score (K, G): K candidates for each of G scale groups; lower is better
Formula: grid      `alternatives` of the format (zero-points, bases) x scales, evenly from that of the middle of the
                   values to that of all of them; CANDIDATES in all
         children  scale + step * (i / (n - 1) - 1/2), i = 0 … n - 1, of each one kept; then step / (n - 1/2)
Source:  fast progressive combining search: AdaLog, arXiv 2407.12951, section 3.4; official code GoatWu/AdaLog, 75a57d2

Alternatives are not refined: they survive or not. Where a format has many, those best with the present scale go on.
Differs from the official code in that zero-points are those around the present one, not around the middle of the codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitq.quantizers.base import Params, Quantizer

CANDIDATES = 128
ROUNDS = 6
KEPT = 16  # go on from one round to the next
SCANNED, KEPT_OF_SCANNED = 8, 32  # where a format has more than KEPT alternatives
FINEST = 1e-4  # no scale is smaller, in parts of that of all values


def finalists(
    quantizer: Quantizer,
    score: Callable[[Params], Tensor],
    now: Params,
    middle: Params,
    whole: Params,
    share: float,
) -> Params:
    """The candidates kept in the last round, best first.

    Args:
        now: (1, G) what there is.
        middle, whole: (1, G) parameters for the middle of the values, and for all of them.
        share: of the codes that zero-points are tried on.
    """
    tried, kept = quantizer.alternatives(now, share), KEPT
    if len(tried["scale"]) > KEPT:
        tried, kept = _best(tried, score, SCANNED), KEPT_OF_SCANNED
    first, last = middle["scale"], whole["scale"]
    if torch.equal(first, last):  # no scale to choose
        return _best(tried, score, kept)
    each = CANDIDATES // len(tried["scale"])
    step = (last - first) / (each - 1)
    tried = _crossed(tried | {"scale": torch.zeros_like(tried["scale"])}, torch.arange(each), step, first)
    for _ in range(ROUNDS - 1):
        tried = _best(tried, score, kept)
        children = CANDIDATES // kept
        tried = _crossed(tried, torch.linspace(-0.5, 0.5, children), step, torch.zeros_like(first))
        tried["scale"] = tried["scale"].maximum(FINEST * last)
        step = step / (children - 0.5)
    return _best(tried, score, kept)


def _crossed(params: Params, offsets: Tensor, step: Tensor, start: Tensor) -> Params:
    """Each of K parameters with each of N scales: its own + start + offset * step."""
    count = len(offsets)
    made = {name: value.repeat_interleave(count, dim=0) for name, value in params.items()}
    around = (start + offsets.to(step)[:, None] * step).repeat(len(params["scale"]), 1)
    return made | {"scale": made["scale"] + around}


def _best(params: Params, score: Callable[[Params], Tensor], count: int) -> Params:
    """The best of each group."""
    found = score(params)
    chosen = found.topk(min(count, len(found)), dim=0, largest=False).indices
    return {name: value.expand(len(found), -1).gather(0, chosen) for name, value in params.items()}
