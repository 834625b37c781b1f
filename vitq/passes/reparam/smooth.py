"""Move the differences between channels from activations into weights, or from queries into keys.

Shapes:  X tokens (n, C), W (O, C); the same letters for what is inside of a head
Formula: s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha);  X / s and W diag(s)
         behind a norm      X / s by the norm's scale and shift, W of all linears behind it
         values             X / s by the rows that make the values, W the columns behind the attention
         queries and keys   X the queries, W the keys: rows of one are divided by s, of the other multiplied with it
Source:  SmoothQuant, arXiv 2211.10438, section 4; values as in Outlier Suppression+, arXiv 2304.09145, section 3.1
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.calibrate.capture import watch_parallel
from vitq.calibrate.channels import free_channels, inputs_of
from vitq.calibrate.linears import watchable
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.site import NormLinear, Site
from vitq.graph.channels import Part, Scores, Values
from vitq.passes.reparam.heads import ScaleHeads, part_arguments, part_names
from vitq.passes.reparam.norm_scale import FoldNormScaleRewrite
from vitq.passes.reparam.tensors import Trial, bias_beside, require_unfitted


@PASSES.register("smooth_channels")
@final
class SmoothChannels(Pass):
    """Divide every channel of an activation by a factor, and multiply the weight behind it with the same.

    Args:
        alpha: how much of the difference moves: 0 makes the weights' channels equal, 1 the activations'.
        norms: behind LayerNorms, all of whose output goes to linears.
        values: between the values of an attention and the linear behind it.
        scores: between queries and keys.

    Channels that are zero in all images, or in the weights, keep their scale (relative to the others: the factors have
    a geometric mean of 1, which no format with one scale notices). Values and scores are found by following channels
    (graph/channels) and tried on one image. The log says how many were smoothed, and what was in the way of others.
    """

    name = "smooth_channels"
    slot = "rewrite"
    drops = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "one forward of the calibration images, and one of one image for each attention product"

    def __init__(self, alpha: float = 0.5, norms: bool = True, values: bool = True, scores: bool = True) -> None:
        if not 0 <= alpha <= 1:
            raise CompositionError(f"pass 'smooth_channels': alpha {alpha} must be in [0, 1]")
        if not (norms or values or scores):
            raise CompositionError("pass 'smooth_channels': nothing to smooth; switch on norms, values or scores")
        self.alpha = alpha
        self.norms, self.values, self.scores = norms, values, scores

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("smoothing channels needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Smooth whatever can be.

        Raises:
            CompositionError: nothing of the model can be.
        """
        assert data is not None
        require_unfitted(qmodel, self.name)
        pairs = qmodel.graph.pairs if self.norms else ()
        found = free_channels(qmodel, data)
        inputs = inputs_of(qmodel.graph)
        values = [v for v in found.values if self.values and all(part.weight in inputs for part in v.columns)]
        scores = [s for s in found.scores if self.scores and all(_is_linear(inputs, p) for p in (s.queries, s.keys))]
        seen = self._watch(qmodel, data, progress, pairs, values, scores, inputs)
        trial = Trial(qmodel, data)
        log = {"norms": 0, "values": 0, "scores": 0, "undone": 0}
        every: list[Values | Scores] = [*values, *scores]
        for one in every:
            rewrite = self._heads(qmodel, one, seen, inputs)
            kept = trial.keeps(rewrite, part_names(rewrite))
            log[("values" if isinstance(one, Values) else "scores") if kept else "undone"] += 1
        for pair in pairs:
            self._fold(qmodel, pair, seen[pair.inputs[0]].entering)
            log["norms"] += 1
        left = {kind: reasons for kind, reasons in found.left.items() if reasons and kind != "norms"}
        if not log["norms"] + log["values"] + log["scores"]:
            raise CompositionError(
                f"nothing of this model can be smoothed: no LayerNorm gives all of its output to linears, and these "
                f"are in the way of its attentions: {left or 'it has none'}; leave it out"
            )
        qmodel.log["smooth_channels"] = log | {"left": left}

    def _watch(
        self,
        qmodel: QuantModel,
        data: Batches,
        progress: Progress,
        pairs: tuple[NormLinear, ...],
        values: list[Values],
        scores: list[Scores],
        inputs: dict[str, Site],
    ) -> dict[str, _Largest]:
        """Site -> what was the largest there."""
        seen = {pair.inputs[0]: _Largest() for pair in pairs}
        for part in (part for v in values for part in v.columns):
            weight = qmodel.model.get_parameter(part.weight)
            seen.setdefault(inputs[part.weight].id, _Largest()).dim = 1 - weight.ndim
        for part in (part for s in scores for part in (s.queries, s.keys)):
            bias = None if part.bias is None else qmodel.model.get_parameter(part.bias)
            linear = qmodel.model.get_parameter(part.weight), bias
            seen.setdefault(inputs[part.weight].id, _Largest()).linears[part.weight] = linear
        sites = [qmodel.graph.sites[site] for site in seen]
        with watchable(qmodel, sites):
            watch_parallel(qmodel, sites, lambda site: seen[site.id], data, progress)
        return seen

    def _fold(self, qmodel: QuantModel, pair: NormLinear, largest: Tensor) -> None:
        weights = [str(qmodel.graph.sites[site].param) for site in pair.weights]
        columns = torch.stack([qmodel.model.get_parameter(w).abs().amax(0) for w in weights]).amax(0)
        ratio = self._ratio(largest, columns).float()
        biases = [bias or bias_beside(weight) for weight, bias in zip(weights, pair.biases, strict=True)]
        tensors = {"ratio": ratio, "shift": torch.zeros_like(ratio), "dead": torch.zeros_like(ratio, dtype=torch.bool)}
        qmodel.apply_rewrite(FoldNormScaleRewrite({"norm": pair.norm, "weights": weights, "biases": biases}, tensors))

    def _heads(
        self, qmodel: QuantModel, found: Values | Scores, seen: dict[str, _Largest], inputs: dict[str, Site]
    ) -> ScaleHeads:
        divided: tuple[Part, ...]
        multiplied: tuple[Part, ...]
        if isinstance(found, Scores):
            divided, multiplied, dim = (found.queries,), (found.keys,), 0
            x, w = (seen[inputs[p.weight].id].leaving[p.weight][_index(p)] for p in (found.queries, found.keys))
        else:
            divided, multiplied, dim = found.rows, found.columns, 1
            x = _largest([seen[inputs[p.weight].id].entering[_index(p)] for p in multiplied])
            weights = [qmodel.model.get_parameter(p.weight).transpose(0, 1).flatten(1).abs() for p in multiplied]
            w = _largest([weight.amax(1)[_index(p)] for weight, p in zip(weights, multiplied, strict=True)])
        parts, tensors = part_arguments([*((p, 0) for p in divided), *((p, dim) for p in multiplied)])
        numbers = list(range(len(divided), len(parts)))
        return ScaleHeads({"parts": parts, "multiplied": numbers}, tensors | {"ratio": self._ratio(x, w).float()})

    def _ratio(self, x: Tensor, w: Tensor) -> Tensor:
        """s of the formula, with a geometric mean of 1."""
        live = (x > 0) & (w > 0)
        logs = self.alpha * x.double().log() - (1 - self.alpha) * w.double().log()
        centre = logs[live].mean() if bool(live.any()) else 0.0
        return torch.where(live, logs - centre, 0.0).exp()


class _Largest:
    """The largest absolute value of every channel of a site, and of what linears make of it."""

    def __init__(self) -> None:
        self.dim = -1
        self.entering = torch.zeros(())
        self.linears: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.leaving: dict[str, Tensor] = {}

    def observe(self, x: Tensor, images: int) -> None:
        self.entering = torch.maximum(self.entering.to(x.device), _by_channel(x, self.dim))
        for name, (weight, bias) in self.linears.items():
            out = _by_channel(F.linear(x, weight, bias), -1)
            self.leaving[name] = torch.maximum(self.leaving.get(name, out), out)

    def finish(self) -> None:
        return


def _by_channel(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, -1).reshape(-1, x.shape[dim]).abs().amax(0).float()


def _largest(several: list[Tensor]) -> Tensor:
    return torch.stack(several).amax(0)


def _index(part: Part) -> Tensor:
    return torch.tensor(part.index)


def _is_linear(inputs: dict[str, Site], part: Part) -> bool:
    return part.weight in inputs and inputs[part.weight].op in ("linear", "mha")
