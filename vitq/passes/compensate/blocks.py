"""Add to each block's output a linear map of its input that makes up for what quantization changed, in closed form.

Shapes:  x, f, q (n, C) a block's input, float output and quantized output as tokens    W (C, C), b (C,)
Formula: out = q + x W + b with [W; b] = argmin sum |f - q - x W - b|^2 + ridge * mean(diag(x^T x)) |W|^2
Source:  QwT, Fu et al., CVPR 2025, arXiv 2411.13918, section 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.blocks import call_block, first, stream_blocks
from vitq.calibrate.moments import Moments
from vitq.calibrate.store import Store
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError, InputError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.core.roles import FC1_IN, QKV_IN, WEIGHT

CHILD = "compensation"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BITS = 16
READS_HIDDEN = (QKV_IN, FC1_IN)  # sites of a block that have as many channels as its input


class Compensation(nn.Module):
    """x W + b, added to the output of the block that it is a child of. Its tensors are the rewrite's, not the model's.

    Args:
        weight: (C, C) float16.
        bias: (C,) float16.
        channel: the dimension that holds the channels, -1 or 1.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The correction, in x's dtype."""
        rows = x.movedim(self.channel, -1)
        return (rows @ self.weight.to(x.dtype) + self.bias.to(x.dtype)).movedim(-1, self.channel)


