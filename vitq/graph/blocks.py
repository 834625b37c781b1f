"""Transformer blocks from the repeated module structure: siblings of one class, each with an attention in it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module, attention_owners: Iterable[str], order: list[str]) -> tuple[str, ...]:
    """Names of the blocks, in the order of their first call.

    Args:
        model: the traced module.
        attention_owners: modules that make attention calls.
        order: module names in call order.

    A block is the lowest ancestor of an attention that has a sibling of its own class with an attention in
    it. A block without such a sibling (a stage of depth one) is known by the class of the others.
    """
    owners = sorted(set(attention_owners))
    modules = dict(model.named_modules())
    with_attention = {name for owner in owners for name in _ancestors(owner)}

    def has_sibling(name: str) -> bool:
        parent = name.rpartition(".")[0]
        return any(
            other != name and other in with_attention and type(modules[other]) is type(modules[name])
            for other in (f"{parent}.{child}".lstrip(".") for child, _ in modules[parent].named_children())
        )

    def lowest_of(owner: str) -> str | None:
        repeating = [a for a in _ancestors(owner) if a and has_sibling(a)]
        if repeating[:1] == [owner] and not isinstance(modules[owner.rpartition(".")[0]], _LISTS):
            # Attention that is its own sibling (two attentions in one block) is not a block if one repeats above it.
            repeating = repeating[1:] or repeating
        return next(iter(repeating), None)

    lowest = {owner: lowest_of(owner) for owner in owners}
    # The classes of blocks that hold their attention below themselves.
    classes = {type(modules[name]) for owner, name in lowest.items() if name is not None and name != owner}
    blocks: set[str] = set()
    for owner in owners:
        known = next((a for a in _ancestors(owner) if type(modules[a]) in classes and a != owner), None)
        name = known or lowest[owner]
        if name is not None:
            blocks.add(name)
    rank = {name: i for i, name in enumerate(order)}
    outermost = {b for b in blocks if not any(b != o and b.startswith(f"{o}.") for o in blocks)}
    return tuple(sorted(outermost, key=lambda b: (rank.get(b, len(rank)), b)))


def block_of(module: str, blocks: Iterable[str]) -> str | None:
    """The block that a module lies in, or None."""
    return next((b for b in blocks if module == b or module.startswith(f"{b}.")), None)


def _ancestors(name: str) -> list[str]:
    """The module itself, then its ancestors up to the root ("")."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
