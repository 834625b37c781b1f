"""The float model as a teacher: its features before the heads, and their main directions.

Shapes:  features   for each head (B, T, d), T tokens (1 behind a pooling)    logits (B, classes)    basis (d, k)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.moments import Moments
from vitq.core.batches import ForwardFn, leading_size, moved
from vitq.core.roles import HEAD_IN
from vitq.core.site import Graph
from vitq.core.training import Draw, Training, order_of

ROUND_TO = 32  # directions, as in the paper
NOTHING = 1e-6  # of the largest variance: moments are sums of float32 products
LOOKED_AT = 4096  # examples for the main directions
KEPT = 2**28  # bytes of targets that are kept instead of computed again

Made = tuple[list[Tensor], Tensor | None]  # features, logits


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
        """Features, and logits where the model returns such."""
        seen: dict[str, Tensor] = {}
        with self._watching(seen):
            out = self.forward(self.model, inputs)
        count = leading_size(inputs)
        features = [seen[name].float().reshape(count, -1, seen[name].shape[-1]) for name in self.heads if name in seen]
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        return features, tensors[0].float() if tensors and tensors[0].ndim == 2 else None

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


class Teacher:
    """What the float model makes of the examples.

    Args:
        model: the float model, watched.
        training: where each example looks the same in every epoch, what the model makes of all of them is computed
            once, before training, if there is room.
    """

    def __init__(self, model: Watched, training: Training, device: torch.device) -> None:
        self.model, self.training, self.device = model, training, device
        self.kept: list[Made] | None = None
        if training.examples.fixed and training.epochs > 1:
            self.kept = self._all()

    @torch.no_grad()
    def __call__(self, inputs: Any, draws: Sequence[Draw]) -> Made:
        """Features and logits of these examples."""
        if self.kept is None:
            return self.model(inputs)
        rows = [self.kept[number] for _, number in draws]
        features = [torch.stack(each) for each in zip(*(row[0] for row in rows), strict=True)]
        logits = [row[1] for row in rows if row[1] is not None]
        return features, torch.stack(logits) if logits else None

    def _all(self) -> list[Made] | None:
        kept: list[Made] = []
        for features, logits in self._in_order(range(len(self.training.examples))):
            size = sum(t.nbytes for t in (*features, *(() if logits is None else (logits,))))
            count = len(features[0]) if features else 0 if logits is None else len(logits)
            if not count or size / count * len(self.training.examples) > KEPT:
                return None
            kept += [([t[at] for t in features], None if logits is None else logits[at]) for at in range(count)]
        return kept

    @torch.no_grad()
    def _in_order(self, numbers: Sequence[int]) -> Iterator[Made]:
        size = self.training.micro_batch
        draws = [[(0, number) for number in numbers[at : at + size]] for at in range(0, len(numbers), size)]
        for inputs, _ in self.training.examples.stream(draws):
            yield self.model(moved(inputs, self.device))

    def bases(self, share: float, seed: int) -> list[Tensor]:
        """For each head the directions that have this share of its features' variance, on examples the seed draws."""
        moments: list[Moments] = []
        for features, _ in self._in_order(order_of(len(self.training.examples), seed)[:LOOKED_AT]):
            moments = moments or [Moments(t.shape[-1], t.device) for t in features]
            for each, rows in zip(moments, features, strict=True):
                each.add(rows)
        return [principal(each.covariance, share).float() for each in moments]


def principal(covariance: Tensor, share: float) -> Tensor:
    """(d, k) eigenvectors of the largest eigenvalues, enough for this share of their sum.

    The number is rounded to the nearest multiple of 32, at least 32 (GPLQ, arXiv 2506.11784, section 3.2), and is no
    more than have any variance: few examples leave directions of which nothing is known.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    wanted = int((values.cumsum(0) < share * values.sum()).sum()) + 1
    rounded = max(ROUND_TO, (wanted + ROUND_TO // 2) // ROUND_TO * ROUND_TO)
    known = int((values > NOTHING * values[0]).sum())
    basis: Tensor = vectors[:, : max(1, min(rounded, known))]
    return basis
