"""ONNX Runtime: sessions, and what its optimised graph computes in whole numbers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.core.errors import ExportError, MissingExtraError

WHOLE = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"})
WHOLE |= {"QLinearConv", "ConvInteger", "QAttention"}
FLOAT = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Conv", "FusedConv", "ConvTranspose"})
FLOAT |= {"Attention", "MultiHeadAttention"}
SILENT = 4  # what goes wrong is raised, too


def need_packages() -> None:
    """Refuse to begin without the packages of the extra `onnx`.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    import importlib

    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError(name, "onnx", "exporting to ONNX") from error


class Session:
    """A model in ONNX Runtime on the CPU, with as many threads as torch has.

    Args:
        data: the file's bytes.
        optimised: where to write the graph that it makes of it.
        plain: leave the graph as it is.

    Raises:
        ExportError: it cannot load or run the model.
    """

    def __init__(self, data: bytes, optimised: Path | None = None, *, plain: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        options.intra_op_num_threads = torch.get_num_threads()
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        with _told():
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [given.name for given in self.session.get_outputs()]

    def run(self, feeds: dict[str, Any]) -> dict[str, Tensor]:
        """All outputs by name."""
        with _told():
            found = self.session.run(None, feeds)
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime has many kinds, and no common one
        raise ExportError(f"ONNX Runtime cannot run the exported model: {str(error).splitlines()[0]}") from error


def feeds_of(session_inputs: list[str], batch: Any) -> dict[str, Any]:
    """What to feed for one input of the model: its tensors, in order, to the inputs that are the model's own."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return {name: tensor.cpu().numpy() for name, tensor in zip(session_inputs, tensors, strict=False)}


def count_products(data: bytes) -> dict[str, dict[str, int]]:
    """Matrix products of the graph that ONNX Runtime runs: operator -> how many, in `whole` numbers and in `float`."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="vitq.") as folder:
        path = Path(folder) / "optimised.onnx"
        Session(data, path)
        found = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    return {
        kind: {name: count for name, count in sorted(found.items()) if name in names}
        for kind, names in (("whole", WHOLE), ("float", FLOAT))
    }
