"""Roles from data flow: what fed an operand, and where the product goes. No module or parameter names."""

from __future__ import annotations

from vitq.core import roles
from vitq.graph import flow
from vitq.graph.ops import einsum_labels
from vitq.graph.record import Node, Record

_AFFINE = frozenset({"batch_norm"})
_SCORE_STEPS = flow.ADDS | flow.MASKS


def operand_role(record: Record, node: Node, operand: str, tensor: int) -> tuple[str, str | None]:
    """Role of an operand of a product, and the activation function that produced it if that matters."""
    if tensor in record.params or operand.endswith("weight"):
        return roles.WEIGHT, None
    kind = node.product.kind if node.product else ""
    if kind in ("linear", "conv", "convt"):
        return _input_role(record, node, tensor)
    if kind == "mha":
        return roles.QKV_IN, None
    if kind == "sdpa":
        return {"query": roles.QUERY, "key": roles.KEY, "value": roles.VALUE}[operand], None
    other = next(t for name, t in node.operands.items() if name != operand)
    if other in record.params:
        return _input_role(record, node, tensor)
    role = _matmul_role(record, node, operand, tensor, other)
    if role == roles.OTHER_IN and flow.is_constant(record, tensor):
        return roles.WEIGHT, None  # computed from parameters: a transposed or normalised one
    if role == roles.OTHER_IN and flow.is_constant(record, other):
        return _input_role(record, node, tensor)
    return role, None


def inner_role(operand: str) -> str:
    """Role of an operand that exists only inside a fused attention call."""
    return {
        "query": roles.QUERY,
        "key": roles.KEY,
        "softmax": roles.SOFTMAX_OUT,
        "value": roles.VALUE,
        "out_input": roles.PROJ_IN,
    }[operand]


def _matmul_role(record: Record, node: Node, operand: str, tensor: int, other: int) -> str:
    if _is_softmax(record, tensor):
        return roles.SOFTMAX_OUT
    if _is_softmax(record, other):
        return roles.VALUE
    dim = _softmax_dim_after(record, node)
    if dim is None:
        return roles.OTHER_IN
    # Softmax runs over keys: over the last dimension of a matmul they come from the right operand.
    ndim = len(record.shapes[node.outputs[0]])
    keys = "rhs" if dim in (-1, ndim - 1) else "lhs"
    if node.product is not None and node.product.kind == "einsum":
        label = einsum_labels(node.args[0], -1, ndim)[dim]
        keys = "rhs" if label in _labels(record, node, "rhs") else "lhs"
    return roles.KEY if operand == keys else roles.QUERY


def _is_softmax(record: Record, tensor: int) -> bool:
    return any(n.name in flow.SOFTMAX for n in flow.sources(record, tensor))


def _softmax_dim_after(record: Record, node: Node) -> int | None:
    for end, _ in flow.ends(record, node.outputs[0], extra=_SCORE_STEPS):
        if end.name in flow.SOFTMAX:
            dims = [a for a in end.args[1:2] if isinstance(a, int)]
            return dims[0] if dims else int(end.kwargs.get("dim", -1))
    return None


def is_attention(record: Record, node: Node) -> bool:
    """Whether a product is one of an attention's own (not its projections)."""
    if node.product is None or node.unsupported:
        return False
    if node.product.kind in ("sdpa", "mha"):
        return True
    if node.product.kind not in ("matmul", "einsum"):
        return False
    return _softmax_dim_after(record, node) is not None or any(_is_softmax(record, t) for t in node.operands.values())


def _input_role(record: Record, node: Node, tensor: int) -> tuple[str, str | None]:
    """Role of the activation operand of a product with a weight."""
    if not flow.touched_by_product(record, tensor):
        return roles.PATCH_IN, None
    convolution = node.product is not None and node.product.kind in ("conv", "convt")
    made_by = flow.sources(record, tensor)
    activation = _activation(record, made_by)
    out = node.outputs[0]
    if any(is_attention(record, n) for n in made_by):
        return roles.PROJ_IN, None
    if activation is not None and not convolution:
        return roles.FC2_IN, activation
    if convolution:
        return roles.CONV_IN, None
    ends = [end for end, _ in flow.ends(record, out, extra=_AFFINE)]
    if any(_feeds_attention(record, end) for end in ends):
        return roles.QKV_IN, None
    if any(_is_activation(end) or _gates_itself(record, end) for end in ends):
        return roles.FC1_IN, None
    if flow.reaches_output_alone(record, out):
        return roles.HEAD_IN, None
    width = record.shapes[tensor][-1]
    normalised = [n for n in made_by if n.name in flow.NORMS]
    if normalised:
        behind = [shape for n in normalised for shape in flow.shapes_back(record, n.inputs[0])]
        behind += flow.shapes_back(record, tensor)
        if any(shape and shape[-1] < width for shape in behind):
            return roles.MERGE_IN, None
    return roles.OTHER_IN, None


