"""Roles from data flow: what fed an operand, and where the product goes. No module or parameter names."""

from __future__ import annotations

from vitq.core import roles
from vitq.graph import flow
from vitq.graph.dims import merges_tokens, spatial_dims
from vitq.graph.ops import einsum_labels
from vitq.graph.record import Node, Record
from vitq.graph.scores import is_attention, is_mixed_softmax, is_softmax, mixes_heads, softmax_dim_after

_AFFINE = frozenset({"batch_norm"})


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
    if role in (roles.QUERY, roles.KEY, roles.OTHER_IN) and flow.is_constant(record, tensor):
        # Computed from parameters: a transposed or normalised one, or a table of relative positions.
        return roles.WEIGHT, None
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
    if is_softmax(record, tensor):
        return roles.SOFTMAX_OUT
    if is_mixed_softmax(record, tensor):
        return roles.SOFTMAX_MIX
    if is_softmax(record, other) or is_mixed_softmax(record, other):
        return roles.VALUE
    dim = softmax_dim_after(record, node)
    if dim is None:
        return roles.OTHER_IN
    # Softmax runs over keys: over the last dimension of a matmul they come from the right operand.
    ndim = len(record.shapes[node.outputs[0]])
    keys = "rhs" if dim in (-1, ndim - 1) else "lhs"
    if node.product is not None and node.product.kind == "einsum":
        label = einsum_labels(node.args[0], -1, ndim)[dim]
        own = einsum_labels(node.args[0], 1, len(record.shapes[node.operands["rhs"]]))
        keys = "rhs" if label in own else "lhs"
    return roles.KEY if operand == keys else roles.QUERY


def _input_role(record: Record, node: Node, tensor: int) -> tuple[str, str | None]:
    """Role of the activation operand of a product with a weight."""
    convolution = node.product is not None and node.product.kind in ("conv", "convt")
    out = node.outputs[0]
    if mixes_heads(record, node):
        return (roles.SOFTMAX_OUT if is_softmax(record, tensor) else roles.SCORES), None
    ends = flow.ends(record, out, _AFFINE, lambda n: _is_depthwise(record, n))
    projects = not convolution and any(_feeds_attention(record, end, number) for end, number in ends)
    if not flow.touched_by_product(record, tensor):
        # Embedded text goes to its projections untouched.
        return (roles.QKV_IN if projects else roles.PATCH_IN), None
    if _comes_from_attention(record, tensor):
        return roles.PROJ_IN, None
    activation = _activation(record, flow.sources(record, tensor))
    if activation is not None and not convolution:
        return roles.FC2_IN, activation
    if convolution:
        return roles.CONV_IN, None
    if projects:
        return roles.QKV_IN, None
    if any(_is_activation(end) or _gates(record, end) for end, _ in ends):
        return roles.FC1_IN, None
    if flow.reaches_output_alone(record, out):
        return roles.HEAD_IN, None
    return (roles.MERGE_IN if merges_tokens(record, tensor) else roles.OTHER_IN), None


def _comes_from_attention(record: Record, tensor: int) -> bool:
    """Whether a tensor is what a value product gave, also with something added to it (LePE) or normalised (sub-LN)."""

    def gave_it(made: Node, apart: bool) -> bool:
        # multi_head_attention_forward holds its projection: a sum with its result is the residual stream.
        projected = made.product is not None and made.product.kind == "mha"
        return not (projected and apart) and is_attention(record, made) and softmax_dim_after(record, made) is None

    return any(
        gave_it(made, bool(extra))
        for extra in (frozenset[str](), flow.ADDS, flow.NORMS)
        for made in flow.sources(record, tensor, extra)
    )


def _is_depthwise(record: Record, node: Node) -> bool:
    """Whether a node is a convolution of each channel by itself."""
    if node.product is None or node.product.kind != "conv" or node.unsupported:
        return False
    shape = record.shapes[node.operands["input"]]
    channels, (outputs, inputs, *_) = shape[-1 - spatial_dims(node)], record.shapes[node.operands["weight"]]
    return inputs == 1 and outputs == channels > 1


def _feeds_attention(record: Record, end: Node, number: int) -> bool:
    if _takes(record, end, number):
        return True
    # Normalised or rotated queries and keys (SwinV2, DINOv3) go on to the score product.
    return (
        end.name in (flow.NORMS | flow.ADDS | flow.SCALES | {"normalize", "cat", "stack"})
        and any(
            _takes(record, later, into)
            for out in end.outputs
            for later, into in flow.ends(record, out, flow.ADDS | flow.SCALES | flow.NORMS | {"normalize"})
        )
        and not _is_residual(record, end)
    )


def _takes(record: Record, end: Node, number: int) -> bool:
    """Whether an attention takes a tensor as an operand (and not as its mask)."""
    return number in end.operands.values() and is_attention(record, end)


def _is_residual(record: Record, end: Node) -> bool:
    """Whether a sum joins two ways that both depend on the input: the residual stream."""
    return (
        end.name in flow.ADDS
        and sum(not flow.is_constant(record, n) for n in set(end.inputs)) > 1
        and any(consumer.name in flow.NORMS for n in end.outputs for consumer in record.consumers.get(n, []))
    )


def _is_activation(node: Node) -> bool:
    return node.name in flow.ACTIVATIONS


def _gates(record: Record, node: Node) -> bool:
    """Whether a product of elements is x * sigmoid(a x), or one side of act(a) * b."""
    if node.name not in flow.SCALES:
        return False
    return _gates_itself(record, node) or any(
        _is_activation(made) for t in node.inputs for made in flow.sources(record, t)
    )


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
