"""The progressive search against slow loops in float64, from the text of reference/methods-1.md, section 8."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitq.calibrate.progressive import finalists
from vitq.quantizers.adaptive_log import FIRST, LAST, AdaptiveLogQuantizer
from vitq.quantizers.base import Params, Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.tan import TanQuantizer
from vitq.quantizers.uniform import UniformQuantizer

GROUPS, VALUES = 5, 300


def values() -> Tensor:
    """Groups of another size, another center and other tails."""
    x = torch.randn(GROUPS, VALUES).pow(3) * torch.logspace(-2, 2, GROUPS)[:, None]
    return x + x.std(1, keepdim=True) * torch.linspace(-0.5, 0.5, GROUPS)[:, None]


def rows(quantizer: type[Quantizer], bits: int, **options: bool | float) -> Quantizer:
    return quantizer(bits, Layout((-2,), (GROUPS,), 2), **options)


def error(quantizer: Quantizer, x: Tensor, params: Params) -> Tensor:
    wide = {name: value[..., None] for name, value in params.items()}
    with torch.no_grad():
        y = quantizer.simulate_with(x.expand(len(wide["scale"]), *x.shape), wide)
    return (y - x).double().square().mean(-1)


def searched(quantizer: Quantizer, x: Tensor, share: float) -> tuple[Params, Tensor]:
    """The best candidate of each group, and its error."""
    now, whole, middle = (
        quantizer.range_to_params(low[None], high[None])
        for low, high in (x.aminmax(dim=1), x.aminmax(dim=1), quantizer.middle(x))
    )
    found = finalists(quantizer, lambda params: error(quantizer, x, params), now, middle, whole, share)
    score = error(quantizer, x, found)
    best = score.argmin(0, keepdim=True)
    return {name: value.gather(0, best)[0] for name, value in found.items()}, score.gather(0, best)[0]


def uniform_error(x: list[float], scale: float, zero_point: float, bits: int) -> float:
    total = 0.0
    for value in x:
        code = min(max(round(value / scale) + zero_point, 0), 2**bits - 1)
        total += ((code - zero_point) * scale - value) ** 2
    return total / len(x)


@pytest.mark.parametrize(("bits", "share", "zero_points"), [(3, 0.5, 4), (3, 1.0, 8), (4, 1.0, 16)])
def test_uniform_scales_and_zero_points_are_those_of_a_slow_loop(bits: int, share: float, zero_points: int) -> None:
    """zero-points x scales from (P90 - P10) / (2^b - 1) to (max - min) / (2^b - 1); 16 kept, 8 children, 6 times."""
    x = values()[:2, ::4]
    quantizer = UniformQuantizer(bits, Layout((-2,), (2,), 2))
    found, score = searched(quantizer, x, share)
    for group, row in enumerate(x.double().tolist()):
        ordered, last, top = sorted(row), len(row) - 1, 2**bits - 1
        low = (ordered[round(0.9 * last)] - ordered[round(0.1 * last)]) / top
        high = (ordered[-1] - ordered[0]) / top
        step = (high - low) / (128 // zero_points - 1)
        first = min(max(round(-ordered[0] / high) - zero_points // 2, 0), 2**bits - zero_points)
        tried = [(low + i * step, first + z) for z in range(zero_points) for i in range(128 // zero_points)]
        for _ in range(5):
            kept = sorted(tried, key=lambda c: uniform_error(row, *c, bits))[:16]
            tried = [(max(s + (i / 7 - 0.5) * step, 1e-4 * high), z) for s, z in kept for i in range(8)]
            step /= 7.5
        scale, zero_point = min(tried, key=lambda c: uniform_error(row, *c, bits))
        assert float(score[group]) == pytest.approx(uniform_error(row, scale, zero_point, bits), rel=1e-4)
        assert float(found["scale"][group]) == pytest.approx(scale, rel=1e-3)
        assert float(found["zero_point"][group]) == zero_point


@pytest.mark.parametrize("bits", [3, 4])
def test_it_is_better_than_a_grid_of_as_many_scales_and_zero_points(bits: int) -> None:
    x, quantizer = values(), rows(UniformQuantizer, bits)
    found, score = searched(quantizer, x, 1.0)
    low, high = x.aminmax(dim=1)
    scale = torch.linspace(0.1, 1.0, 6 * 128 // 2**bits)[:, None] * (high - low) / (2**bits - 1)
    zero_point = torch.arange(2.0**bits)[:, None].expand(-1, GROUPS)
    grid = {
        "scale": scale.repeat(2**bits, 1),
        "zero_point": zero_point.repeat_interleave(len(scale), dim=0),
    }
    best = error(quantizer, x, grid).amin(0)
    assert bool((score <= 1.002 * best).all())
    assert float((score / best).log().mean()) < 0
    assert torch.equal(found["zero_point"], found["zero_point"].round())


def test_bases_and_scales_are_those_of_a_slow_loop() -> None:
    """The best 8 q with the present scale x 16 scales from P90 of the positive values on; 32 kept, 4 children each."""
    x = values().abs()[:2, ::4]
    quantizer = AdaptiveLogQuantizer(4, Layout((-2,), (2,), 2))

    def one(row: Tensor, scale: float, q: float) -> float:
        alone = AdaptiveLogQuantizer(4)
        alone.set_params({"scale": torch.tensor([scale]), "q": torch.tensor([q])})
        return float((alone.decode(alone.encode(row)) - row).double().square().mean())

    found, score = searched(quantizer, x, 1.0)
    for group, row in enumerate(x):
        ordered = row.sort(descending=True).values.tolist()
        low, high = ordered[int(0.1 * len(ordered))], ordered[0]
        bases = sorted(range(FIRST, LAST + 1), key=lambda q: one(row, high, q))[:8]
        step = (high - low) / 15
        tried = [(low + i * step, q) for q in bases for i in range(16)]
        for _ in range(5):
            kept = sorted(tried, key=lambda c: one(row, *c))[:32]
            tried = [(s + (i / 3 - 0.5) * step, q) for s, q in kept for i in range(4)]
            step /= 3.5
        scale, q = min(tried, key=lambda c: one(row, *c))
        assert float(score[group]) == pytest.approx(one(row, scale, q), rel=1e-4)
        assert float(found["q"][group]) == q


def test_where_there_is_no_scale_to_choose_the_base_is_that_of_the_whole_scan() -> None:
    x, quantizer = values().abs().div(50).clamp(max=1), rows(AdaptiveLogQuantizer, 4, unit=True)
    found, score = searched(quantizer, x, 0.5)
    every = quantizer.variants({"scale": torch.ones(1, GROUPS), "q": torch.ones(1, GROUPS)})
    assert torch.equal(score, error(quantizer, x, every).amin(0))
    assert bool((found["scale"] == 1).all())


@pytest.mark.parametrize(
    "quantizer",
    [rows(UniformQuantizer, 3, symmetric=True), rows(TanQuantizer, 3), rows(AdaptiveLogQuantizer, 3, fixed=20.0)],
)
def test_formats_without_zero_points_or_with_curves_of_their_own_are_searched_too(quantizer: Quantizer) -> None:
    x = values().abs() if quantizer.one_sided else values()
    params, score = searched(quantizer, x, 0.5)
    now = quantizer.range_to_params(*(end[None] for end in x.aminmax(dim=1)))
    assert bool((score <= error(quantizer, x, now)[0]).all())
    assert bool((score < 0.98 * error(quantizer, x, now)[0]).any())
    quantizer.set_params(params)


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e-7])
@pytest.mark.parametrize("kind", [UniformQuantizer, AdaptiveLogQuantizer, TanQuantizer])
def test_a_group_of_one_value_gets_finite_parameters(kind: type[Quantizer], constant: float) -> None:
    quantizer = rows(kind, 4)
    params, score = searched(quantizer, torch.full((GROUPS, 1), constant), 1.0)
    assert all(bool(value.isfinite().all()) for value in params.values())
    assert bool((params["scale"] > 0).all())
    assert all(math.isfinite(value) for value in score.tolist())
