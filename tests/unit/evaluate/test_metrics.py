"""Intervals and paired comparisons against brute-force resampling and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import rel_entr
from torch import Tensor

from vitq.core.errors import DataError, InputError
from vitq.evaluate.metrics import (
    bootstrap_interval,
    logit_kl,
    mean_over_seeds,
    paired_difference,
    rounded,
    rounded_small,
    topk_correct,
)

bools = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda values: torch.tensor(values))
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(
    lambda values: tuple(torch.tensor(values).unbind(dim=1))
)


def brute_force(per_image: np.ndarray, level: float, resamples: int = 20_000) -> list[float]:
    """Percentile interval, in percent, from images really drawn with replacement."""
    n = len(per_image)
    drawn = per_image[np.random.default_rng(7).integers(0, n, size=(resamples, n))]
    ends = 100 * np.quantile(drawn.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return [float(end) for end in ends]


def with_correct(count: int, n: int) -> Tensor:
    return torch.arange(n) < count


@pytest.mark.parametrize(("count", "n"), [(317, 400), (3, 50), (49, 50)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_binomial_draw_equals_resampling_images(count: int, n: int, level: float) -> None:
    correct = with_correct(count, n)
    # Ends are multiples of 1/n; both estimates of one may fall on neighbouring multiples.
    found = bootstrap_interval(correct, level=level)
    assert list(found) == pytest.approx(brute_force(correct.numpy(), level), abs=100 / n + 1e-9)


@pytest.mark.parametrize(("a_only", "b_only", "n"), [(30, 12, 400), (5, 5, 60), (2, 20, 100), (0, 9, 50)])
def test_the_multinomial_draw_equals_resampling_pairs(a_only: int, b_only: int, n: int) -> None:
    a = torch.arange(n) < a_only
    b = torch.arange(n) >= n - b_only
    found = paired_difference(a, b)
    difference = a.numpy().astype(int) - b.numpy().astype(int)
    assert [found.low, found.high] == pytest.approx(brute_force(difference, 0.95), abs=100 / n + 1e-9)


def test_an_interval_of_400_images_agrees_with_the_normal_approximation() -> None:
    low, high = bootstrap_interval(with_correct(317, 400))
    half = 196 * (0.7925 * 0.2075 / 400) ** 0.5
    assert (low, high) == pytest.approx((79.25 - half, 79.25 + half), abs=0.3)


@given(bools, st.floats(0.5, 0.999), st.integers(0, 99))
def test_an_interval_contains_the_mean(correct: Tensor, level: float, seed: int) -> None:
    low, high = bootstrap_interval(correct, level=level, resamples=2000, seed=seed)
    mean = 100 * correct.double().mean().item()
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 100


@given(bools)
def test_a_higher_level_gives_a_wider_interval(correct: Tensor) -> None:
    narrow, wide = (bootstrap_interval(correct, level=level, resamples=1000) for level in (0.6, 0.99))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_varies_when_all_images_are_alike(value: int) -> None:
    assert bootstrap_interval(torch.full((9,), bool(value))) == (100 * value, 100 * value)


def test_the_seed_decides_the_interval() -> None:
    correct = with_correct(317, 400)
    ends = [bootstrap_interval(correct, resamples=50, seed=seed) for seed in (3, 3, 4)]
    assert ends[0] == ends[1] != ends[2]


@given(pairs, st.integers(0, 99))
def test_swapping_the_two_negates_the_difference(ab: tuple[Tensor, Tensor], seed: int) -> None:
    a, b = ab
    forth = paired_difference(a, b, resamples=500, seed=seed)
    back = paired_difference(b, a, resamples=500, seed=seed)
    assert (forth.mean, forth.low, forth.high) == (-back.mean, -back.high, -back.low)
    assert (forth.a_only, forth.b_only) == (back.b_only, back.a_only)
    assert forth.p_value == pytest.approx(back.p_value)


@given(pairs)
def test_the_difference_is_that_of_the_accuracies_and_inside_its_interval(ab: tuple[Tensor, Tensor]) -> None:
    a, b = ab
    found = paired_difference(a, b, resamples=2000)
    assert found.mean == pytest.approx(100 * (a.double().mean() - b.double().mean()).item())
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert found.n == len(a)


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(0, 60))
def test_the_p_value_is_the_exact_mcnemar_test(a_only: int, b_only: int) -> None:
    n = a_only + b_only + 3
    found = paired_difference(torch.arange(n) < a_only, torch.arange(n) >= n - b_only, resamples=1)
    # Two-sided by symmetry at one half: twice the smaller tail.
    tail = stats.binom.cdf(min(a_only, b_only), a_only + b_only, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_pairing_resolves_what_separate_intervals_do_not() -> None:
    a, b = with_correct(320, 400), with_correct(308, 400)
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]
    assert paired_difference(a, b).low > 0


def test_equal_models_differ_by_exactly_nothing() -> None:
    a = with_correct(30, 50)
    found = paired_difference(a, a)
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def several_seeds(seeds: int, images: int) -> np.ndarray:
    """(seeds, images) 0 or 1, of images that are easy or hard and seeds that are good or bad."""
    rng = np.random.default_rng(5)
    chance = rng.normal(size=images) + 0.6 * rng.normal(size=(seeds, 1)) + 0.3
    return (chance + 0.5 * rng.normal(size=(seeds, images)) > 0).astype(float)


@pytest.mark.parametrize("draw_seeds", [True, False])
@pytest.mark.parametrize(("seeds", "images"), [(1, 90), (3, 90), (5, 200)])
def test_the_draw_over_patterns_equals_resampling_images_and_seeds(seeds: int, images: int, draw_seeds: bool) -> None:
    values, rng = several_seeds(seeds, images), np.random.default_rng(1)
    means = []
    for _ in range(6000):
        drawn = values[:, rng.integers(0, images, size=images)]
        few = draw_seeds and seeds > 1
        means.append(drawn[rng.integers(0, seeds, size=seeds - 1)].mean() if few else drawn.mean())
    mean, low, high = mean_over_seeds(torch.from_numpy(values), draw_seeds=draw_seeds)
    assert mean == pytest.approx(100 * values.mean())
    assert [low, high] == pytest.approx([100 * float(q) for q in np.quantile(means, [0.025, 0.975])], abs=1.1)


def test_a_single_seed_has_the_interval_of_its_images() -> None:
    correct = with_correct(317, 400)
    mean, low, high = mean_over_seeds(correct[None])
    assert mean == pytest.approx(79.25)
    assert (low, high) == pytest.approx(bootstrap_interval(correct), abs=0.5)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    values = torch.from_numpy(several_seeds(3, 200))
    widths = [high - low for _, low, high in (mean_over_seeds(values, draw_seeds=draw) for draw in (False, True))]
    assert widths[1] > 1.2 * widths[0]
    alike = values[:1].expand(3, -1)
    assert mean_over_seeds(alike)[1:] == pytest.approx(mean_over_seeds(values[:1])[1:], abs=0.6)


def test_two_seeds_are_drawn_one_at_a_time() -> None:
    """The draws then vary by (b - a)² / 4 = s² / 2, the variance of a mean of two; two draws of two would halve it."""
    a, b = 0.4, 0.7
    mean, low, high = mean_over_seeds(torch.tensor([[a], [b]]).expand(2, 4), level=0.4)
    assert (mean, low, high) == pytest.approx((55, 40, 70))


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
def test_topk_equals_sorting(k: int, classes: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties occur.
    logits = torch.randint(0, 4, (20, classes), generator=draw).float()
    labels = torch.randint(0, classes, (20,), generator=draw)
    # sorted is stable, so equal logits stay in the order of their classes.
    best = [sorted(range(classes), key=row.__getitem__, reverse=True)[:k] for row in logits.tolist()]
    expected = [label in row for label, row in zip(labels.tolist(), best, strict=True)]
    assert topk_correct(logits, labels, k).tolist() == expected


def test_top1_is_argmax_also_for_ties() -> None:
    logits = torch.zeros(5, 10)
    labels = torch.arange(5)
    assert torch.equal(topk_correct(logits, labels, 1), logits.argmax(dim=1) == labels)


def test_kl_equals_scipys_and_is_zero_for_a_shift() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(6, 10, generator=draw, dtype=torch.float64) for _ in range(2))
    expected = rel_entr(p.softmax(1).numpy(), q.softmax(1).numpy()).sum(axis=1)
    assert logit_kl(p, q).numpy() == pytest.approx(expected)
    assert logit_kl(p, p + 5).max() < 1e-12


def test_kl_ignores_a_class_that_both_rule_out() -> None:
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert logit_kl(p, p).item() == 0
    assert logit_kl(p, torch.zeros(1, 3)).isfinite().all()


def test_rounding_for_json() -> None:
    assert rounded(79.123456) == 79.1235
    assert rounded_small(1.23456e-9) == 1.235e-9
    assert rounded(None) is rounded(float("nan")) is rounded_small(float("inf")) is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bootstrap_interval(torch.zeros(0, dtype=torch.bool)), DataError, "no image"),
        (lambda: bootstrap_interval(torch.ones(3)), InputError, "float32"),
        (lambda: bootstrap_interval(torch.ones(3).bool(), level=95), InputError, "0.95, not 95"),
        (lambda: bootstrap_interval(torch.ones(3).bool(), resamples=0), InputError, "not 0"),
        (lambda: paired_difference(torch.ones(3).bool(), torch.ones(4).bool()), InputError, "3 .* 4"),
        (lambda: mean_over_seeds(torch.ones(3)), InputError, r"\(3,\)"),
        (lambda: mean_over_seeds(torch.ones(2, 0)), DataError, "no image"),
        (lambda: mean_over_seeds(torch.ones(2, 3), level=0), InputError, "not 0"),
        (lambda: topk_correct(torch.zeros(2, 3), torch.tensor([0, 3]), 1), DataError, "label 3 .* 3 classes"),
        (lambda: topk_correct(torch.zeros(2, 3), torch.tensor([0, -1]), 1), DataError, "label -1"),
        (lambda: topk_correct(torch.zeros(2, 3), torch.tensor([0]), 1), InputError, r"\(2, 3\) and \(1,\)"),
        (lambda: topk_correct(torch.zeros(1, 3), torch.tensor([0]), 0), InputError, "not 0"),
        (lambda: topk_correct(torch.full((1, 3), torch.nan), torch.tensor([0]), 1), InputError, "NaN"),
    ],
)
def test_what_cannot_be_used_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
