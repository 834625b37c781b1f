"""What each dimension of an operand is: batch, head, token or channel; of a weight: channel, in or kernel."""

from __future__ import annotations

from vitq.core import roles
from vitq.graph import flow
from vitq.graph.dims import is_channel, spatial_dims
from vitq.graph.ops import einsum_labels
from vitq.graph.record import Node, Record
from vitq.graph.scores import mixes_heads


def axes_of(record: Record, node: Node, operand: str, role: str) -> tuple[str, ...]:
    """Axes of an operand that exists before the call."""
    kind = node.product.kind if node.product else ""
    shape = record.shapes[node.operands[operand]]
    ndim = len(shape)
    if kind == "einsum":
        return _einsum_axes(record, node, operand, role)
    if role == roles.WEIGHT:
        return _weight_axes(kind, operand, ndim)
    if role in (roles.SCORES, roles.SOFTMAX_OUT) and mixes_heads(record, node):
        heads = ndim - 1 if kind == "linear" else ndim - 3
        return ("batch", *("head" if dim == heads else "token" for dim in range(1, ndim)))
    if kind in ("conv", "convt"):
        spatial = spatial_dims(node)
        return (*("batch",) * (ndim - spatial - 1), "channel", *("token",) * spatial)
    if kind == "mha":  # works on (tokens, batch, channels)
        return ("token", "batch", "channel")[:: 1 if ndim == 3 else 2]
    if kind == "linear":
        return ("batch", *("token",) * (ndim - 2), "channel") if ndim > 1 else ("channel",)
    if ndim == 1:
        return ("channel",)
    if role in (roles.SOFTMAX_OUT, roles.SOFTMAX_MIX):
        value = "rhs" if operand == "lhs" else "lhs"
        over = _last_two(record, node, value, roles.VALUE)[0 if value == "rhs" else 1]
        return (*_front(ndim), over, over)
    return (*_front(ndim), *_last_two(record, node, operand, role))


def inner_axes(record: Record, node: Node, role: str, ndim: int) -> tuple[str, ...]:
    """Axes of an operand that exists only inside a fused attention call."""
    if role == roles.PROJ_IN:
        return ("token", "batch", "channel")  # multi_head_attention_forward works on (tokens, batch, channels)
    last = ("token", "channel")
    if role == roles.SOFTMAX_OUT:
        over = _last_two(record, node, "query", roles.QUERY)[0] if "query" in node.operands else "token"
        last = (over, over)
    return (*_front(ndim), *last)


def summed_dim(record: Record, node: Node, operand: str) -> int:
    """The dimension of an operand that the product sums over, counted from the right."""
    kind = node.product.kind if node.product else ""
    if kind == "einsum":
        own, out = _labels(record, node, operand), einsum_labels(node.args[0], -1, len(record.shapes[node.outputs[0]]))
        gone = [i for i, label in enumerate(own) if label not in out]
        return gone[0] - len(own) if gone else -1
    if kind in ("conv", "convt") and operand == "input":
        return -1 - spatial_dims(node)
    rows = kind == "matmul" and operand == "rhs" and len(record.shapes[node.operands[operand]]) > 1
    return -2 if rows or operand == "value" else -1


def _front(ndim: int) -> tuple[str, ...]:
    front = ndim - 2
    return ("batch",) * max(front - 1, min(front, 1)) + ("head",) * (front > 1)


def _last_two(record: Record, node: Node, operand: str, role: str) -> tuple[str, str]:
    """Token and channel in their order: by where the dimensions came from, else as attention over tokens has them.

    Attention over channels (XCiT, DaViT) multiplies (channel, token) by (token, channel).
    """
    channel = [is_channel(record, node.operands[operand], dim) for dim in (-2, -1)]
    if role != roles.OTHER_IN and channel.count(True) == 1:
        return ("channel", "token") if channel[0] else ("token", "channel")
    # Of the right operand of a score product and the left one of a value product, rows are channels.
    rows_are_channels = operand in ("lhs", "rhs") and (operand == "rhs") != (role == roles.VALUE)
    return ("channel", "token") if rows_are_channels else ("token", "channel")


def _weight_axes(kind: str, operand: str, ndim: int) -> tuple[str, ...]:
    if ndim == 1:
        return ("in",)
    transposed = kind == "convt" or operand == "rhs"
    both = ("in", "channel") if transposed else ("channel", "in")
    if kind == "matmul":
        return (*("head",) * (ndim - 2), *both)
    return (*both, *("kernel",) * (ndim - 2))


def _labels(record: Record, node: Node, operand: str) -> list[str]:
    return einsum_labels(node.args[0], int(operand == "rhs"), len(record.shapes[node.operands[operand]]))


def _einsum_axes(record: Record, node: Node, operand: str, role: str) -> tuple[str, ...]:
    """By label: summed over or not, in both operands or in one."""
    own = _labels(record, node, operand)
    other = _labels(record, node, "lhs" if operand == "rhs" else "rhs")
    out = einsum_labels(node.args[0], -1, len(record.shapes[node.outputs[0]]))
    constant = any(flow.is_constant(record, t) for t in node.operands.values())
    # Summed over in attention: channels of queries and keys, tokens of probabilities and values.
    summed = "token" if role in (roles.SOFTMAX_OUT, roles.SOFTMAX_MIX, roles.VALUE) else "channel"
    kept = "channel" if role == roles.VALUE else "token"
    if role == roles.WEIGHT:
        summed, kept = "in", "channel"
    axes: list[str] = []
    for label in own:
        if label not in out:
            axes.append(summed)
        elif label in other:
            axes.append("head" if role == roles.WEIGHT or "batch" in axes else "batch")
        elif constant and role != roles.WEIGHT:
            axes.append("token" if axes else "batch")
        else:
            axes.append(kept)
    return tuple(axes)
