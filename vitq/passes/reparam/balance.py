"""Share the difficulty of each input channel between activations and weights, so that one scale serves all channels.

Shapes:  x (n, C) inputs    W (O, C) weight    s (C,) steps of the channels of x, t (C,) of those of W
Formula: r = (s / mean s)**(1 - alpha) / (t / mean t)**alpha
         after a norm  x' = (x - low) / r + mean low, where low (C,) is what the channels of x begin at
         elsewhere     x' = x / r, with m (C,) the largest |x| of the channels, max(m / mean m, 1) as s / mean s,
                       and r >= 1
         W' = W r; alpha = argmin |Q(x') Q(W')^T - x' W'^T|^2
Source:  NormQuant of UQ-ViT, AAAI 2026; formulas from the official code, jiujiuwei/UQ-ViT at 3d7d4bb

Differs from the official code in the criterion (it compares the outputs of the block), and in that a division which
nothing before the linear can take up is only done where it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from vitq.calibrate.capture import switched_off, watching
from vitq.calibrate.linears import linears
from vitq.calibrate.sample import Places
from vitq.calibrate.search import Search
from vitq.calibrate.values import ValuePath, value_paths
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.format import Format
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.roles import FC2_IN, PROJ_IN, WEIGHT
from vitq.passes.reparam.input_scale import DivideInputRewrite
from vitq.passes.reparam.norm_scale import constant_channels, fold
from vitq.passes.reparam.value_scale import FoldValueScaleRewrite
from vitq.quantizers.base import Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

# The alphas of the official code; None leaves the channels as they are.
AFTER_NORM: tuple[float | None, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
ELSEWHERE = (None, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STEP_BITS = 4  # of columns, whose steps matter in proportion only
WHOLE = Search("minmax")


@PASSES.register("balance_channels")
@final
class BalanceChannels(Pass):
    """Turn per-channel scales of linears' inputs into one scale, by ratios that the model and the weights take up.

    Args:
        rows: how many rows of each input are looked at, evenly spread over the images.
        method: how the input's range is chosen while alphas are tried (calibrate/search.py); that of the fit behind it.
            Weights get their whole range then, which takes a tenth of the time.
        flow: the rows are those of the quantized model as it is ("prefix"), or of the float model ("parallel").

    What takes up a ratio: the LayerNorm before the linear; the value projection, where the linear is behind an
    attention (calibrate/values.py); behind an activation function a division at run time, whose multiplications are
    counted. The formats say what is wanted: only inputs with channel scales are balanced. Those for which nothing takes
    up a ratio get one scale as they are, and are counted. All scales must be fitted again.
    """

    name = "balance_channels"
    slot = "fit"
    needs = frozenset({ACT_SCALES})
    drops = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "one forward of the calibration images, and a search that takes about as long"

    def __init__(self, rows: int = 256, method: str = "percentile_mse", flow: str = "prefix") -> None:
        if rows < 1:
            raise CompositionError(f"pass 'balance_channels': rows {rows} must be at least 1")
        if flow not in ("prefix", "parallel"):
            raise CompositionError(f"pass 'balance_channels': unknown flow {flow!r}; use prefix or parallel")
        self.rows, self.flow = rows, flow
        self.search = Search(method, exact=True)

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if _per_channel(qmodel) and (data is None or data.count == 0):
            raise DataError("balancing channels needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Balance every input with channel scales, and forget all scales."""
        sites = _per_channel(qmodel)
        targets = _targets(qmodel, data) if data is not None and sites else []
        if data is not None:
            self._watch(qmodel, targets, data)
        alphas: dict[str, float | None] = {}
        with progress.task("balancing channels", len(targets)) as task:
            for target in targets:
                alphas[target.inputs[0]] = target.balance(self.search)
                task.advance()
        for site in sites:
            _one_scale(qmodel, site)
        for every in qmodel.sites():
            quantizer = qmodel.quantizers[every]
            quantizer.unfit()
            quantizer.state = "on" if quantizer.fitted else "off"  # what needs no fit stays on
        kept = len(sites) - sum(len(target.inputs) for target in targets)
        extra = sum(target.extra for target in targets if alphas[target.inputs[0]] is not None)
        qmodel.log["balance_channels"] = {"kept": kept, "alphas": alphas, "extra_multiplications": extra}

    def _watch(self, qmodel: QuantModel, targets: list[_Target], data: Batches) -> None:
        """Give the targets rows of their inputs."""
        places = Places(self.rows, data.count)
        sites = [qmodel.graph.sites[target.inputs[0]] for target in targets]
        with watching(qmodel, sites) if self.flow == "prefix" else switched_off(qmodel, sites):
            for target, site in zip(targets, sites, strict=True):
                qmodel.quantizers[site].observer = partial(_look, target.rows, places)
            for batch, images in zip(data, data.sizes, strict=True):
                if targets and places.at(images):
                    data.forward(qmodel.model, batch)


