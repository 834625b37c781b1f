"""Questions about single dimensions: where the channels of a tensor go, and where a dimension came from."""

from __future__ import annotations

import math

from vitq.graph.flow import MOVES, NORMS, is_constant, sources
from vitq.graph.record import Node, Record

_PERMUTES = frozenset(["permute", "transpose", "swapaxes", "swapdims", "t", "T", "mT", "movedim", "moveaxis"])
_CATS = frozenset(["cat", "concat", "concatenate"])
# Moves after which a channel may lie elsewhere among the channels, or belong to another tensor.
_MIXES = frozenset({*_CATS, "stack", "repeat", "repeat_interleave", "flip", "__setitem__", "copy_"})


# -- forwards ----------------------------------------------------------------------------------------------


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
    if node.name in _PERMUTES:
        order = _order(node, len(before))
        return order.index(dim) if dim in order else None
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


def _spares(node: Node, ndim: int, dim: int) -> bool:
    """Whether roll or index_select works along other dimensions than this one."""
    position, key = (2, "dims") if node.name == "roll" else (1, "dim")
    dims = node.args[position] if len(node.args) > position else node.kwargs.get(key)
    if dims is None:
        return False
    return dim not in [d % ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]


def _keeps_last(node: Node, from_right: int) -> bool:
    """Whether an index leaves the dimension so far from the right alone."""
    index = _index(node)
    if not all(isinstance(i, (int, slice, type(...))) for i in index):
        return False  # tensors and lists may reorder (and a new dimension looks like a tensor in the record)
    if ... not in index:
        return True  # it counts from the left: what it cuts has another size
    behind = index[index.index(...) + 1 :]
    return len(behind) < from_right or behind[len(behind) - from_right] == slice(None)


def _index(node: Node) -> tuple[object, ...]:
    return node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)


def _order(node: Node, ndim: int) -> list[int]:
    """For each dimension of the result of a permutation, the dimension that it was; empty if not known."""
    arguments = [a for a in node.args[1:] if a is not None]
    if node.name == "permute":
        raw = arguments[0] if arguments and isinstance(arguments[0], (tuple, list)) else arguments
        return [d % ndim for d in raw or node.kwargs.get("dims", ())]
    if node.name == "T":
        return list(range(ndim))[::-1]
    if node.name in ("movedim", "moveaxis"):
        return []
    two = arguments or list(node.kwargs.values()) or ([0, 1] if node.name == "t" else [-2, -1])
    order = list(range(ndim))
    a, b = two[0] % ndim, two[1] % ndim
    order[a], order[b] = order[b], order[a]
    return order


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """The dimension of `after` that is dimension `dim` of `before`, if a reshape keeps it whole."""
    outer = math.prod(before[:dim])
    for number, size in enumerate(after):
        if math.prod(after[:number]) == outer and size == before[dim]:
            return number
    return None


# -- backwards ---------------------------------------------------------------------------------------------


def origin(record: Record, tensor: int, dim: int) -> tuple[Node, int] | None:
    """The product whose result held a dimension, whole or as a part of one, and the dimension that it was there.

    Goes back through moves and through whatever keeps the shape (activations, norms, sums); None if it was put
    together from several dimensions, or if no product lies behind.
    """
    dim %= len(record.shapes[tensor])
    while True:
        made = record.producer.get(tensor)
        if made is None:
            return None
        if made.product is not None:
            return made, dim
        source = _source(record, made, tensor)
        came_from = None if source is None else _came_from(record, made, source, tensor, dim)
        if source is None or came_from is None:
            return None
        tensor, dim = source, came_from


def is_channel(record: Record, tensor: int, dim: int) -> bool | None:
    """Whether a dimension holds channels that a linear or a convolution made; None if that cannot be told."""
    found = origin(record, tensor, dim)
    if found is None or found[0].product is None:
        return None
    node, at = found
    ndim = len(record.shapes[node.outputs[0]])
    if node.name == "linear":
        return at == ndim - 1
    if found[0].product.kind in ("conv", "convt"):
        return at == ndim - 1 - spatial_dims(node)
    return None


