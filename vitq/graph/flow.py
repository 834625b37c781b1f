"""Questions about data flow on a recorded forward: what made this tensor, where does it go.

"Through" an operation means that values pass it unchanged or merely moved, or scaled by a constant.
"""

from __future__ import annotations

from collections.abc import Callable

from vitq.graph.record import Node, Record

Also = Callable[[Node], bool]  # what else values go through
# Values are moved, copied or dropped, never mixed.
MOVES = frozenset(
    {
        *("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "flip", "roll", "pad"),
        *("clone", "detach", "to", "float", "half", "bfloat16", "type", "type_as", "requires_grad_"),
        *("T", "mT", "data", "__setitem__", "copy_"),
        *("expand", "expand_as", "repeat", "repeat_interleave", "cat", "concat", "concatenate", "stack"),
        *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "__getitem__", "narrow", "select"),
        *("index_select", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    }
)
DIVISIONS = frozenset(["div", "__truediv__", "div_", "true_divide", "__itruediv__", "__idiv__"])
SCALES = DIVISIONS | {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
ADDS = frozenset(["add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"])
MASKS = frozenset(["masked_fill", "masked_fill_", "where", "clamp"])
SOFTMAX = frozenset(["softmax", "_softmax"])
NORMS = frozenset(["layer_norm", "rms_norm"])
ACTIVATIONS = {
    name: name.rstrip("_")
    for name in (
        *("gelu", "relu", "relu_", "relu6", "silu", "silu_", "hardswish", "leaky_relu", "elu", "selu", "mish"),
        *("tanh", "glu", "softplus", "hardtanh"),
    )
}


def scales_by_constant(record: Record, node: Node) -> bool:
    """Whether a node multiplies or divides by something that does not depend on the input."""
    dynamic = [n for n in node.inputs if not is_constant(record, n)]
    return node.name in SCALES and len(dynamic) == 1


def is_constant(record: Record, tensor: int) -> bool:
    """Whether a tensor does not depend on the model's inputs."""
    if tensor in record.inputs:
        return False
    made = record.producer.get(tensor)
    return made is None or made.constant


def passes_through(record: Record, node: Node, extra: frozenset[str] = frozenset(), also: Also | None = None) -> bool:
    """Whether values go through a node: a move, one of the extra names, or what `also` says."""
    return (
        node.name in MOVES
        or node.name in extra
        or scales_by_constant(record, node)
        or (also is not None and also(node))
    )


def sources(record: Record, tensor: int, extra: frozenset[str] = frozenset(), also: Also | None = None) -> list[Node]:
    """The nodes that made a tensor's values, found backwards through moves; inputs of the model have none."""
    found: list[Node] = []
    todo, seen = [tensor], {tensor}
    while todo:
        made = record.producer.get(todo.pop())
        if made is None or made.constant:
            continue
        if not passes_through(record, made, extra, also):
            if made not in found:
                found.append(made)
            continue
        fresh = [n for n in made.inputs if n not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return found


def ends(
    record: Record, tensor: int, extra: frozenset[str] = frozenset(), also: Also | None = None
) -> list[tuple[Node, int]]:
    """The nodes that use a tensor's values, with the tensor as they see it, found through moves."""
    found: list[tuple[Node, int]] = []
    todo, seen = [tensor], {tensor}
    while todo:
        number = todo.pop()
        for node in record.consumers.get(number, []):
            if not passes_through(record, node, extra, also):
                if (node, number) not in found:
                    found.append((node, number))
                continue
            fresh = [n for n in node.outputs if n not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return found


def reaches_output_alone(record: Record, tensor: int) -> bool:
    """Whether a tensor leads to the model's output without another matrix product on any way."""
    todo, seen, reached = [tensor], {tensor}, tensor in record.outputs
    while todo:
        for node in record.consumers.get(todo.pop(), []):
            if node.product is not None:
                return False
            for number in node.outputs:
                reached |= number in record.outputs
                if number not in seen:
                    seen.add(number)
                    todo.append(number)
    return reached


def touched_by_product(record: Record, tensor: int) -> bool:
    """Whether any matrix product lies behind a tensor."""
    todo, seen = [tensor], {tensor}
    while todo:
        made = record.producer.get(todo.pop())
        if made is None or made.constant:
            continue
        if made.product is not None:
            return True
        fresh = [n for n in made.inputs if n not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return False
