"""Products in signed bytes, for runtimes whose kernels know no zero-point on the right side of a product.

OpenVINO multiplies whole numbers where the right operand is a signed byte whose zero is real zero, and where the left
one has a zero-point only beside constant weights. So codes are shifted, `stored = code - shift`, and what is lost is
added behind the product. With a = a' + alpha and b = b' + beta, of which a' and b' have their zero at `stored = 0`:

    a b = a' b' + alpha colsum(b') + rowsum(a') beta + K alpha beta        K: how many products are summed

Codes of fewer than eight bits fit as they are (shift = zero-point, alpha = 0), so do those with zero in the middle. The
sums are of bytes and small beside the product. What is the same for a whole row is left out in front of a softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitq.core.qmodel import QuantModel
from vitq.export.edit import SHIFT, SITE, initializer, only_consumers
from vitq.export.place import dequantized
from vitq.quantizers.base import Quantizer

MIDDLE = 128  # what makes a signed byte of an unsigned one
LOW, HIGH = -128, 127
BYTE = 8
ROWS, COLUMNS = "sums_of_rows", "sums_of_columns"  # in names of products that are none of the model's


# By the value that a product reads: the initializer that its real values are above those of its stored codes, a scalar,
# or (O,) of a weight with O output channels.
Rests = dict[Any, Any]


def shift_of(zero_point: int, bits: int) -> int:
    """What is taken from codes so that they are signed bytes, with zero at zero if they all fit then."""
    return zero_point if bits < BYTE else MIDDLE


def sign_operands(graph: Any, qmodel: QuantModel) -> Rests:
    """Shift the codes of operands that meet one another in products; gives what that takes from each.

    An operand on the left may stay unsigned where its zero is code zero, as that of probabilities is.
    """
    rests: Rests = {}
    for node in [n for n in graph if n.op_type == "MatMul" and not n.domain]:
        left, right = node.inputs
        if not (_is_activation(left) and _is_activation(right)):
            continue
        if not (_only_feeds_products(left) and _only_feeds_products(right)):
            continue
        if not _signed(right):
            rests |= _shift(graph, right, qmodel)
        if not _signed(left) and _zero_point(left, qmodel):
            rests |= _shift(graph, left, qmodel)
    return {value: rest for value, rest in rests.items() if rest.const_value.numpy().any()}


def add_rests(graph: Any, rests: Rests) -> None:
    """Behind every product, add what its operands have lost."""
    for node in [n for n in graph if n.op_type in ("MatMul", "Gemm") and not n.domain]:
        terms = _terms(graph, node, rests)
        if terms:
            _add(graph, node, terms)


def _is_activation(value: Any) -> bool:
    node = dequantized(value)
    before = None if node is None else node.inputs[0].producer()
    return before is not None and before.op_type == "QuantizeLinear"


def _only_feeds_products(value: Any) -> bool:
    """Whether all that reads a value is products with other activations, with a known number of terms each."""
    nodes = only_consumers(value, "MatMul")
    return bool(nodes) and all(_inner(node) and all(map(_is_activation, node.inputs)) for node in nodes)


def _inner(node: Any) -> int | None:
    """How many products are summed, if that is known."""
    shape = node.inputs[1].shape
    size = None if shape is None or len(shape) < 2 else shape[-2]
    return size if isinstance(size, int) else None


def _quantizer(value: Any, qmodel: QuantModel) -> Quantizer:
    found = qmodel.quantizers[dequantized(value).metadata_props[SITE]]
    assert isinstance(found, Quantizer)
    return found


def _zero_point(value: Any, qmodel: QuantModel) -> int:
    return int(_quantizer(value, qmodel).params()["zero_point"])


def _signed(value: Any) -> bool:
    return SHIFT in dequantized(value).inputs[0].producer().metadata_props


def _shift(graph: Any, value: Any, qmodel: QuantModel) -> Rests:
    """Make the codes of a pair signed ones; gives what its values lose."""
    dequantize = dequantized(value)
    quantize = dequantize.inputs[0].producer()
    zero_point = _zero_point(value, qmodel)
    shift = shift_of(zero_point, _quantizer(value, qmodel).bits)
    signed = initializer(graph, f"{quantize.inputs[2].name}_signed", np.array(zero_point - shift, np.int8))
    quantize.replace_input_with(2, signed)
    dequantize.replace_input_with(2, initializer(graph, "zero", np.array(0, np.int8)))
    quantize.metadata_props[SHIFT] = str(shift)
    quantize.outputs[0].dtype = signed.dtype
    lost = np.float32(shift - zero_point) * dequantize.inputs[1].const_value.numpy()
    return {value: initializer(graph, f"{value.name}/rest", np.asarray(lost, np.float32))}


def _terms(graph: Any, node: Any, rests: Rests) -> list[Any]:
    left, right = node.inputs[:2]
    alpha, beta = rests.get(left), rests.get(right)
    terms = []
    if alpha is not None:
        terms.append(_sums(graph, node, right, -2, alpha))
    if beta is not None and not _enters_softmax(node):
        terms.append(_sums(graph, node, left, -1, beta))
        if alpha is not None:
            both = np.float32(_inner(node)) * alpha.const_value.numpy() * beta.const_value.numpy()
            terms.append(initializer(graph, f"{node.name}/rest", np.asarray(both, np.float32)))
    return terms


def _enters_softmax(node: Any) -> bool:
    """Whether a softmax over each row is all that reads a product: what is the same in a row then changes nothing."""
    value = node.outputs[0]
    while True:
        following = [use.node for use in value.uses()]
        if len(following) != 1 or value.is_graph_output():
            return False
        (after,) = following
        if after.op_type == "Softmax" and not after.domain:
            axis = after.attributes["axis"].as_int() if "axis" in after.attributes else -1
            return axis in (-1, len(value.shape) - 1)
        if not (after.op_type in ("Add", "Identity") and not after.domain):
            return False
        value = after.outputs[0]


def _sums(graph: Any, product: Any, of: Any, axis: int, times: Any) -> Any:
    """The sums of a value along an axis, kept as one of size 1, times what the other operand lacks.

    They are products with ones: OpenVINO 2026.4 reads memory that nobody wrote where a ReduceSum of bytes takes over
    the zero-point (parity found it).
    """
    name = f"{product.name}/{COLUMNS if axis == -2 else ROWS}"
    transpose = of.producer() if of.producer().op_type == "Transpose" else None
    back: dict[str, Any] = {}
    if transpose is not None and (order := list(transpose.attributes["perm"].as_ints()))[axis] == len(order) - 1:
        # The transposition is to remain a part of the product: sum what comes before it.
        of, axis, back = transpose.inputs[0], -1, {"perm": order}
    if axis == -1:
        stored = initializer(graph, f"ones/{of.shape[-1]}", np.ones((of.shape[-1], 1), np.int8))
        one = initializer(graph, "one", np.array(1, np.float32))
        ones = _insert(graph, product, "DequantizeLinear", [stored, one], f"{name}_of")
        sums = _insert(graph, product, "MatMul", [of, ones], name)
    else:
        ones = initializer(graph, f"ones/1,{of.shape[-2]}", np.ones((1, of.shape[-2]), np.float32))
        sums = _insert(graph, product, "MatMul", [ones, of], name)
    if back:
        sums = _insert(graph, product, "Transpose", [sums], f"{name}_in_order", back)
    return _insert(graph, product, "Mul", [sums, times], f"{name}_times_rest")


def _add(graph: Any, node: Any, terms: list[Any]) -> None:
    import onnx_ir as ir

    product = node.outputs[0]
    uses = list(product.uses())
    value = product
    for number, term in enumerate(terms):
        made = ir.node("Add", [value, term], name=f"{node.name}/with_rest_{number}", num_outputs=1)
        graph.insert_after(value.producer(), made)
        value = made.outputs[0]
        value.name, value.shape, value.dtype = made.name, product.shape, product.dtype
    for use in uses:
        use.node.replace_input_with(use.idx, value)
    for number, output in enumerate(graph.outputs):
        if output is product:
            graph.outputs[number] = value


def _insert(
    graph: Any, before: Any, kind: str, inputs: list[Any], name: str, attributes: dict[str, Any] | None = None
) -> Any:
    import onnx_ir as ir

    made = ir.node(kind, inputs, attributes or {}, name=name, num_outputs=1)
    made.outputs[0].name = name
    graph.insert_before(before, made)
    return made.outputs[0]
