"""Statistics are exact where that is promised, and close where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitq.calibrate import observe
from vitq.calibrate.observe import Sketch, Statistics
from vitq.core.errors import DataError

PROBABILITIES = (0.999, 0.9999, 0.99999, 1 - 0.999, 1 - 0.9999, 1 - 0.99999, 1.0, 0.0)


def gather(x: Tensor, parts: int = 1, **options: bool) -> Statistics:
    sketch = Sketch(images=parts if parts > 1 else None, **options)
    for part in x.tensor_split(parts, dim=1):
        sketch.observe(part)
    return sketch.statistics()


def shapes(name: str, groups: int, count: int) -> Tensor:
    x = torch.randn(groups, count)
    return {
        "normal": x * (10 ** torch.randn(groups, 1)),
        "heavy tails": x**5,
        "relu": x.relu(),
        "few values": (3 * x).round(),
        "constant": torch.full_like(x, -2.5),
        "one outlier": torch.cat([x[:, 1:], x.new_full((groups, 1), 1e6)], 1),
        "ascending": x.sort(dim=1).values,
    }[name]


KINDS = ("normal", "heavy tails", "relu", "few values", "constant", "one outlier", "ascending")


# torch.quantile took its rank in float32 before 2.15, ours is in float64.
bit_equal = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 15), reason="torch.quantile rounds ranks before 2.15"
)


@bit_equal
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 2049])
def test_quantiles_of_kept_values_are_torch_quantiles_bit_for_bit(kind: str, groups: int, count: int) -> None:
    x = shapes(kind, groups, count)
    stats = gather(x)
    assert stats.exact
    for p in (*PROBABILITIES, 0.25, 0.5, 0.97):
        assert torch.equal(stats.quantile(p), torch.quantile(x, p, dim=1)), p


@bit_equal
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 3, 19])
@pytest.mark.parametrize(("groups", "count"), [(1, 2**18 + 4001), (48, 6007)])
def test_quantiles_from_tails_are_torch_quantiles_bit_for_bit(kind: str, parts: int, groups: int, count: int) -> None:
    x = shapes(kind, groups, count)
    stats = gather(x, parts)
    assert not stats.exact
    assert stats.count == count
    for p in PROBABILITIES:
        expected = torch.stack([torch.quantile(row, p) for row in x])
        assert torch.equal(stats.quantile(p), expected), p
    assert torch.equal(stats.low, x.amin(1))
    assert torch.equal(stats.high, x.amax(1))


@pytest.mark.parametrize("parts", [2, 7, 40])
@pytest.mark.parametrize("keep_all", [False, True])
def test_streamed_values_give_the_statistics_of_one_batch(parts: int, keep_all: bool) -> None:
    x = torch.randn(3, 2000 if not keep_all else 200_000)
    whole, streamed = gather(x, keep_all=keep_all), gather(x, parts, keep_all=keep_all)
    assert streamed.exact
    assert streamed.count == whole.count
    assert torch.equal(streamed.body, whole.body)
    assert torch.equal(streamed.body, x.sort(dim=1).values)


def test_a_percentile_that_is_not_in_the_tails_is_an_error_and_not_a_guess() -> None:
    stats = gather(torch.randn(1, 2**18 + 1))
    with pytest.raises(DataError, match=r"99\.9"):
        stats.quantile(0.97)


def test_memory_is_bounded_however_much_is_seen() -> None:
    sketch = Sketch(images=60)
    for _ in range(60):
        sketch.observe(torch.randn(1, 30_000))
    stats = sketch.statistics()
    assert stats.count == 1_800_000
    kept = stats.body.numel() + stats.top.numel() + stats.bottom.numel()
    assert kept < 1.2 * observe.SAMPLE + 4 * observe.TAIL * stats.count + 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 16])
def test_every_value_is_counted_once_by_tails_and_body(kind: str, groups: int) -> None:
    x = shapes(kind, groups, 2**18 + 777 if groups == 1 else 20_011)
    stats = gather(x)
    assert not stats.exact
    counted = stats.bottom.shape[1] + stats.top.shape[1] + stats.body.isfinite().sum(1) * stats.body_weight
    torch.testing.assert_close(counted, torch.full((groups,), float(stats.count)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["normal", "relu", "few values"])
def test_the_rounding_error_of_the_body_is_estimated_closely(kind: str) -> None:
    """Found by this test: half of a ReLU's values equal the end of its lower tail, and were taken out of the body."""
    x = shapes(kind, 1, 2**18 + 777)
    x = x / x.abs().amax()
    stats = gather(x)

    def error(values: Tensor) -> Tensor:
        return ((values * 7.3).round() / 7.3 - values).square().double()

    estimate = error(stats.body).nansum(1) * stats.body_weight + error(stats.top).sum(1) + error(stats.bottom).sum(1)
    torch.testing.assert_close(estimate / stats.count, error(x).mean(1), rtol=0.03, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.randn(2, 50)
    x[1, 7] = bad
    with pytest.raises(DataError, match="NaN or Inf"):
        Sketch().observe(x)


def test_no_values_at_all_are_an_error() -> None:
    with pytest.raises(DataError, match="saw no values"):
        Sketch().statistics()


def test_what_was_gathered_does_not_follow_later_changes_of_the_tensor() -> None:
    """Found by this test: a model that goes on to change an activation in place changed its statistics."""
    x = torch.randn(1, 500)
    sketch, before = Sketch(), x.clone()
    sketch.observe(x)
    x.mul_(100)
    assert torch.equal(sketch.statistics().body, before.sort(dim=1).values)


@pytest.mark.parametrize("count", [10, 37, 1000])
def test_a_prime_stride_shares_no_factor_with_the_channel_count(count: int) -> None:
    prime = observe.prime_from(count)
    assert prime >= count
    assert all(prime % d for d in range(2, prime))
