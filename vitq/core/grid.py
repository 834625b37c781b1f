"""Values on a uniform grid and their gradients, in pieces that stay in the processor's cache.

Shapes:  x any      scale, low, high broadcastable with it
Units:   low and high are in steps of `scale`

A tensor of activations is larger than the cache: every one of the few operations of a rounding would fetch and write it
again, and a new tensor of that size costs as much as three of them (its pages come from the system, empty).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vitq.core.rounding import round_ste

PIECE = 2**17  # values for each thread


def on_grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(round(x / scale), low, high) * scale; all broadcast with x.

    The gradient of x passes where the rounded value is within the ends, at the ends included; that of the scale is
    round(x / scale) - x / scale there and the end elsewhere (LSQ, Esser et al., arXiv 1902.08153, equations 2 and 3).
    """
    if torch.compiler.is_compiling():  # what is traced has gradients by autograd, and is fused
        return torch.clamp(round_ste(x / scale), low, high) * scale
    if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
        return _values(x, scale, low, high)
    made: Tensor = _OnGrid.apply(x, scale, low, high)
    return made


def _values(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if x.shape != torch.broadcast_shapes(x.shape, scale.shape):  # candidates of one tensor
        return _bounded(torch.div(x, scale).round_(), low, high).mul_(scale)
    made = torch.empty_like(x)
    for part, out, s, lo, hi in pieces((x, made), (scale, low, high)):
        torch.div(part, s, out=out)
        _bounded(out.round_(), lo, hi).mul_(s)
    return made


def _bounded(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """y, clamped in place."""
    if low.is_cuda:  # one kernel, and no number to wait for
        return y.clamp_(low, high)
    if low.numel() == 1:  # two numbers clamp faster
        return y.clamp_(low.item(), high.item())
    return torch.maximum(torch.minimum(y, high, out=y), low, out=y)  # faster on a CPU than clamping to tensors


class _OnGrid(torch.autograd.Function):
    """Keeps x alone for the backward; autograd would keep four tensors of its size, and halve gradients at the ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        return _values(x, scale, low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        by_x, by_scale = torch.empty_like(grad), torch.zeros_like(scale)
        held: Tensor | None = (
            None  # three tensors of a piece's size, for all pieces; numbers are faster masks than bools
        )
        for part, g, out, s, by, lo, hi in pieces((x.expand(grad.shape), grad, by_x), (scale, by_scale, low, high)):
            if held is None:
                held = part.new_empty((3, *part.shape))
            ratio, code, inside = held[:, : len(part)] if part.ndim else held
            # One step beyond the ends is as far as matters, and infinity times nothing would be no number.
            _bounded(torch.div(part, s, out=ratio), lo - 1, hi + 1)
            torch.round(ratio, out=inside)
            inside.eq_(_bounded(code.copy_(inside), lo, hi))
            if wants_x:
                torch.mul(g, inside, out=out)
            if wants_scale:
                by += code.sub_(ratio.mul_(inside)).mul_(g).sum_to_size(by.shape)
        return by_x if wants_x else None, by_scale if wants_scale else None, None, None


def pieces(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same part of each, as views: of tensors of one shape, and of what broadcasts to it.

    A tensor comes whole where it is small, or not on a CPU, where every operation would have to be started once more.
    """
    first, size = tensors[0], PIECE * torch.get_num_threads()
    if first.numel() <= size or first.device.type != "cpu":
        yield [*tensors, *params]
        return
    params = [p.view((1,) * (first.ndim - p.ndim) + p.shape) for p in params]
    shared = list(takewhile(lambda sizes: set(sizes) == {1}, zip(*(p.shape for p in params), strict=True)))
    if len(shared) > 1 and all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1, *t.shape[len(shared) :]) for t in tensors]
        params = [p.view(1, *p.shape[len(shared) :]) for p in params]
    rows = len(tensors[0])
    step = max(1, size * rows // first.numel())
    for at in range(0, rows, step):
        yield [t[at : at + step] for t in tensors] + [p if len(p) == 1 else p[at : at + step] for p in params]
