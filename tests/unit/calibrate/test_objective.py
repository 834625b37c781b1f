"""Each objective against slow loops in float64, from the formulas of reference/methods-1.md, sections 1, 4 and 7."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitq.calibrate.objective import BOTTOM, FEW, GAMMA, OBJECTIVES, SHIFTS, THETA

K, G, R, C = 3, 2, 5, 9
WEIGHTED = ("hessian", "fisher", "perturbation_hessian")
each = pytest.mark.parametrize("name", list(OBJECTIVES))


def drawn(rows: int = R, columns: int = C) -> tuple[Tensor, Tensor, Tensor]:
    """error (K, G, R, C), wanted and weight (G, R, C)"""
    return 0.3 * torch.randn(K, G, rows, columns), torch.randn(G, rows, columns), torch.rand(G, rows, columns) ** 3


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cos(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def flat(x: Tensor) -> list[float]:
    return [float(v) for v in x.double().flatten()]


def centred(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [v - mean for v in values]


def slow(name: str, error: Tensor, all_wanted: Tensor, weight: Tensor | None, scores: bool, group: int) -> float:
    """The score of one candidate for one group; tensors (R, C), all_wanted (G, R, C)."""
    wanted = all_wanted[group]
    made = error.double() + wanted.double()
    if name in ("mse", *WEIGHTED):
        weights = [1.0] * error.numel() if weight is None else flat(weight)
        return sum(w * e * e for w, e in zip(weights, flat(error), strict=True)) / error.numel()
    if name == "blockwise":
        weights = [1.0] * error.numel() if weight is None else flat(weight)
        bound = sorted(e * e for e in flat(error))[max(1, int(BOTTOM * error.numel())) - 1]
        return sum(w * e * e for w, e in zip(weights, flat(error), strict=True) if e * e >= bound) / error.numel()
    if name == "cosine":
        return 1 - sum(cos(flat(m), flat(t)) for m, t in zip(made, wanted, strict=True)) / len(made)
    whole = all_wanted.double()
    whole[group] = made
    pearson = 1 - cos(centred(flat(whole)), centred(flat(all_wanted)))
    if name == "pearson" or not scores:
        return pearson
    hinges = []
    for shift in SHIFTS:
        pairs = [
            max(0.0, THETA - float(made[r, i] - made[r, j]) * math.copysign(1, float(wanted[r, i] - wanted[r, j])))
            for r in range(len(made))
            for j in range(made.shape[1] - shift)
            for i in (j + shift,)
        ]
        hinges += [sum(pairs) / len(pairs)] if pairs else []
    return pearson + GAMMA * sum(hinges) / len(hinges) / len(all_wanted)


@each
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_those_of_slow_loops(name: str, scores: bool, weighted: bool) -> None:
    error, wanted, weight = drawn()
    expected = [
        [slow(name, error[k, g], wanted, weight[g] if weighted else None, scores, g) for g in range(G)]
        for k in range(K)
    ]
    found = OBJECTIVES[name](error, wanted, weight if weighted else None, scores=scores)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@each
def test_no_error_is_better_than_some_and_some_better_than_more(name: str) -> None:
    error, wanted, weight = drawn(40, 80)
    error = error[:1] * torch.tensor([0.0, 0.5, 1.0, 3.0]).reshape(4, 1, 1, 1)
    found = OBJECTIVES[name](error, wanted, weight, scores=True)
    assert bool((found.diff(dim=0) > 0).all())


def test_the_ranking_term_counts_pairs_that_change_places() -> None:
    wanted = torch.tensor([[[0.0, 1.0]]])
    kept, swapped = torch.tensor([[0.1, -0.1]]), torch.tensor([[0.9, -0.9]])
    ranking, pearson = OBJECTIVES["ranking"], OBJECTIVES["pearson"]
    for error, hinge in ((kept, 0.0), (swapped, THETA + 0.8)):
        both = [f(error[None, None].clone(), wanted, scores=True) for f in (ranking, pearson)]
        assert float(both[0] - both[1]) == pytest.approx(GAMMA * hinge, abs=1e-6)
    assert torch.equal(ranking(swapped[None, None].clone(), wanted), pearson(swapped[None, None].clone(), wanted))


def test_blockwise_leaves_out_what_is_smallest_also_of_more_errors_than_it_sorts() -> None:
    error = torch.rand(1, 1, 10 * FEW // 64, 64)
    weight = torch.where(error[0] < 0.08, 1e9, 1.0)  # which would be most of the score
    found, whole = (
        float(OBJECTIVES[name](error.clone(), torch.zeros_like(error[0]), weight)) for name in ("blockwise", "hessian")
    )
    assert whole > 1e4
    assert found == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("name", ["pearson", "ranking"])
def test_a_channel_that_changes_its_gain_makes_the_correlation_of_the_whole_worse(name: str) -> None:
    _, wanted, _ = drawn()
    error = torch.stack([0 * wanted, 0.2 * wanted])
    assert bool((OBJECTIVES[name](error, wanted)[1] > 1e-3).all())
