"""Products as a runtime wants them: whole numbers on both sides, and nothing between them and the product.

ONNX Runtime multiplies whole numbers where both inputs of a MatMul come straight from a DequantizeLinear. So a linear
that is a Gemm becomes a MatMul and a sum, a transposition moves in front of the QuantizeLinear, and a factor of the
dequantized operand (the 1 / sqrt(d) of attention) becomes a part of its scale.
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


def take_gemms_apart(graph: Any) -> None:
    """Gemm(A, B, C) of sites as MatMul(A, B) + C, with B transposed before it where the Gemm did that."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Gemm" or not any(is_mark(value) for value in node.inputs[:2]):
            continue
        numbers = {name: node.attributes[name].value for name in ("alpha", "beta", "transA") if name in node.attributes}
        if numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0 or numbers.get("transA", 0):
            continue
        left, right = node.inputs[:2]
        made = []
        if "transB" in node.attributes and node.attributes["transB"].value:
            made.append(ir.node("Transpose", [right], {"perm": [1, 0]}, name=f"{node.name}_transpose"))
            right = made[-1].outputs[0]
        made.append(ir.node("MatMul", [left, right], name=f"{node.name}_matmul"))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], node.inputs[2]], name=f"{node.name}_add"))
        for one in made:
            one.outputs[0].name = one.name
        result = made[-1].outputs[0]
        result.shape, result.dtype = node.outputs[0].shape, node.outputs[0].dtype
        graph.insert_before(node, made)
        drop(graph, node, result)


def takes_whole_numbers(marked: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether every product that a marked weight enters is a MatMul of more than two dimensions with a fitting mark.

    One of two dimensions becomes a Gemm with its bias, which ONNX Runtime does in whole numbers only if the bias is
    rounded, too.

    Args:
        fits: whether the codes of a mark can be taken as they are.
    """
    value = marked.outputs[0]
    ends = [node.outputs[0] for node in only_consumers(value, "Transpose")] or [value]
    products = [only_consumers(end, "MatMul") for end in ends]
    return all(products) and all(
        len(node.inputs[0].shape) > 2 and node.inputs[1] is end and is_mark(node.inputs[0]) and fits(node.inputs[0])
        for end, nodes in zip(ends, products, strict=True)
        for node in nodes
    )


def fold_factor(graph: Any, dequantize: Any, name: str) -> None:
    """Make the one constant factor that a dequantized value is multiplied with a part of its scale."""
    import onnx_ir as ir

    value = dequantize.outputs[0]
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
