"""The float model as a teacher: its features before the head, and their main directions.

Shapes:  features (B, d), d over all heads side by side    logits (B, classes)    basis (d, k)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.calibrate.moments import Moments
from vitq.core.batches import ForwardFn
from vitq.core.qmodel import QuantModel
from vitq.core.roles import HEAD_IN
from vitq.core.training import Draw, Examples
from vitq.quantizers.common import AnyQuantizer

ROUND_TO = 32  # directions, as in the paper
NOTHING = 1e-6  # of the largest variance: moments are sums of float32 products
KEPT = 2**28  # bytes of targets that are kept instead of computed again


class Watched:
    """A model whose features are seen while it runs.

    Args:
        qmodel: its heads are the products whose inputs have the role HEAD_IN.
    """

    def __init__(self, qmodel: QuantModel, forward: ForwardFn) -> None:
        self.qmodel, self.forward = qmodel, forward
        self.heads = [site.id for site in qmodel.sites(HEAD_IN)]
        self._seen: dict[str, Tensor] = {}

    def __call__(self, inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """(features, logits); None for what the model does not have."""
        for name in self.heads:
            self.qmodel.quantizers[name].observer = self._look(name)
        try:
            out = self.forward(self.qmodel.model, inputs)
        finally:
            for name in self.heads:
                self.qmodel.quantizers[name].observer = None
        seen = [self._seen.pop(name) for name in self.heads if name in self._seen]
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        logits = tensors[0] if tensors and tensors[0].ndim == 2 else None
        return (torch.cat([t.flatten(1).float() for t in seen], dim=1) if seen else None), logits

    def _look(self, name: str) -> Any:
        def look(quantizer: AnyQuantizer, x: Tensor) -> None:
            self._seen[name] = x

        return look


class Teacher:
    """What the float model makes of the examples.

    Args:
        qmodel: copied as it is, with its quantizers off.
        examples: where each looks the same in every epoch, what was made of it is kept, if there is room.
    """

    def __init__(self, qmodel: QuantModel, forward: ForwardFn, examples: Examples, epochs: int) -> None:
        own = copy.deepcopy(qmodel)
        own.set_state("off")
        self.model = Watched(own, forward)
        self.kept: dict[int, list[Tensor | None]] | None = {} if examples.fixed and epochs > 1 else None

    @torch.no_grad()
    def __call__(self, inputs: Any, draws: Sequence[Draw]) -> tuple[Tensor | None, Tensor | None]:
        """(features, logits) of these examples."""
        if self.kept is not None and all(number in self.kept for _, number in draws):
            rows = [self.kept[number] for _, number in draws]
            features, logits = (_stacked([row[part] for row in rows]) for part in (0, 1))
            return features, logits
        made = self.model(inputs)
        if self.kept is not None:
            each = sum(t.nbytes for t in made if t is not None) // len(draws)
            if (len(self.kept) + len(draws)) * each > KEPT:
                self.kept = None
            else:
                for at, (_, number) in enumerate(draws):
                    self.kept[number] = [None if t is None else t[at].clone() for t in made]
        return made

    @torch.no_grad()
    def basis(self, examples: Examples, share: float, count: int, batch: int) -> Tensor | None:
        """The directions that have this share of the features' variance; None where there are no features.

        Args:
            count: examples to look at.
        """
        moments: Moments | None = None
        numbers = [(0, number) for number in range(min(count, len(examples)))]
        draws = [numbers[at : at + batch] for at in range(0, len(numbers), batch)]
        for inputs, _ in examples.stream(draws):
            features, _ = self.model(inputs)
            if features is None:
                return None
            moments = moments or Moments(features.shape[1], features.device)
            moments.add(features)
        return None if moments is None else principal(moments.covariance, share).float()


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None


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
