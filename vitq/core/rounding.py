"""The only straight-through code."""

from __future__ import annotations

from torch import Tensor


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (Bengio et al., arXiv 1308.3432)."""
    return straight_through(x.round(), x)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`; the two are at most a rounding apart."""
    if not soft.requires_grad:
        return hard
    # inf - inf is NaN, and values beyond float32 must come out here as they do without gradients.
    return soft + (hard - soft).detach().nan_to_num(nan=0.0)
