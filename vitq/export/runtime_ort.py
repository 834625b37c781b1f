"""ONNX Runtime: sessions, and what its optimised graph computes in whole numbers."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.export.runtime import Products, told_by

NAME = "ONNX Runtime"
WHOLE = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"})
WHOLE |= {"QLinearConv", "ConvInteger", "QAttention"}
FLOAT = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Conv", "FusedConv", "ConvTranspose"})
FLOAT |= {"Attention", "MultiHeadAttention"}
SILENT = 4  # what goes wrong is raised, too


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name, extra = NAME, "onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")

    def session(self, data: bytes | str, *, plain: bool = False) -> OrtSession:
        """Load a file."""
        return OrtSession(data, plain=plain)

    def count_products(self, data: bytes | str, batch: Any) -> Products:
        """Of the optimised graph, which does not depend on what is fed."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="vitq.") as folder:
            path = Path(folder) / "optimised.onnx"
            OrtSession(data, path)
            found = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
        return {
            kind: {name: count for name, count in sorted(found.items()) if name in names}
            for kind, names in (("whole", WHOLE), ("float", FLOAT))
        }


class OrtSession:
    """A model in ONNX Runtime.

    Args:
        data: the file's bytes, or its path.
        optimised: where to write the graph that it makes of it.
        plain: leave the graph as it is.

    Raises:
        ExportError: it cannot load or run the model.
    """

    def __init__(self, data: bytes | str, optimised: Path | None = None, *, plain: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        options.intra_op_num_threads = torch.get_num_threads()
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        with told_by(NAME):
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [given.name for given in self.session.get_outputs()]

    def run(self, feeds: dict[str, Any]) -> dict[str, Tensor]:
        """All outputs by name."""
        with told_by(NAME):
            found = self.session.run(None, feeds)
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))
