"""Questions about data flow on a recorded forward: what made this tensor, where does it go, is a channel kept.

"Through" an operation means that values pass it unchanged or merely moved, or scaled by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vitq.graph.record import Node, Record

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
SCALES = frozenset(["mul", "__mul__", "__rmul__", "mul_", "div", "__truediv__", "div_", "true_divide"])
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


def passes_through(record: Record, node: Node, extra: frozenset[str] = frozenset()) -> bool:
    """Whether values go through a node."""
    return node.name in MOVES or node.name in extra or scales_by_constant(record, node)


def sources(record: Record, tensor: int, extra: frozenset[str] = frozenset()) -> list[Node]:
    """The nodes that made a tensor's values, found backwards through moves; inputs of the model have none."""
    found: list[Node] = []
    for made in _walk_back(record, tensor, extra):
        if not passes_through(record, made, extra) and made not in found:
            found.append(made)
    return found


def _walk_back(record: Record, tensor: int, extra: frozenset[str]) -> Iterator[Node]:
    todo, seen = [tensor], {tensor}
    while todo:
        made = record.producer.get(todo.pop())
        if made is None or made.constant:
            continue
        yield made
        if passes_through(record, made, extra):
            fresh = [n for n in made.inputs if n not in seen]
            seen.update(fresh)
            todo.extend(fresh)


def shapes_back(record: Record, tensor: int) -> list[tuple[int, ...]]:
    """Shapes of a tensor and of everything it was moved from."""
    shapes = [record.shapes[tensor]]
    for made in _walk_back(record, tensor, frozenset()):
        shapes += [record.shapes[n] for n in made.inputs if passes_through(record, made)]
    return shapes


def ends(record: Record, tensor: int, extra: frozenset[str] = frozenset()) -> list[tuple[Node, int]]:
    """The nodes that use a tensor's values, with the tensor as they see it, found through moves."""
    found: list[tuple[Node, int]] = []
    todo, seen = [tensor], {tensor}
    while todo:
        number = todo.pop()
        for node in record.consumers.get(number, []):
            if not passes_through(record, node, extra):
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


def channel_ends(record: Record, tensor: int) -> list[tuple[Node, int]] | None:
    """Where the last dimension of a tensor goes, kept whole and in order.

    Returns:
        (node, tensor) for every use with the channels as its last dimension; None if any way mixes, cuts,
        pads or moves the channels, or leaves the model.
    """
    found: list[tuple[Node, int]] = []
    todo = [(tensor, len(record.shapes[tensor]) - 1)]
    seen = {tensor}
    while todo:
        number, dim = todo.pop()
        if number in record.outputs:
            return None
        for node in record.consumers.get(number, []):
            if node.name not in MOVES:
                if dim != len(record.shapes[number]) - 1:
                    return None
                found.append((node, number))
                continue
            for out in node.outputs:
                moved = _moved_channel(record, node, number, out, dim)
                if moved is None:
                    return None
                if out not in seen:
                    seen.add(out)
                    todo.append((out, moved))
    return found


def _moved_channel(record: Record, node: Node, source: int, out: int, dim: int) -> int | None:
    """Where the channel dimension lies after a move, or None if it is not kept whole."""
    before, after = record.shapes[source], record.shapes[out]
    if node.name in ("permute", "transpose", "swapaxes", "swapdims", "t", "T", "mT", "movedim", "moveaxis"):
        return _permuted(node, len(before), dim)
    if node.name == "pad":
        amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
        return dim if not any(amounts) else None
    if node.name in _MIXES or (node.name in ("roll", "index_select") and not _spares(node, len(before), dim)):
        return None
    if node.name == "__getitem__" and not _keeps_last(node, len(before) - dim):
        return None
    if math.prod(before) == math.prod(after):
        return _reshaped(before, after, dim)
    if node.name in ("__getitem__", "narrow", "select", "index_select", "chunk", "split", "unbind", "expand"):
        # A selection along other dimensions keeps the channels where they were, counted from the right.
        from_right = len(before) - dim
        kept = len(after) >= from_right and after[len(after) - from_right] == before[dim]
        return len(after) - from_right if kept else None
    return None


# Moves after which a channel may lie elsewhere among the channels, or belong to another tensor.
_MIXES = frozenset(
    {
        *("cat", "concat", "concatenate", "stack", "repeat", "repeat_interleave", "flip", "__setitem__", "copy_"),
    }
)


def _spares(node: Node, ndim: int, dim: int) -> bool:
    """Whether roll or index_select works along other dimensions than this one."""
    position, key = (2, "dims") if node.name == "roll" else (1, "dim")
    dims = node.args[position] if len(node.args) > position else node.kwargs.get(key)
    if dims is None:
        return False
    return dim not in [d % ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]


def _keeps_last(node: Node, from_right: int) -> bool:
    """Whether an index leaves the dimension so far from the right alone."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(i, (int, slice, type(...))) for i in index):
        return False  # tensors and lists may reorder (and a new dimension looks like a tensor in the record)
    if ... not in index:
        return True  # it counts from the left: what it cuts has another size
    behind = index[index.index(...) + 1 :]
    return len(behind) < from_right or behind[len(behind) - from_right] == slice(None)


def _permuted(node: Node, ndim: int, dim: int) -> int | None:
    arguments = [a for a in node.args[1:] if a is not None]
    if node.name == "permute":
        raw = arguments[0] if arguments and isinstance(arguments[0], (tuple, list)) else arguments
        raw = raw or node.kwargs.get("dims", ())
        order = [d % ndim for d in raw]
    elif node.name == "T":
        order = list(range(ndim))[::-1]
    elif node.name in ("transpose", "swapaxes", "swapdims", "t", "mT"):
        two = arguments or list(node.kwargs.values()) or ([0, 1] if node.name == "t" else [-2, -1])
        order = list(range(ndim))
        a, b = two[0] % ndim, two[1] % ndim
        order[a], order[b] = order[b], order[a]
    else:
        return None
    return order.index(dim) if dim in order else None


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """The dimension of `after` that is dimension `dim` of `before`, if a reshape keeps it whole."""
    outer = math.prod(before[:dim])
    for number, size in enumerate(after):
        if math.prod(after[:number]) == outer and size == before[dim]:
            return number
    return None