def _add(block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    """Forward hook of a block."""
    with torch._C.DisableTorchFunction():  # products of outer owners are counted
        hidden = first(out) + block.get_submodule(CHILD)(_input(args, kwargs))
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _input(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return found


@REWRITES.register("compensate_block")
class CompensateBlockRewrite(Rewrite):
    """Add a linear map of a block's input to its output.

    args: `block`, `channel` (-1 or 1), `rows` (how many the map is applied to for one image); tensors: weight (C, C),
    bias (C,), float16.
    """

    name = "compensate_block"

    def prepare(self, model: nn.Module) -> None:
        """Hang the map on the block.

        Raises:
            InputError: arguments or tensors that do not describe a map.
        """
        weight, bias, channel = self.tensors["weight"], self.tensors["bias"], self.args["channel"]
        if channel not in (-1, 1) or bias.ndim != 1 or weight.shape != (len(bias), len(bias)):
            raise InputError(f"{self.args['block']}: no map of channels: {channel}, {weight.shape}, {bias.shape}")
        block = model.get_submodule(self.args["block"])
        block.add_module(CHILD, Compensation(weight, bias, channel))
        block.register_forward_hook(_add, with_kwargs=True)

    def apply(self, model: nn.Module) -> None:
        """Nothing more: the values came with the structure."""

    def extra_bits(self) -> int:
        """Of weight and bias."""
        return BITS * sum(t.numel() for t in self.tensors.values())

    def extra_macs(self) -> int:
        """Of the product with the weight."""
        return int(self.args["rows"]) * self.tensors["weight"].numel()


@PASSES.register("compensate_blocks")
@final
class CompensateBlocks(Pass):
    """Fit a map for one block after the other, on the quantized and compensated prefix.

    Args:
        ridge: of the regression, in parts of the mean square of the inputs; 0 chooses it for each block among RIDGES,
            by the error on images that were not fitted on (two folds).
        weights_only: make up for what weights lost alone: the float output f is that of float weights with activations
            quantized as they are. Behind a training they have learned to fit these.

    A block that changes the shape of its input, or gains nothing on images that were not fitted on, gets none.
    """

    name = "compensate_blocks"
    slot = "compensate"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "three forwards of the calibration images, one of them in float"

    def __init__(self, ridge: float = 0.0, weights_only: bool = False) -> None:
        if ridge < 0:
            raise CompositionError(f"pass 'compensate_blocks': ridge {ridge} must not be negative")
        self.ridges, self.weights_only = (ridge,) if ridge else RIDGES, weights_only

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without two images, or on a model without blocks."""
        if data is None or data.count < 2:
            raise DataError("compensating blocks needs two calibration images or more; give data= (or --calib)")
        if not qmodel.graph.blocks:
            raise CompositionError("compensating blocks: this model has no repeated transformer blocks")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Compensate every block."""
        assert data is not None
        names = list(qmodel.graph.blocks)
        explained = []
        with progress.task("compensating block by block", len(names)) as task:
            for name, block, inputs in stream_blocks(qmodel, data, names):
                found = self._fit(qmodel, name, block, inputs, data.count)
                if found is not None:
                    qmodel.apply_rewrite(found.rewrite)
                    explained.append(found.explained)
                task.advance()
        qmodel.log["compensate_blocks"] = {
            "blocks": len(explained),
            "kept": len(names) - len(explained),
            "explained": round(sum(explained) / max(len(explained), 1), 4),
        }

    def _fit(self, qmodel: QuantModel, name: str, block: nn.Module, inputs: Store, images: int) -> _Found | None:
        sites = [s for s in qmodel.sites() if s.block == name and (s.role == WEIGHT or not self.weights_only)]
        channels = {s.shape[-1] for s in qmodel.graph.sites.values() if s.block == name and s.role in READS_HIDDEN}
        on = [s for s in sites if qmodel.quantizers[s].state != "off"]
        folds: list[_Regression] = []
        channel = 0
        for item in inputs:
            x = _input(*item)
            quantized = first(call_block(block, item))
            channel = _channel_dim(x, quantized, channels)
            if not channel:
                return None
            qmodel.set_state("off", on)
            try:
                target = first(call_block(block, item))
            finally:
                qmodel.set_state("on", on)
            size = x.shape[channel]
            folds = folds or [_Regression.empty(size, x.device), _Regression.empty(size, x.device)]
            rows, rest = (t.movedim(channel, -1).flatten(0, -2).float() for t in (x, target - quantized))
            half = -(-len(x) // 2) * (len(rows) // len(x))
            folds[0].add(rows[:half], rest[:half])
            folds[1].add(rows[half:], rest[half:])
        return self._solved(name, channel, folds, images)

    def _solved(self, name: str, channel: int, folds: list[_Regression], images: int) -> _Found | None:
        a, b = folds
        spread = a.rest_spread() + b.rest_spread()
        if not a.count or not b.count or not spread:
            return None
        left = [b.error(*a.solve(ridge)) + a.error(*b.solve(ridge)) for ridge in self.ridges]
        best = min(range(len(left)), key=left.__getitem__)
        if left[best] >= spread:
            return None
        weight, bias = (a + b).solve(self.ridges[best])
        halves = {"weight": weight.half(), "bias": bias.half()}
        if not all(bool(t.isfinite().all()) for t in halves.values()):
            return None
        args = {"block": name, "channel": channel, "rows": (a.count + b.count) // images}
        return _Found(CompensateBlockRewrite(args, halves), 1 - left[best] / spread)


@dataclass(frozen=True)
class _Found:
    rewrite: CompensateBlockRewrite
    explained: float  # share of the squared difference, on images that were not fitted on


class _Regression:
    """Fits rest (n, C) by rows (n, C): all it needs are the moments of both side by side."""

    def __init__(self, size: int, moments: Moments) -> None:
        self.size, self.moments = size, moments

    @classmethod
    def empty(cls, size: int, device: torch.device) -> _Regression:
        return cls(size, Moments(2 * size, device))

    def add(self, rows: Tensor, rest: Tensor) -> None:
        self.moments.add(torch.cat([rows, rest], dim=1))

    def __add__(self, other: _Regression) -> _Regression:
        return _Regression(self.size, self.moments + other.moments)

    @property
    def count(self) -> int:
        return self.moments.count

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(W, b) float64."""
        mean = self.moments.mean
        spread = self.moments.matrix - mean.outer(mean)
        x, r = mean[: self.size], mean[self.size :]
        covariance = spread[: self.size, : self.size]
        strength = ridge * covariance.diagonal().mean().clamp(min=1e-30)
        damped = covariance + strength * torch.eye(self.size).to(mean)
        weight = torch.linalg.solve(damped, spread[: self.size, self.size :])
        return weight, r - x @ weight

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Sum of squares that (W, b) leaves: of [x, r] [-W; I] - b."""
        left = torch.cat([-weight, torch.eye(self.size).to(weight)])
        mean = self.moments.mean @ left
        square = (left * (self.moments.matrix @ left)).sum() - 2 * mean @ bias + bias @ bias
        return float(square) * self.count

    def rest_spread(self) -> float:
        """Sum of squares of the rest itself: what is left without a map."""
        return float(self.moments.matrix.diagonal()[self.size :].sum()) * self.count


def _channel_dim(x: Tensor, out: Any, channels: set[int]) -> int:
    """The dimension of the channels in what goes in and out of a block, 0 if there is no such."""
    if not isinstance(out, Tensor) or out.shape != x.shape or not x.is_floating_point():
        return 0
    if x.ndim in (3, 4) and x.shape[-1] in channels:
        return -1
    return 1 if x.ndim == 4 and x.shape[1] in channels else 0