def _look(rows: list[Tensor], places: Places, quantizer: object, x: Tensor) -> None:
    flat = x.detach().reshape(-1, x.shape[-1])
    rows.append(flat[places.chosen(len(flat))].float())


@dataclass
class _Target:
    """Inputs that share one ratio, and the weights that they are multiplied with.

    Attributes:
        inputs: site ids; the first is that of fewest bits.
        quantizer: that of the first input, with channel scales.
        weights: as matrices, each with its quantizer, None where it is left float.
        change: rewrites the model by ratio and shift, (C,) float64 each.
        alive: (C,) which channels are not constant.
        after_norm: a LayerNorm takes up the ratio, and a shift as well.
        extra: multiplications for one image at run time that the change takes.
        rows: of the first input, to try on.
    """

    inputs: list[str]
    quantizer: UniformQuantizer
    weights: list[tuple[Tensor, Quantizer | None]]
    change: Callable[[Tensor, Tensor], None]
    alive: Tensor
    after_norm: bool = False
    extra: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def balance(self, search: Search) -> float | None:
        """Rewrite the model by the best ratio; its alpha. Without rows to try on, all channels stay as they are."""
        x, weights = torch.cat(self.rows), [(w * self.alive, quantizer) for w, quantizer in self.weights]
        if not len(x):
            return None
        steps = _steps_of_columns(torch.cat([w for w, _ in weights]), search)
        some_quantized = any(quantizer is not None for _, quantizer in weights)
        # Weights in float need no relief: what is left to them costs nothing.
        grid = [a for a in (AFTER_NORM if self.after_norm else ELSEWHERE) if some_quantized or not a]
        best = None
        for alpha in grid:
            ratio, shift = self.ratio(alpha, steps)
            balanced = ((x + shift) / ratio).masked_fill(~self.alive, 0.0)
            error = _error(balanced, [(w * ratio, quantizer) for w, quantizer in weights], self.quantizer, search)
            if best is None or error < best[0]:
                best = error, alpha, ratio, shift
        assert best is not None
        _, alpha, ratio, shift = best
        if alpha is not None:
            self.change(ratio.double(), shift.double())
        return alpha

    def ratio(self, alpha: float | None, weight_steps: Tensor) -> tuple[Tensor, Tensor]:
        """Ratio and shift (C,): x' = (x + shift) / ratio."""
        scale, zero_point = (self.quantizer.params()[name].reshape(-1) for name in ("scale", "zero_point"))
        low = -zero_point * scale
        if alpha is None:
            return torch.ones_like(scale), torch.zeros_like(scale)
        weight_part = self._in_parts_of_mean(weight_steps) ** alpha
        if self.after_norm:
            ratio = self._in_parts_of_mean(scale) ** (1 - alpha) / weight_part
            return ratio, ratio * low[self.alive].mean() - low
        largest = torch.maximum(low.abs(), (low + scale * (2**self.quantizer.bits - 1)).abs())
        ratio = (largest / largest.mean()).clamp(min=1) ** (1 - alpha) / weight_part
        return ratio.clamp(min=1), torch.zeros_like(ratio)

    def _in_parts_of_mean(self, steps: Tensor) -> Tensor:
        """Constant channels have no part in it."""
        return torch.where(self.alive, steps / steps[self.alive].mean(), 1.0)


def _steps_of_columns(w: Tensor, search: Search) -> Tensor:
    """(C,) steps that the columns of a weight would have, each alone."""
    columns = UniformQuantizer(STEP_BITS, Layout((-1,), (w.shape[1],), 1), symmetric=True)
    search.fit(columns, w)
    return columns.params()["scale"].reshape(-1).to(w.device)


