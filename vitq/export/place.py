"""Products as a runtime wants them: whole numbers on both sides, and nothing between them and the product.

ONNX Runtime multiplies whole numbers where both inputs of a MatMul come straight from a DequantizeLinear. So a
transposition moves in front of the QuantizeLinear (edit.py), and a factor of the dequantized operand (the 1 / sqrt(d)
of attention) becomes a part of its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vitq.export.edit import drop, only_consumers
from vitq.export.marked import DOMAIN


def is_mark(value: Any) -> bool:
    """Whether a value comes from a site."""
    node = None if value is None else value.producer()
    return node is not None and node.domain == DOMAIN


def enters_float(marked: Any, flat: bool = False) -> bool:
    """Whether a product reads a mark for which the runtime has no kernel that takes bytes and gives floats.

    So it is with convolutions. ONNX Runtime has none for products of two dimensions, either: between a DequantizeLinear
    and a QuantizeLinear it would round the weight once more, and the bias with it.

    Args:
        flat: products of two dimensions have such a kernel.
    """
    readers = [use.node for use in marked.outputs[0].uses()]
    return any(
        node.op_type in ("Conv", "ConvTranspose")
        or (not flat and (node.op_type == "Gemm" or (node.op_type == "MatMul" and _ndim(node) < 3)))
        for node in readers
    )


def _ndim(node: Any) -> int:
    shapes = [value.shape for value in (*node.inputs, *node.outputs)]
    return max((len(shape) for shape in shapes if shape is not None), default=0)


def takes_whole_numbers(marked: Any, fits: Callable[[Any], bool], flat: bool = False) -> bool:
    """Whether every product that a marked weight enters is a MatMul with a mark on the left that fits.

    Args:
        fits: whether the codes of a mark can be taken as they are.
        flat: a Gemm will do, too.
    """
    value = marked.outputs[0]
    ends = [node.outputs[0] for node in only_consumers(value, "Transpose")] or [value]
    products = [only_consumers(end, "MatMul") or (only_consumers(end, "Gemm") if flat else []) for end in ends]
    return all(products) and all(
        node.inputs[1] is end and is_mark(node.inputs[0]) and fits(node.inputs[0])
        for end, nodes in zip(ends, products, strict=True)
        for node in nodes
    )


def dequantized(value: Any) -> Any:
    """The DequantizeLinear that a value comes from, itself or transposed, if any."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and len(list(node.inputs[0].uses())) == 1:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def fold_factor(graph: Any, value: Any, name: str) -> None:
    """Make the one constant factor that a dequantized value is multiplied with a part of its scale."""
    import onnx_ir as ir

    dequantize = dequantized(value)
    nodes = only_consumers(value, "Mul")
    if len(nodes) != 1 or nodes[0].inputs[0] is nodes[0].inputs[1]:
        return
    (other,) = (given for given in nodes[0].inputs if given is not value)
    factor, scale = (ir.convenience.get_const_tensor(given) for given in (other, dequantize.inputs[1]))
    if factor is None or scale is None or factor.size != 1 or len(factor.shape) > len(value.shape):
        return
    scaled = np.asarray(scale.numpy() * factor.numpy().reshape(()), np.float32)
    if not (np.isfinite(scaled).all() and (scaled > 0).all()):
        return
    new = ir.Value(name=name, const_value=ir.tensor(scaled, name=name), type=ir.TensorType(ir.DataType.FLOAT))
    new.shape = ir.Shape(scaled.shape)
    graph.register_initializer(new)
    dequantize.replace_input_with(1, new)
    drop(graph, nodes[0], value)
