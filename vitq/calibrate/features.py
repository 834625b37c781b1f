"""What a model makes of images before it names their classes.

Shapes:  features   for each head (B, T, d), T tokens (1 behind a pooling); of a model without a head of one layer, of
                    each output    outputs (B, …), (B, classes) for logits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.batches import ForwardFn, leading_size
from vitq.core.roles import HEAD_IN
from vitq.core.site import Graph

Made = tuple[list[Tensor], list[Tensor]]  # features, outputs


def heads_of(graph: Graph, model: nn.Module) -> list[str]:
    """Modules whose input is compared: heads that are one layer each, quantized or not."""
    owners = dict.fromkeys(site.owner for site in graph.with_roles(HEAD_IN))
    return [name for name in owners if name and not any(model.get_submodule(name).children())]


class Watched:
    """A model whose features are seen while it runs; they are float32 whatever it computes in.

    Args:
        heads: modules.
    """

    def __init__(self, model: nn.Module, heads: Sequence[str], forward: ForwardFn) -> None:
        self.model, self.heads, self.forward = model, list(heads), forward

    def __call__(self, inputs: Any) -> Made:
        """Features, and outputs that are floats by example."""
        seen: dict[str, Tensor] = {}
        with self._watching(seen):
            out = self.forward(self.model, inputs)
        count = leading_size(inputs)
        floats = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        outputs = [t.float() for t in floats if t.ndim > 1 and len(t) == count]
        rows = [seen[name] for name in self.heads if name in seen] or outputs
        return [t.float().reshape(count, -1, t.shape[-1]) for t in rows], outputs

    @contextmanager
    def _watching(self, seen: dict[str, Tensor]) -> Iterator[None]:
        def look(name: str) -> Any:
            return lambda module, args: seen.update({name: args[0]})

        handles = [self.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in self.heads]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