def _error(x: Tensor, weights: list[tuple[Tensor, Quantizer | None]], like: Quantizer, search: Search) -> float:
    """Mean squared error of the outputs with one scale for the input; weights as they are quantized."""
    quantizer = copy.deepcopy(like)
    quantizer.observer = None
    quantizer.relayout(Layout())
    search.fit(quantizer, x)
    seen, total = quantizer.quantized(x), 0.0
    for w, weight_quantizer in weights:
        used = w
        if weight_quantizer is not None:
            WHOLE.fit(weight_quantizer, w)
            used = weight_quantizer.quantized(w)
        total += float((seen @ used.T - x @ w.T).square().sum(dtype=torch.float64))
    return total


# -- what is balanced, and by what ----------------------------------------------------------------------------


def _per_channel(qmodel: QuantModel) -> list[str]:
    """Activation sites with uniform channel scales."""
    found = [s.id for s in qmodel.sites() if s.role != WEIGHT and qmodel.formats[s.id].per == "channel"]
    return [site for site in found if isinstance(qmodel.quantizers[site], UniformQuantizer)]


def _one_scale(qmodel: QuantModel, site: str) -> None:
    quantizer, old = qmodel.quantizers[site], qmodel.formats[site]
    assert isinstance(quantizer, UniformQuantizer)
    quantizer.relayout(Layout())
    qmodel.formats[site] = Format(old.kind, old.bits, "tensor", old.options)


def _targets(qmodel: QuantModel, data: Batches) -> list[_Target]:
    """What takes up a ratio, with the inputs that are balanced by it."""
    wanted = set(_per_channel(qmodel))
    found = []
    for pair in qmodel.graph.pairs:
        inputs = sorted((s for s in pair.inputs if s in wanted), key=lambda s: qmodel.formats[s].bits)
        if inputs:
            dead = constant_channels(qmodel, pair)
            change = partial(fold, qmodel, pair, dead=dead)
            found.append(_target(qmodel, inputs, pair.weights, change, alive=~dead, after_norm=True))
    behind_attention = wanted & {site.id for site in qmodel.graph.with_roles(PROJ_IN)}
    sites_of = {site.param: site.id for site in qmodel.graph.sites.values()}
    for name, path in (value_paths(qmodel, data) if behind_attention else {}).items():
        if name in wanted:
            found.append(_target(qmodel, [name], [sites_of[path.weight]], partial(_fold_values, qmodel, path)))
    for linear in linears(qmodel):
        site = linear.input
        if site.id in wanted and site.role == FC2_IN and site.op == "linear" and linear.module is not None:
            change = partial(_divide, qmodel, linear.module)
            values = torch.Size(site.shape).numel() // qmodel.graph.example_images
            found.append(_target(qmodel, [site.id], [linear.weight.id], change, extra=values))
    return found


def _target(
    qmodel: QuantModel,
    inputs: list[str],
    weights: Sequence[str],
    change: Callable[[Tensor, Tensor], None],
    alive: Tensor | None = None,
    **more: Any,
) -> _Target:
    quantizer = qmodel.quantizers[inputs[0]]
    assert isinstance(quantizer, UniformQuantizer)
    matrices: list[tuple[Tensor, Quantizer | None]] = []
    for site in weights:
        weight = qmodel.weight(site)
        assert weight is not None
        found = copy.deepcopy(qmodel.quantizers[site]) if site in qmodel.quantizers else None
        assert found is None or isinstance(found, Quantizer)
        matrices.append((weight.data.float(), found))
    if alive is None:
        alive = torch.ones_like(quantizer.scale.reshape(-1), dtype=torch.bool)
    return _Target(inputs, quantizer, matrices, change, alive, **more)


def _fold_values(qmodel: QuantModel, path: ValuePath, ratio: Tensor, shift: Tensor) -> None:
    args = {"weight": path.weight, "value": path.value, "bias": path.bias}
    qmodel.apply_rewrite(FoldValueScaleRewrite(args, {"rows": path.rows, "ratio": ratio.float()}))


def _divide(qmodel: QuantModel, module: str, ratio: Tensor, shift: Tensor) -> None:
    qmodel.apply_rewrite(DivideInputRewrite({"module": module}, {"ratio": ratio.float()}))
