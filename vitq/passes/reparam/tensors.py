"""What rewrites of weights share: biases that were missing, values in the parameter's own type, and a trial."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.batches import Batches, first_of
from vitq.core.errors import CompositionError
from vitq.core.qmodel import QuantModel
from vitq.core.rewrite import Rewrite
from vitq.quantizers.base import Quantizer


def store(parameter: Tensor, value: Tensor) -> None:
    """Write values, rounded once to the parameter's type."""
    parameter.data.copy_(value.to(parameter.dtype))


def bias_beside(weight: str) -> str:
    """What the bias beside a weight is called."""
    module, _, name = weight.rpartition(".")
    bias = "in_proj_bias" if name == "in_proj_weight" else "bias"
    return f"{module}.{bias}" if module else bias


def give_bias(model: nn.Module, weight: str, bias: str) -> None:
    """A zero bias for the owner of a weight, if there is none of that name."""
    module, _, name = bias.rpartition(".")
    owner = model.get_submodule(module)
    if getattr(owner, name, None) is None:
        like = model.get_parameter(weight)
        setattr(owner, name, nn.Parameter(torch.zeros(like.shape[0], dtype=like.dtype, device=like.device)))


class Trial:
    """Applies rewrites, and takes back those after which the model computes something else.

    With quantizers off, the output for one image must stay the same up to rounding: half of the digits.
    """

    def __init__(self, qmodel: QuantModel, data: Batches) -> None:
        self.qmodel, self.data = qmodel, data
        self.example = first_of(next(iter(data)))
        self.wanted = self._outputs()

    def keeps(self, rewrite: Rewrite, names: Iterable[str]) -> bool:
        """Apply a rewrite of these parameters; whether it stays applied."""
        model, touched = self.qmodel.model, set(names)
        before = {name: p.data.clone() for name, p in model.named_parameters() if name in touched}
        self.qmodel.apply_rewrite(rewrite)
        digits = max(torch.finfo(value.dtype).eps for value in before.values())
        if all(_close(a, b, digits**0.5) for a, b in zip(self._outputs(), self.wanted, strict=True)) and self.wanted:
            return True
        self.qmodel.rewrites.pop()
        for name in touched:
            if name in before:
                model.get_parameter(name).data.copy_(before[name])
            else:
                module, _, bias = name.rpartition(".")
                setattr(model.get_submodule(module), bias, None)
        return False

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        out = self.data.forward(self.qmodel.model, self.example)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [leaf.clone() for leaf in leaves]


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def require_unfitted(qmodel: QuantModel, name: str) -> None:
    """Refuse to change what sites see after their scales were chosen.

    Raises:
        CompositionError: some are.
    """
    quantizers = [qmodel.quantizers[site] for site in qmodel.sites()]
    if any(isinstance(q, Quantizer) and q.fitted for q in quantizers):  # dynamic formats choose as they go
        raise CompositionError(f"pass {name!r} changes what scales are chosen from; put it before the first fit")
