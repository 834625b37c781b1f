"""The model as ONNX with one `Site` node at every site: where formats go, before they are there.

`torch.onnx.ops.symbolic` is torch's way to put a node of any name into an exported graph. It takes one value and gives
one of the same shape; its attributes say which site it is, and the how manieth use of that site in one forward.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.core.errors import ExportError, InputError, VitqError
from vitq.core.qmodel import QuantModel
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer

DOMAIN = "vitq.site"
OPSET = 21  # the first with 4-bit tensors; what torch's exporter writes may not be older
EXPORT_BATCH = 2  # torch.export takes a size of one for a constant


class Uses:
    """How often each site was used so far in this forward."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def next(self, site: str) -> int:
        """Number of this use, from zero."""
        self.count[site] += 1
        return self.count[site] - 1


def to_marked(qmodel: QuantModel, example: Any) -> Any:
    """Export a copy of the model, whose sites are marked.

    Args:
        example: one input, a tensor, a mapping of keyword arguments or a tuple of arguments.

    Returns:
        An onnx_ir.Model of OPSET with a dynamic batch.

    Raises:
        ExportError: torch cannot export the model, or not for every batch size.
    """
    marked = copy.deepcopy(qmodel)
    uses = Uses()
    for site in marked.sites():
        quantizer = marked.quantizers[site]
        assert isinstance(quantizer, AnyQuantizer)
        quantizer.baked = False  # so that the site of a weight is in the graph, too
        quantizer.forward = _Mark(site.id, quantizer, uses)
    batch = torch.export.Dim("batch")
    example = pytree.tree_map(twice, example)
    args, kwargs = arguments(example)
    shapes = pytree.tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.ndim else None, kwargs or args)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own future
        try:
            program = torch.export.export(
                marked.model.eval(),
                args,
                kwargs,
                dynamic_shapes=shapes,
                strict=False,
            )
            names: Any = {"input_names": ["images"], "output_names": ["output"]} if isinstance(example, Tensor) else {}
            exported: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
        except VitqError:
            raise
        except Exception as error:  # torch raises errors of many kinds
            raise ExportError(
                f"torch could not export this model for every batch size: {reason_of(error)}; does its forward depend "
                f"on values, on the number of images, or use an operator that ONNX has not?"
            ) from error
    return exported.model


class _Mark:
    """Stands for a quantizer's forward while the model is exported."""

    def __init__(self, site: str, quantizer: AnyQuantizer, uses: Uses) -> None:
        self.site, self.quantizer, self.uses = site, quantizer, uses

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise InputError(f"{self.site} has values of type {x.dtype}; export takes float32 models: model.float()")
        # A dynamic format has no levels to write down: its own arithmetic is exported, and the mark says where it ends.
        x = x if isinstance(self.quantizer, Quantizer) else self.quantizer.quantized(x)
        attributes: Any = {"site": self.site, "use": self.uses.next(self.site)}
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Site", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1
        )
        return marked


def reason_of(error: BaseException) -> str:
    """The first line of what an error of torch began with: it wraps them into advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model for one input."""
    if isinstance(batch, dict):
        return (), {name: value for name, value in batch.items() if name not in ("label", "labels")}
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}


def twice(value: Any) -> Any:
    """A tensor's first example as a batch of EXPORT_BATCH; other values as they are."""
    return (
        value[:1].repeat(EXPORT_BATCH, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
    )
