"""Mix channels by orthogonal matrices, so that no channel stands out; the model computes the same.

Shapes:  C channels of a stream, D of a head; x -> x R
Formula: streams  rows of producers R^T w, R^T b; columns of consumers c R; added parameters t R; with R 1 = 1
         scores   rows of queries and keys R^T w, R^T b, per head
         values   rows of values R^T w, R^T b, columns behind the attention c R, per head
         Before, scale and shift of a stream's norms go into the weights behind them, W diag(gamma) and b + W beta, and
         factors on the way to a stream (layer scale) into the weight before them. A LayerNorm without scale and shift
         commutes with any orthogonal R that keeps the mean of the channels, as it takes away the mean and divides by
         a length: it need not become an RMSNorm.
Source:  QuaRot, arXiv 2404.00456, section 4, and SliceGPT, arXiv 2401.15024, section 3 (for RMSNorm, without R 1 = 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from vitq.calibrate.channels import free_channels
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.graph.channels import Scores, Stream, Values
from vitq.passes.reparam.heads import RotateHeads, part_arguments, part_names
from vitq.passes.reparam.orthogonal import mean_keeping, random_flat
from vitq.passes.reparam.tensors import Trial, give_bias, require_unfitted, store


@REWRITES.register("rotate_stream")
@final
class RotateStream(Rewrite):
    """x becomes x R wherever the stream is. The float output is unchanged.

    Args:
        args: width, seed; producers (weight, bias, gate), consumers (weight, bias, norm), shifts (name, dim), and
            norms: name -> (weight, bias); all names of parameters or None.
        tensors: none; the seed decides.
    """

    name = "rotate_stream"

    @classmethod
    def of(cls, stream: Stream, seed: int) -> RotateStream:
        """The rewrite of a stream that was found."""
        norms = {name: number for number, name in enumerate(stream.norms)}
        consumers = [
            {"weight": c.weight, "bias": c.bias, "norm": None if c.norm is None else norms[c.norm]}
            for c in stream.consumers
        ]
        args = {
            "width": stream.width,
            "seed": seed,
            "producers": [{"weight": p.weight, "bias": p.bias, "gate": p.gate} for p in stream.producers],
            "consumers": consumers,
            "shifts": [{"name": name, "dim": dim} for name, dim in stream.shifts],
            "norms": [{"weight": weight, "bias": bias} for weight, bias in stream.norms.values()],
        }
        return cls(args, {})

    def parameters(self) -> list[str]:
        """Those that it changes."""
        entries = [entry for kind in ("producers", "consumers", "shifts", "norms") for entry in self.args[kind]]
        return [value for entry in entries for value in entry.values() if isinstance(value, str)]

    def prepare(self, model: nn.Module) -> None:
        """Give a zero bias to weights behind a norm that have none, to take up the norm's shift."""
        for entry in (*self.args["consumers"], *self.args["producers"]):
            if entry["bias"] is not None:
                give_bias(model, entry["weight"], entry["bias"])

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Change parameters in place; arithmetic in float64, rounded once."""
        width = self.args["width"]
        matrix = mean_keeping(random_flat(width, self.args["seed"])[0])

        def turned(values: Tensor, dim: int) -> Tensor:
            rows = values.movedim(dim, -1)
            mixed = rows.reshape(*rows.shape[:-1], -1, width) @ matrix.to(values.device)
            return mixed.reshape(rows.shape).movedim(-1, dim)

        for consumer in self.args["consumers"]:
            weight = model.get_parameter(consumer["weight"])
            wide = weight.double()
            if consumer["norm"] is not None:
                norm = self.args["norms"][consumer["norm"]]
                wide = self._behind_norm(model, wide, norm, consumer["bias"])
            store(weight, turned(wide, 1))
        for producer in self.args["producers"]:
            factor = None if producer["gate"] is None else model.get_parameter(producer["gate"])
            for name in (producer["weight"], producer["bias"]):
                if name is not None:
                    parameter = model.get_parameter(name)
                    wide = parameter.double()
                    if factor is not None:
                        wide = wide * factor.double().reshape(-1, *(1,) * (wide.ndim - 1))
                    store(parameter, turned(wide, 0))
            if factor is not None:
                factor.data.fill_(1.0)
        for shift in self.args["shifts"]:
            parameter = model.get_parameter(shift["name"])
            store(parameter, turned(parameter.double(), shift["dim"]))
        for norm in self.args["norms"]:
            for name, value in ((norm["weight"], 1.0), (norm["bias"], 0.0)):
                if name is not None:
                    model.get_parameter(name).data.fill_(value)

    def _behind_norm(self, model: nn.Module, wide: Tensor, norm: dict[str, Any], bias: str | None) -> Tensor:
        """A weight with the scale of the norm before it in its columns; the shift goes into the bias."""
        tokens = wide.shape[1]  # of which several may lie side by side
        if norm["bias"] is not None and bias is not None:
            shift = model.get_parameter(norm["bias"]).double()
            parameter = model.get_parameter(bias)
            sums = wide.flatten(2).sum(2) if wide.ndim > 2 else wide
            store(parameter, parameter.double() + sums @ shift.repeat(tokens // len(shift)))
        if norm["weight"] is None:
            return wide
        scale = model.get_parameter(norm["weight"]).double()
        return wide * scale.repeat(tokens // len(scale)).reshape(-1, *(1,) * (wide.ndim - 2))


@PASSES.register("rotate")
@final
class Rotate(Pass):
    """Give every set of channels whose basis is free an orthogonal matrix with entries of nearly one size.

    Args:
        streams: mix the channels of residual streams (R1).
        scores: of the queries and keys of each head (R2).
        values: of the values of each head (R3).
        needed: refuse a model of which nothing can be rotated; else it is left as it is, and the log says so.

    Where the channels go is found by following them (graph/channels); what is found is tried on one image, and taken
    back where the output changes. The log says how many of each were rotated and taken back, and what was in the way of
    the others (of streams: norms are counted).
    """

    name = "rotate"
    slot = "rewrite"
    drops = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "a forward of one image for each matrix: one per stream and two per attention"

    def __init__(self, streams: bool = True, scores: bool = True, values: bool = True, needed: bool = True) -> None:
        if not (streams or scores or values):
            raise CompositionError("pass 'rotate': nothing to rotate; switch on streams, scores or values")
        self.kinds = {"streams": streams, "scores": scores, "values": values}
        self.needed = needed

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("rotating channels needs calibration images, to see that nothing changes; give data= "
                            "(or --calib)")  # fmt: skip

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Rotate whatever can be.

        Raises:
            CompositionError: nothing of the model can be, and that is needed.
        """
        assert data is not None
        require_unfitted(qmodel, self.name)
        found = free_channels(qmodel, data)
        draw = torch.Generator().manual_seed(qmodel.plan.seed)
        rewrites: list[tuple[str, Rewrite, list[str]]] = []
        # Heads first: a stream may give a bias to weights that had none when heads were found.
        several: dict[str, Sequence[Stream | Scores | Values]] = {
            "scores": found.scores,
            "values": found.values,
            "streams": found.streams,
        }
        for kind, all_of_kind in several.items():
            # Drawn for what is switched off as well, so that the others keep their matrices.
            seeds = torch.randint(2**31, (len(all_of_kind),), generator=draw).tolist()
            rewrites += [(kind, *rewrite_of(one, seed)) for one, seed in zip(all_of_kind, seeds, strict=True)]
        trial = Trial(qmodel, data)
        rotated, undone = dict.fromkeys(self.kinds, 0), dict.fromkeys(self.kinds, 0)
        chosen = [entry for entry in rewrites if self.kinds[entry[0]]]
        with progress.task("rotating", len(chosen)) as task:
            for kind, rewrite, names in chosen:
                (rotated if trial.keeps(rewrite, names) else undone)[kind] += 1
                task.advance()
        left = {kind: reasons for kind, reasons in found.left.items() if reasons}
        if self.needed and not any(rotated.values()):
            raise CompositionError(
                f"nothing of this model can be rotated: {sum(undone.values())} matrices would have changed its output, "
                f"and these are in the way of others: {left or 'it has no norms and no attention'}; leave it out"
            )
        qmodel.log["rotate"] = {"rotated": rotated, "undone": undone, "left": left}


def rewrite_of(found: Stream | Scores | Values, seed: int) -> tuple[Rewrite, list[str]]:
    """The rewrite of what was found, and the parameters that it changes."""
    if isinstance(found, Stream):
        whole = RotateStream.of(found, seed)
        return whole, whole.parameters()
    rows = (found.queries, found.keys) if isinstance(found, Scores) else found.rows
    columns = () if isinstance(found, Scores) else found.columns
    parts, tensors = part_arguments([*((part, 0) for part in rows), *((part, 1) for part in columns)])
    heads = RotateHeads({"seed": seed, "parts": parts}, tensors)
    return heads, part_names(heads)
