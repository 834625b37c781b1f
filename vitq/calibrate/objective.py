"""What "better" means when candidates for a scale are compared: interchangeable, by name.

Shapes:  error = made - wanted (K, G, R, C), wanted and weight (G, R, C)
         K candidates, G scale groups, R rows of C values
Units:   a score (K, G) is a mean over R and C; lower is better
Formula: mse       mean (made - wanted)**2
         cosine    1 - mean over rows of cos(made, wanted)
         pearson   1 - correlation of all G R C values when those of one group have their errors and the others none
         ranking   pearson + 0.1 * the mean hinge max(0, 0.2 - (made_i - made_j) sign(wanted_i - wanted_j)) over
                   pairs in a row of one group, / G; pearson alone where the product is no score of attention
         hessian, fisher, perturbation_hessian   mean weight (made - wanted)**2, weights by calibrate/sensitivity.py
         blockwise  the same without the tenth of the errors that are smallest ("bottom elimination")
Source:  cosine    PTQ4ViT's base, arXiv 2111.12293        pearson, ranking   Liu et al., arXiv 2106.14156, eq. 5-8
         the weighted ones: calibrate/sensitivity.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BOTTOM = 0.1  # share of the errors that blockwise leaves out: that of the one public port of APQ-ViT
GAMMA, THETA = 0.1, 0.2  # weight and margin of the ranking term, as published
SHIFTS = (1, 2, 5, 13, 31, 67)  # pairs (i, i + shift) stand for all pairs of a row
FEW = 2**11  # errors that stand for all when the smallest tenth is looked for

Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """One way of comparing results.

    Attributes:
        probe: whose gradients weigh the errors (calibrate/sensitivity.py), None for none.
        score: (error, wanted, weight) -> (K, G).
        score_attention: instead of it for attention scores.
    """

    score: Score
    probe: str | None = None
    score_attention: Score | None = None

    @property
    def square(self) -> bool:
        """Whether it is the mean of squares where there are no weights."""
        return self.score is _squared

    def __call__(self, error: Tensor, wanted: Tensor, weight: Tensor | None = None, *, scores: bool = False) -> Tensor:
        """Score candidates; `scores` says that they are attention scores before softmax. `error` is used up."""
        chosen = self.score_attention if scores and self.score_attention is not None else self.score
        return chosen(error, wanted, weight)


def _squared(error: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    flat = error.flatten(2)
    if weight is None:
        norm: Tensor = torch.linalg.vector_norm(flat, dim=-1).double()
        return norm.square() / flat.shape[-1]
    return _weighted(flat.square_(), weight)


def _without_bottom(error: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    square = error.flatten(2).square_()
    few = square[..., :: -(-square.shape[-1] // FEW)]
    least = few.kthvalue(max(1, int(BOTTOM * few.shape[-1])), dim=-1, keepdim=True).values
    return _weighted(square.masked_fill_(square < least, 0.0), weight)


def _weighted(square: Tensor, weight: Tensor | None) -> Tensor:
    """(K, G) mean of squares (K, G, n), weighted."""
    if weight is None:
        return square.mean(-1, dtype=torch.float64)
    return torch.einsum("kgn,gn->kg", square, weight.flatten(1)).double() / square.shape[-1]


def _cosine(error: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    return 1 - torch.cosine_similarity(error.add_(wanted), wanted[None], dim=-1).mean(-1, dtype=torch.float64)


def _pearson(error: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    # Correlated by itself, a group could change its gain for nothing, and with it the correlation of the whole.
    e, to = error.flatten(2).double(), wanted.flatten(1).double()
    to = to - to.mean()
    whole, along = to.square().sum(), torch.einsum("kgn,gn->kg", e, to)
    spread = whole + 2 * along + e.square().sum(-1) - e.sum(-1).square() / to.numel()
    return 1 - (whole + along) / (whole * spread).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def _ranking(error: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    made, hinges = error + wanted, []
    for shift in SHIFTS:
        if shift < wanted.shape[-1]:
            sign = (wanted[..., shift:] - wanted[..., :-shift]).sign()
            hinge = (THETA - (made[..., shift:] - made[..., :-shift]) * sign).clamp_(min=0)
            hinges.append(hinge.flatten(2).mean(-1, dtype=torch.float64))
    return _pearson(error, wanted, weight) + (GAMMA / len(wanted) * torch.stack(hinges).mean(0) if hinges else 0.0)


OBJECTIVES: dict[str, Objective] = {
    "mse": Objective(_squared),
    "cosine": Objective(_cosine),
    "pearson": Objective(_pearson),
    "ranking": Objective(_pearson, score_attention=_ranking),
    "hessian": Objective(_squared, "hessian"),
    "fisher": Objective(_squared, "fisher"),
    "blockwise": Objective(_without_bottom, "blockwise"),
    "perturbation_hessian": Objective(_squared, "perturbation"),
}