def _is_head(record: Record, tensor: int, dim: int) -> bool:
    """Whether a dimension that is joined with the channels is one of heads: of a product with two activations."""
    found = origin(record, tensor, dim)
    return found is not None and found[0].product is not None and "weight" not in found[0].operands


def spatial_dims(node: Node) -> int:
    """Number of spatial dimensions of a convolution: conv2d, conv_transpose2d."""
    return int(node.name.removesuffix("d")[-1])


def merges_tokens(record: Record, tensor: int) -> bool:
    """Whether the last dimension holds the channels of several tokens side by side, seen through norms."""
    dim = len(record.shapes[tensor]) - 1
    while True:
        made = record.producer.get(tensor)
        if made is None or made.constant or made.name not in MOVES | NORMS:
            return False
        if made.name in _CATS and _dim_of(made, 1, "dim", 0) % len(record.shapes[tensor]) == dim:
            behind = [sources(record, n) for n in made.inputs]
            return len(behind) > 1 and all(b == behind[0] and b for b in behind)
        source = _source(record, made, tensor)
        if source is None:
            return False
        before, after = record.shapes[source], record.shapes[tensor]
        if made.name not in _PERMUTES and math.prod(before) == math.prod(after):
            covered = _covered(before, after, dim)
            if len(covered) > 1:
                return not any(_is_head(record, source, n) for n in covered)
        came_from = _came_from(record, made, source, tensor, dim)
        if came_from is None:
            return False
        tensor, dim = source, came_from


def _source(record: Record, made: Node, tensor: int) -> int | None:
    """The operand to follow back: for a move what is moved, else the first that has the result's shape."""
    dynamic = [n for n in made.inputs if not is_constant(record, n)]
    if made.name in MOVES:
        return dynamic[0] if dynamic else None
    return next((n for n in dynamic if record.shapes[n] == record.shapes[tensor]), None)


def _came_from(record: Record, made: Node, source: int, out: int, dim: int) -> int | None:
    """Which dimension of the source a dimension of the result was, or was cut out of."""
    before, after = record.shapes[source], record.shapes[out]
    if made.name in _PERMUTES:
        order = _order(made, len(before))
        return order[dim] if order else None
    if made.name == "stack":
        new = _dim_of(made, 1, "dim", 0) % len(after)
        return None if dim == new else dim - (dim > new)
    if made.name in ("unbind", "select"):
        gone = _dim_of(made, 1, "dim", 0) % len(before)
        return dim + (dim >= gone)
    if made.name == "__getitem__" and len(after) != len(before):
        return _indexed(made, len(before), len(after), dim)
    if math.prod(before) == math.prod(after):
        return _part_of(before, after, dim)
    return dim if len(before) == len(after) else None


def _dim_of(node: Node, position: int, key: str, default: int) -> int:
    given = node.args[position] if len(node.args) > position else node.kwargs.get(key, default)
    return given if isinstance(given, int) else default


def _indexed(node: Node, before: int, after: int, dim: int) -> int | None:
    """For x[0], x[:, 0], x[..., 0, :]: whole numbers take their dimension away."""
    index = _index(node)
    if not all(isinstance(i, (int, slice, type(...))) for i in index) or index.count(...) > 1:
        return None
    at = index.index(...) if ... in index else len(index)
    hidden = before - (len(index) - (... in index))
    whole = [*index[:at], *[slice(None)] * hidden, *index[at + 1 :]]
    left = [number for number, i in enumerate(whole) if isinstance(i, slice)]
    return left[dim] if len(left) == after else None


def _strides(shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    inner = math.prod(shape[dim + 1 :])
    return inner, inner * shape[dim]


def _part_of(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """The dimension of `before` that holds dimension `dim` of `after`, whole or a part of it."""
    if after[dim] == 1:
        return None
    low, high = _strides(after, dim)
    for number, size in enumerate(before):
        inner, outer = _strides(before, number)
        if size > 1 and inner <= low and high <= outer:
            return number
    return None


def _covered(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> list[int]:
    """The dimensions of `before` that dimension `dim` of `after` is made of."""
    low, high = _strides(after, dim)
    return [n for n, size in enumerate(before) if size > 1 and low <= _strides(before, n)[0] < high]
