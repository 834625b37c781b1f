"""OpenVINO: sessions on the CPU, and what its compiled graph computes in whole numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from vitq.export.runtime import Products, feeds_of, told_by
from vitq.export.signed import COLUMNS, ROWS

NAME = "OpenVINO"
PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "GroupConvolution", "Deconvolution"})
FUSED = "Subgraph"  # several operators in one kernel, among them the two products of attention
SOURCE = frozenset({"MatMul"})  # what of a model can be inside of a fused kernel
BYTES = ("i8", "u8")


class OpenVino:
    """OpenVINO on the CPU."""

    name, extra = NAME, "openvino"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "openvino")

    def session(self, data: bytes | str, *, plain: bool = False) -> OpenVinoSession:
        """Load a file; constants are folded anyway, so `plain` makes no difference."""
        return OpenVinoSession(data)

    def count_products(self, data: bytes | str, batch: Any) -> Products:
        """Of the graph that was compiled for the shapes of this input, after it went through."""
        session = OpenVinoSession(data, batch)
        session.run(feeds_of(session.inputs, batch))
        return session.products()


class OpenVinoSession:
    """A model in OpenVINO, in float32 where it is not of whole numbers.

    Without these settings it takes bfloat16 where the processor has it, and rounds float operands of 4- and 8-bit
    weights to bytes.

    Args:
        data: bytes of an ONNX file, or the path of a file.
        batch: compile for inputs of these shapes, else for free ones.

    Raises:
        ExportError: it cannot load or run the model.
    """

    def __init__(self, data: bytes | str, batch: Any = None) -> None:
        with told_by(NAME):
            model = read(data)
            self.inputs = [port.get_any_name() for port in model.inputs]
            if batch is not None:
                model.reshape({name: list(given.shape) for name, given in feeds_of(self.inputs, batch).items()})
            names = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() in SOURCE}
            self.products_of_source = {name for name in names if not name.endswith((ROWS, COLUMNS))}
            self.compiled = core().compile_model(model, "CPU", exact())

    def run(self, feeds: dict[str, Any]) -> dict[str, Tensor]:
        """All outputs by name."""
        with told_by(NAME):
            found = self.compiled(feeds)
            # One output may have several names: two sites can have the same value.
            return {
                name: torch.from_numpy(found[port].copy())
                for port in self.compiled.outputs
                for name in port.get_names()
            }

    def products(self) -> Products:
        """Matrix products of the compiled graph; a fused kernel counts for each product in it."""
        whole, other = Counter[str](), Counter[str]()
        for node in self.compiled.get_runtime_model().get_ops():
            about = node.get_rt_info()
            kind = _told(about, "layerType")
            names = _told(about, "originalLayersNames").split(",")
            inside = set(names) & self.products_of_source
            if not inside and (_one_column(node) or any(sums in name for name in names for sums in (ROWS, COLUMNS))):
                continue
            if kind in PRODUCTS:
                # `runtimePrecision` speaks of operands as they are stored, `primitiveType` of the kernel.
                (whole if _told(about, "primitiveType").lower().endswith(BYTES) else other)[kind] += 1
            elif kind == FUSED and inside:
                of_bytes = min(len(inside), _in_bytes(node))
                whole[kind] += of_bytes
                other[kind] += len(inside) - of_bytes
        return {name: dict(sorted((+found).items())) for name, found in (("whole", whole), ("float", other))}


def _one_column(node: Any) -> bool:
    """As sums have; OpenVINO forgets the names of some."""
    shape = node.output(0).get_partial_shape()
    return bool(shape[len(shape) - 1] == 1)


def _in_bytes(fused: Any) -> int:
    """Products of bytes in a fused kernel: two with queries, keys and values in bytes, one with some of them.

    The left operand of a second product is made inside. What is made bytes inside counts as float: nothing tells.
    """
    given = [_told(port.get_source_output().get_node().get_rt_info(), "outputPrecisions") for port in fused.inputs()]
    return (sum(kind.split(",")[0] in BYTES for kind in given) + 1) // 2


def _told(about: Any, key: str) -> str:
    return str(about[key].astype(str)) if key in about else ""


def core() -> Any:
    """OpenVINO's entry; it keeps plugins loaded by itself."""
    import openvino

    return openvino.Core()


def read(data: bytes | str) -> Any:
    """An openvino.Model of an ONNX file's bytes, or of a path."""
    import io

    return core().read_model(io.BytesIO(data) if isinstance(data, bytes) else data)


def exact() -> dict[str, Any]:
    """Settings under which floats are float32 throughout, with as many threads as torch has."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
