"""Scores of candidates for one operand of a product, against slow loops over candidates and groups in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitq.calibrate.judge import PART, Judge
from vitq.calibrate.objective import OBJECTIVES
from vitq.calibrate.products import Chunk, Product
from vitq.core.format import Format
from vitq.core.site import Site
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.registry import build_quantizer

K = 5
FACTORS = torch.linspace(0.3, 1.2, K)[:, None]


def site(operand: str, axes: tuple[str, ...], shape: tuple[int, ...], param: str | None = None) -> Site:
    return Site(f"x:op0.{operand}", "x", "op", 0, operand, "OTHER_IN", axes, shape, param=param)


def quantizer_for(where: Site, x: Tensor, per: str, bits: int = 4, symmetric: bool = False) -> Quantizer:
    quantizer = build_quantizer(Format.of("uniform", bits, per, symmetric=symmetric), where.axes, where.shape)
    low, high = torch.aminmax(quantizer.layout.by_group(x), dim=1)
    quantizer.set_params(quantizer.range_to_params(low, high))
    return quantizer


class Case:
    """One product with both operands quantized, and how its errors come apart by group.

    Attributes:
        sides: side -> granularity -> dimension of the result, or None for one score; granularities that mix are absent.
    """

    def __init__(self, kind: str) -> None:
        torch.manual_seed(3)
        self.kind, self.model = kind, nn.Module()
        if kind == "linear":
            self.left, right = torch.randn(6, 7, 8) * torch.rand(7, 1), torch.randn(10, 8) * torch.rand(10, 1)
            axes = ("batch", "token", "channel"), ("channel", "in")
            self.sides: dict[str, dict[str, int | None]] = {
                "left": {"tensor": None, "token": -2}, "right": {"tensor": None, "channel": -1, "group:4": -1},
            }  # fmt: skip
        elif kind == "conv":
            self.model.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
            self.left, right = torch.randn(5, 4, 9, 9), self.model.conv.weight.detach()
            axes = ("batch", "channel", "token", "token"), ("channel", "in", "kernel", "kernel")
            self.sides = {"left": {"tensor": None}, "right": {"tensor": None, "channel": -3}}
        else:
            self.left, right = torch.randn(5, 3, 7, 8), torch.randn(5, 3, *((9, 8) if kind == "scores" else (8, 9)))
            self.left, right = self.left * torch.rand(3, 1, 1), right * torch.rand(3, 1, 1)
            axes = ("batch", "head", "token", "channel"), ("batch", "head", "token", "channel")
            last = {"token": -1} if kind == "scores" else {"channel": -1}
            self.sides = {
                "left": {"tensor": None, "head": -3, "token": -2},
                "right": {"tensor": None, "head": -3} | last,
            }
        self.param = kind in ("linear", "conv")
        name = "conv.weight" if kind == "conv" else "weight"
        if kind == "linear":
            self.model.weight = nn.Parameter(right)
        self.right = right
        where = "conv" if kind == "conv" else ""
        self.product = Product(
            kind, site("lhs", axes[0], tuple(self.left.shape)),
            site("rhs", axes[1], tuple(right.shape), name if self.param else None), where,
        )  # fmt: skip

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.double(), right.double()
        if self.kind == "linear":
            return torch.einsum("mtc,oc->mto", left, right)
        if self.kind == "conv":
            return torch.nn.functional.conv2d(left, right, stride=2, padding=1, groups=2)
        return torch.einsum("mhrd,mhsd->mhrs" if self.kind == "scores" else "mhrs,mhsd->mhrd", left, right)

    def judge(self, quantizers: tuple[Quantizer | None, Quantizer | None], weight: Tensor | None, name: str) -> Judge:
        made = self.multiply(self.left, self.right).float()
        right = None if self.param else self.right
        chunk = Chunk(self.left, right, made, weight, by_entry=not self.param)
        return Judge(self.model, self.product, [chunk], quantizers, OBJECTIVES[name])


CASES = [
    pytest.param(kind, side, per, id=f"{kind}-{side}-{per}")
    for kind in ("linear", "conv", "scores", "rows")
    for side, granularities in Case(kind).sides.items()
    for per in granularities
]


def candidates(quantizer: Quantizer, x: Tensor) -> Params:
    low, high = torch.aminmax(quantizer.layout.by_group(x), dim=1)
    return quantizer.range_to_params(FACTORS * low, FACTORS * high)


def both(case: Case, side: str, per: str) -> tuple[Quantizer, Quantizer]:
    left = quantizer_for(case.product.left, case.left, per if side == "left" else "tensor")
    return left, quantizer_for(case.product.right, case.right, per if side == "right" else "tensor", symmetric=True)


@pytest.mark.parametrize(("kind", "side", "per"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_those_of_a_slow_loop_over_candidates(kind: str, side: str, per: str, weighted: bool) -> None:
    case = Case(kind)
    quantizers = both(case, side, per)
    searched, other = quantizers if side == "left" else quantizers[::-1]
    x, rest = (case.left, case.right) if side == "left" else (case.right, case.left)
    tried = candidates(searched, x)
    wanted = case.multiply(case.left, case.right)
    weight = torch.rand(wanted.shape) if weighted else None
    found = case.judge(quantizers, weight, "hessian" if weighted else "mse").score(side, tried)
    assert found.shape == (K, searched.layout.groups)
    fixed = other.decode(other.encode(rest))
    dim = case.sides[side][per]
    for k in range(K):
        searched.set_params({name: value[k] for name, value in tried.items()})
        now = searched.decode(searched.encode(x))
        error = (case.multiply(*((now, fixed) if side == "left" else (fixed, now))) - wanted).square()
        error = error if weight is None else error * weight
        if dim is None:
            expected = error.mean().reshape(1)
        else:
            expected = torch.stack([error.select(dim, i).mean() for i in range(error.shape[dim])])
            expected = expected.repeat_interleave(searched.layout.groups // len(expected))
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("per", ["tensor", "channel", "group:4"])
@pytest.mark.parametrize("rows", [7, 30])
def test_weights_are_scored_on_all_rows_whether_by_their_moments_or_not(per: str, rows: int) -> None:
    """Of 8 channels: 30 rows are more than their second moments, of which no part is looked at first."""
    case, left = Case("linear"), torch.randn(rows, 8) * torch.rand(8)
    site_of = replace(case.product.left, axes=("token", "channel"), shape=(rows, 8))
    act = quantizer_for(site_of, left, "tensor")
    weight = quantizer_for(case.product.right, case.right, per, symmetric=True)
    tried, wanted = candidates(weight, case.right), left.double() @ case.right.double().T
    chunk = Chunk(left, None, wanted.float(), None)
    judge = Judge(case.model, replace(case.product, left=site_of), [chunk], (act, weight), OBJECTIVES["mse"])
    expected, seen = [], act.decode(act.encode(left)).double()
    for k in range(K):
        weight.set_params({name: value[k] for name, value in tried.items()})
        each = (seen @ weight.decode(weight.encode(case.right)).double().T - wanted).square().mean(0)
        each = each.mean().reshape(1) if per == "tensor" else each
        expected.append(each.repeat_interleave(weight.layout.groups // len(each)))
    found = judge.score("right", tried)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=0)
    assert torch.equal(judge.score("right", tried, first=True), found)


@pytest.mark.parametrize(("kind", "side", "per"), CASES)
def test_the_error_is_the_score_of_what_there_is(kind: str, side: str, per: str) -> None:
    case = Case(kind)
    quantizers = both(case, side, per)
    searched = quantizers[side == "right"]
    judge = case.judge(quantizers, None, "mse")
    now = {name: value.reshape(1, -1) for name, value in searched.params().items()}
    scores = judge.score(side, now)[0]
    assert judge.error() == pytest.approx(float(scores.mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["scores", "rows"])
def test_a_head_of_keys_or_values_is_judged_by_all_the_queries_that_share_it(kind: str) -> None:
    case = Case(kind)
    queries, keys = case.left[:, :1].repeat(1, 4, 1, 1) * torch.rand(4, 1, 1), case.right[:, :2]
    where = site("rhs", ("batch", "head", "token", "channel"), tuple(keys.shape))
    searched = quantizer_for(where, keys, "head")

    def multiply(right: Tensor) -> Tensor:
        return case.multiply(queries, torch.stack([right[:, head // 2] for head in range(4)], dim=1))

    wanted = multiply(keys)
    chunk = Chunk(queries, keys, wanted.float(), None, by_entry=True)
    product = Product(kind, case.product.left, where, "")
    judge = Judge(case.model, product, [chunk], (None, searched), OBJECTIVES["mse"])
    tried = candidates(searched, keys)
    found = judge.score("right", tried)
    for k in range(K):
        searched.set_params({name: value[k] for name, value in tried.items()})
        error = (multiply(searched.decode(searched.encode(keys))) - wanted).square()
        expected = torch.stack([error[:, :2].mean(), error[:, 2:].mean()])
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=0)
        assert judge.error() == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("per", ["channel", "group:4"])
def test_where_groups_mix_in_the_product_the_operand_itself_is_judged(per: str) -> None:
    case = Case("linear")
    left = quantizer_for(case.product.left, case.left, per)
    tried = candidates(left, case.left)
    found = case.judge((left, None), None, "mse").score("left", tried)
    for k in range(K):
        left.set_params({name: value[k] for name, value in tried.items()})
        error = left.layout.by_group(left.decode(left.encode(case.left)).double() - case.left).square().mean(1)
        torch.testing.assert_close(found[k], error, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "pearson", "ranking"])
def test_scores_of_attention_are_compared_as_softmax_sees_them(name: str) -> None:
    """Found by this test: fused attention multiplies by 1/sqrt(D) within; errors were sqrt(D) times too large."""
    case = Case("scores")
    quantizers = both(case, "left", "head")
    tried = candidates(quantizers[0], case.left)
    inside = case.judge(quantizers, None, name)
    inside.chunks[0].made *= 0.25
    case.left = case.left * 0.25
    outside_quantizers = both(case, "left", "head")
    outside = case.judge(outside_quantizers, None, name)
    scaled = candidates(outside_quantizers[0], case.left)
    torch.testing.assert_close(inside.score("left", tried), outside.score("left", scaled), rtol=1e-3, atol=1e-7)
    assert inside.error() == pytest.approx(outside.error(), rel=1e-3)


def many(quantizer: Quantizer, x: Tensor, count: int) -> Params:
    low, high = torch.aminmax(quantizer.layout.by_group(x), dim=1)
    factors = torch.linspace(0.2, 1.3, count)[:, None]
    return quantizer.range_to_params(factors * low, factors * high)


@pytest.mark.parametrize("kind", ["linear", "scores", "rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_best_is_that_of_all_or_hardly_worse_and_never_worse_than_the_first(kind: str, side: str) -> None:
    case = Case(kind)
    per = {"linear": "token" if side == "left" else "channel"}.get(kind, "head")
    quantizers = both(case, side, per)
    x = case.left if side == "left" else case.right
    judge = case.judge(quantizers, None, "mse")
    tried = many(quantizers[side == "right"], x, 6 * PART)
    best, score = judge.best(side, tried), judge.score(side, tried)
    found = score.gather(0, best)[0]
    assert bool((found <= score[0]).all())
    torch.testing.assert_close(found, score.min(0).values, rtol=0.2, atol=0)
    few = {name: value[: PART + 1] for name, value in tried.items()}
    assert torch.equal(judge.best(side, few)[0], judge.score(side, few).argmin(0))


@pytest.mark.parametrize("kind", ["linear", "scores", "rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_other_operand_has_now_is_what_candidates_are_judged_with(kind: str, side: str) -> None:
    case = Case(kind)
    quantizers = both(case, side, "tensor")
    searched, other = (quantizers[at] for at in ((1, 0) if side == "right" else (0, 1)))
    judge = case.judge(quantizers, None, "mse")
    tried = candidates(searched, case.left if side == "left" else case.right)
    before = judge.score(side, tried)
    assert torch.equal(judge.score(side, tried), before)
    assert other is not None
    other.set_params({name: value * 1.7 if name == "scale" else value for name, value in other.params().items()})
    after = judge.score(side, tried)
    assert not torch.equal(after, before)
    assert torch.equal(after, case.judge(quantizers, None, "mse").score(side, tried))


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_ties_go_to_what_there_is(weight: float) -> None:
    """All gradients zero: no candidate may win by being first of a grid, as in the official code of PTQ4ViT."""
    case = Case("linear")
    quantizers = both(case, "right", "channel")
    made = case.multiply(case.left, case.right)
    judge = case.judge(quantizers, torch.full(made.shape, weight) * 1e-30, "hessian")
    tried = many(quantizers[1], case.right, 4 * PART)
    assert not bool(judge.best("right", tried).any())


def test_a_candidate_that_gives_no_number_is_the_worst() -> None:
    case = Case("linear")
    quantizers = both(case, "left", "tensor")
    judge = case.judge(quantizers, None, "mse")
    case.judge(quantizers, None, "mse")
    tried = candidates(quantizers[0], case.left)
    tried = {name: torch.cat([torch.full_like(value[:1], 3e38), value]) for name, value in tried.items()}
    assert int(judge.best("left", tried)) > 0


def test_samples_of_several_shapes_count_by_their_values() -> None:
    case = Case("rows")
    quantizers = both(case, "left", "tensor")
    tried = candidates(quantizers[0], case.left)
    whole = case.judge(quantizers, None, "mse")
    chunk = whole.chunks[0]
    cut: list[Any] = [
        Chunk(
            chunk.left[a:b, :, c:d],
            None if chunk.right is None else chunk.right[a:b],
            chunk.made[a:b, :, c:d],
            None,
            True,
        )
        for a, b, c, d in ((0, 2, 0, 7), (2, 5, 0, 3), (2, 5, 3, 7))
    ]
    apart = Judge(whole.model, whole.product, cut, quantizers, whole.objective)
    torch.testing.assert_close(apart.score("left", tried), whole.score("left", tried), rtol=1e-5, atol=0)
    assert apart.error() == pytest.approx(whole.error(), rel=1e-5)
