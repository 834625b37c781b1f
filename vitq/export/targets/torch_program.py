"""`--to torch`: the simulated model as a program of torch.export, which `torch.export.load` runs without vitq.

Every format is standard operators in it; weights are decoded floats, so the file is as large as the float model. A
mapping that the model gives (transformers') becomes a plain dict: reading the file must not need its class.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.batches import first_of
from vitq.core.errors import ExportError, InputError, VitqError
from vitq.core.files import write_bytes
from vitq.core.qmodel import QuantModel
from vitq.core.target import TARGETS, Request, Target, Written
from vitq.export.marked import arguments, reason_of, twice
from vitq.export.onnx import check_place
from vitq.export.same import Sample

ENDING = ".pt2"


class TorchProgram(Target):
    """A file of torch.export."""

    def check(self, out: Path) -> None:
        """Refuse a place where no file can be written, or another ending than torch takes."""
        check_place(out, f"model{ENDING}")
        if out.suffix != ENDING:
            raise InputError(f"{out}: programs of torch.export are called *{ENDING}; name it {out.with_suffix(ENDING)}")

    def write(self, qmodel: QuantModel, request: Request) -> Written:
        """Outputs of the file that is read back must be equal to the bit, at another batch size than its own."""
        if isinstance(qmodel.example, dict) and "list" in qmodel.example:
            raise InputError(
                "this model takes a list of images of their own sizes, as torchvision's detectors do; one tensor of a "
                "free batch size is what is exported. Quantize and export its backbone as a model by itself"
            )
        sample = Sample.of(qmodel, request)
        written = _program(qmodel, first_of(sample.batch))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own future
            again = torch.export.load(io.BytesIO(written))
            _check_operators(again)
            sample.must_equal(again.module(), "the program that was read back")
        write_bytes(request.out, written)
        lines = (
            f"{request.out}: {len(written) / 1e6:.2f} MB, for torch.export.load of torch {torch.__version__}",
            f"read back, outputs are those of the simulated model to the bit ({sample.described})",
        )
        return Written(request.out, len(written), lines, {"torch": torch.__version__, "data": sample.described})


class _Plain(nn.Module):
    """The model with outputs that any Python can read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _plain(self.model(*args, **kwargs))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value


def _program(qmodel: QuantModel, example: Any) -> bytes:
    batch = torch.export.Dim("batch")
    args, kwargs = arguments(pytree.tree_map(twice, example))
    given: Any = {"kwargs": kwargs} if kwargs else {"args": args}
    shapes = pytree.tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.ndim else None, given)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = _Plain(copy.deepcopy(qmodel.model).eval())
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            file = io.BytesIO()
            torch.export.save(program, file)
        except VitqError:
            raise
        except Exception as error:  # torch raises errors of many kinds
            raise ExportError(
                f"torch could not export this model for every batch size: {reason_of(error)}; does its forward depend "
                f"on values, or on the number of images?"
            ) from error
    return file.getvalue()


def _check_operators(program: Any) -> None:
    """Only what torch itself has may be in the file."""
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    found = {node.target for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    if foreign := sorted({str(op) for op in found if op.namespace not in ("aten", "prims")}):
        raise ExportError(
            f"the program needs operators that come with other packages: {', '.join(foreign[:5])}; load the model with "
            f"another implementation of them (transformers: attn_implementation='sdpa')"
        )


TARGETS.register("torch")(TorchProgram())
