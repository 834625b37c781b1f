"""The way from a score product through softmax to a value product, also where heads are mixed on it."""

from __future__ import annotations

from vitq.graph import flow
from vitq.graph.dims import origin, spatial_dims
from vitq.graph.record import Node, Record

_SCORE_STEPS = flow.ADDS | flow.MASKS


def is_attention(record: Record, node: Node) -> bool:
    """Whether a product is one of an attention's own (not its projections)."""
    if node.product is None or node.unsupported:
        return False
    if node.product.kind in ("sdpa", "mha"):
        return True
    if node.product.kind not in ("matmul", "einsum"):
        return False
    return softmax_dim_after(record, node) is not None or any(
        is_softmax(record, t) or is_mixed_softmax(record, t) for t in node.operands.values()
    )


def softmax_dim_after(record: Record, node: Node) -> int | None:
    """Over which dimension of its result a softmax runs, if one does: then the node is a score product."""
    through = flow.ends(record, node.outputs[0], _SCORE_STEPS, lambda n: mixes_heads(record, n))
    for end, tensor in through:
        if end.name in flow.SOFTMAX:
            dims = [a for a in end.args[1:2] if isinstance(a, int)]
            return dims[0] if dims else int(end.kwargs.get("dim", -1))
        if end.product is not None and end.product.kind == "sdpa" and tensor not in end.operands.values():
            return -1  # added to the scores as a mask
    return None


def is_softmax(record: Record, tensor: int) -> bool:
    """Whether a tensor holds attention probabilities: those of one softmax, or a weighted mean of several."""
    if any(n.name in flow.SOFTMAX for n in flow.sources(record, tensor)):
        return True
    parts = flow.sources(record, tensor, flow.ADDS, lambda n: _normalises(record, n))
    return any(n.name in flow.SOFTMAX for n in parts) and all(n.name in flow.SOFTMAX | {"sum"} for n in parts)


def is_mixed_softmax(record: Record, tensor: int) -> bool:
    """Whether a tensor holds attention probabilities mixed over heads, which may be negative."""
    return any(mixes_heads(record, n) and is_softmax(record, n.operands["input"]) for n in flow.sources(record, tensor))


def mixes_heads(record: Record, node: Node) -> bool:
    """Whether a linear or a 1x1 convolution works on the head dimension of scores or probabilities."""
    if node.product is None or node.unsupported or node.constant:
        return False
    tensor = node.operands.get("input")
    if tensor is None:
        return False
    ndim = len(record.shapes[tensor])
    if node.product.kind == "linear":
        dim = ndim - 1
    elif node.product.kind == "conv" and set(record.shapes[node.operands["weight"]][2:]) == {1}:
        dim = ndim - 1 - spatial_dims(node)
    else:
        return False
    found = origin(record, tensor, dim)
    if found is None or found[0].product is None:
        return False
    made, at = found
    if made.product is not None and made.product.kind in ("matmul", "einsum"):
        both = [t for t in made.operands.values() if not flow.is_constant(record, t)]
        return len(both) == 2 and at < len(record.shapes[made.outputs[0]]) - 2
    # Mixed a second time, behind the softmax: its channels are the heads that the first mixing gave.
    channel = len(record.shapes[made.outputs[0]]) - (1 if made.name == "linear" else 3)
    return at == channel and mixes_heads(record, made)


def _normalises(record: Record, node: Node) -> bool:
    """Whether a node divides a tensor by a sum over itself."""
    if node.name not in flow.DIVISIONS or len(node.inputs) != 2:
        return False
    sums = [n for n in flow.sources(record, node.inputs[1]) if n.name == "sum"]
    return any(node.inputs[0] in n.inputs for n in sums)