def _feeds_attention(record: Record, end: Node) -> bool:
    if is_attention(record, end):
        return True
    # Normalised or rotated queries and keys (SwinV2, DINOv3) go on to the score product.
    return (
        end.name in (flow.NORMS | flow.ADDS | flow.SCALES | {"normalize", "cat", "stack"})
        and any(
            is_attention(record, later)
            for out in end.outputs
            for later, _ in flow.ends(record, out, extra=flow.ADDS | flow.SCALES | flow.NORMS | {"normalize"})
        )
        and not _is_residual(record, end)
    )


def _is_residual(record: Record, end: Node) -> bool:
    """Whether a sum joins two ways that both depend on the input: the residual stream."""
    return (
        end.name in flow.ADDS
        and sum(not flow.is_constant(record, n) for n in set(end.inputs)) > 1
        and any(consumer.name in flow.NORMS for n in end.outputs for consumer in record.consumers.get(n, []))
    )


def _is_activation(node: Node) -> bool:
    return node.name in flow.ACTIVATIONS


def _gates_itself(record: Record, node: Node) -> bool:
    """Whether a product of elements is x * sigmoid(a x)."""
    if node.name not in flow.SCALES:
        return False
    gates = [n for t in node.inputs for n in flow.sources(record, t) if n.name == "sigmoid"]
    behind = [made for gate in gates for made in flow.sources(record, gate.inputs[0])]
    beside = [made for t in node.inputs for made in flow.sources(record, t) if made not in gates]
    return bool(behind) and behind == beside


def _activation(record: Record, made_by: list[Node]) -> str | None:
    for node in made_by:
        if _is_activation(node):
            return flow.ACTIVATIONS[node.name]
        if _gates_itself(record, node):
            return "quick_gelu"
        if node.name in flow.SCALES:  # a gate: silu(a) * b
            for tensor in node.inputs:
                gate = [n for n in flow.sources(record, tensor) if _is_activation(n)]
                if gate:
                    return {"silu": "swiglu", "gelu": "geglu"}.get(flow.ACTIVATIONS[gate[0].name], "glu")
    return None


def axes_of(record: Record, node: Node, operand: str, role: str, ndim: int) -> tuple[str, ...]:
    """What each dimension of an operand is."""
    kind = node.product.kind if node.product else ""
    if kind == "einsum":
        return _einsum_axes(record, node, operand, role)
    if role == roles.WEIGHT:
        return _weight_axes(kind, operand, ndim)
    if kind in ("conv", "convt"):
        spatial = int(node.name.removesuffix("d")[-1])  # conv2d, conv_transpose2d
        return (*("batch",) * (ndim - spatial - 1), "channel", *("token",) * spatial)
    if kind == "mha":  # works on (tokens, batch, channels)
        return ("token", "batch", "channel")[:: 1 if ndim == 3 else 2]
    if kind == "linear":
        return ("batch", *("token",) * (ndim - 2), "channel") if ndim > 1 else ("channel",)
    if ndim == 1:
        return ("channel",)
    last = ("token", "token")
    if role != roles.SOFTMAX_OUT:
        # Of the right operand of a score product and the left one of a value product, rows are channels.
        rows_are_channels = (operand == "rhs") != (role == roles.VALUE)
        last = ("channel", "token") if rows_are_channels and operand in ("lhs", "rhs") else ("token", "channel")
    front = ndim - 2
    return ("batch",) * max(front - 1, min(front, 1)) + ("head",) * (front > 1) + last


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
    summed = "token" if role in (roles.SOFTMAX_OUT, roles.VALUE) else "channel"
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
