"""Inputs and the simulated model's outputs for them, with which what was written is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.core.batches import default_forward, leading_size, moved
from vitq.core.errors import ExportError
from vitq.core.qmodel import QuantModel
from vitq.core.target import Request
from vitq.export.onnx import SEEDED, seeded


@dataclass(frozen=True)
class Sample:
    """One batch, and what the simulated model makes of it.

    Attributes:
        batch: as the model takes it.
        outputs: its tensors, in order.
        described: where the batch comes from.
        device: of the model.
    """

    batch: Any
    outputs: list[Tensor]
    described: str
    device: torch.device

    @classmethod
    def of(cls, qmodel: QuantModel, request: Request) -> Sample:
        """Run the simulated model on the images of a request, or on random ones.

        Raises:
            ExportError: the model is not frozen.
        """
        if not qmodel.frozen:
            raise ExportError("only a frozen model can be exported; call qmodel.freeze() first")
        if request.data is None:
            batch, described = seeded(qmodel.example), f"{SEEDED} random inputs"
        else:
            batch, described = request.data, request.described or f"{leading_size(request.data)} images given"
        device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
        batch = moved(batch, device)
        return cls(batch, outputs_of(qmodel.eval(), batch), described, device)

    def must_equal(self, model: Callable[..., Any], what: str) -> None:
        """Compare to the bit.

        Raises:
            ExportError: the outputs differ.
        """
        found = outputs_of(model, self.batch)
        if len(found) != len(self.outputs) or not all(map(torch.equal, found, self.outputs)):
            raise ExportError(f"{what} computes something else than the simulated model on {self.described}")


@torch.no_grad()
def outputs_of(model: Any, batch: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(default_forward(model, batch)) if isinstance(leaf, Tensor)]
