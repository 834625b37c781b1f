"""The only straight-through code."""

from __future__ import annotations

from typing import Any

import torch
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


def on_grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(round(x / scale), low, high) * scale; all broadcast to x.

    The gradient of x passes where the rounded value is within the ends, at the ends included; that of the scale is
    round(x / scale) - x / scale there and the end elsewhere (LSQ, Esser et al., arXiv 1902.08153, equations 2 and 3).
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
        return _grid(x, scale, low, high)
    if torch.compiler.is_compiling():  # what is traced has no gradients of its own
        return torch.clamp(round_ste(x / scale), low, high) * scale
    made: Tensor = _OnGrid.apply(x, scale, low, high)
    return made


def _grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.clamp((x / scale).round(), low, high) * scale
    # In place: one new tensor instead of four.
    y = torch.div(x, scale).round_()
    if low.is_cuda:  # one kernel, and no number to wait for
        y.clamp_(low, high)
    elif low.numel() == 1:  # two numbers clamp faster
        y.clamp_(low.item(), high.item())
    else:  # faster on a CPU than clamping to tensors
        torch.maximum(torch.minimum(y, high, out=y), low, out=y)
    return y.mul_(scale)


class _OnGrid(torch.autograd.Function):
    """Keeps x alone for the backward; autograd would keep four tensors of its size, and halve gradients at the ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        return _grid(x, scale, low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors
        ratio = x / scale
        whole = ratio.round()
        inside = (whole >= low) & (whole <= high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, whole - ratio, whole.clamp(low, high)).mul_(grad)
            by_scale = slope.sum_to_size(scale.shape)
        return grad * inside if ctx.needs_input_grad[0] else None, by_scale, None, None
