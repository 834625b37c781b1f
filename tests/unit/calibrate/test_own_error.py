"""Errors from sums of sorted values, against quantizing every value."""

from __future__ import annotations

import pytest
import torch

from vitq.calibrate.judge import Judge
from vitq.calibrate.objective import OBJECTIVES
from vitq.calibrate.own_error import WORTH, OwnError
from vitq.calibrate.products import Chunk, Product
from vitq.core.site import Site
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer


def values(groups: int, count: int) -> torch.Tensor:
    x = torch.randn(groups, count).mul(torch.rand(groups, 1) * 4)
    x[:, ::7] = x[:, ::7].round()  # equal ones, some of them halfway between levels
    x[0, 0] *= 30
    return x


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_mean_square_of_what_quantizing_loses(bits: int, symmetric: bool) -> None:
    quantizer, x = UniformQuantizer(bits, symmetric=symmetric), values(3, WORTH * 2**bits)
    factors = torch.linspace(0.05, 1.3, 11)[:, None]
    params = quantizer.range_to_params(factors * x.amin(1), factors * x.amax(1))
    params["scale"][0] = 1.0
    found = OwnError(quantizer, x)(params)
    for k in range(len(factors)):
        one = {name: value[k][:, None].double() for name, value in params.items()}
        code = (x.double() / one["scale"] + one["zero_point"]).round().clamp(0, 2**bits - 1)
        error = (code - one["zero_point"]) * one["scale"] - x.double()
        torch.testing.assert_close(found[k], error.square().mean(1), rtol=1e-9, atol=0)


def test_it_serves_where_there_are_many_values_and_whole_zero_points() -> None:
    many, few = torch.zeros(2, WORTH * 16), torch.zeros(2, WORTH * 16 - 1)
    assert OwnError.serves(UniformQuantizer(4), many)
    assert not OwnError.serves(UniformQuantizer(4), few)
    assert not OwnError.serves(UniformQuantizer(4, fractional_zero_point=True), many)


def test_a_judge_asks_it_for_operands_alone_and_gets_what_comparing_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = values(WORTH * 8 + 5, 6), torch.randn(4, 6)
    axes = ("token", "channel")
    left = Site("l", "", "linear", 0, "input", "OTHER_IN", axes, tuple(x.shape))
    right = Site("r", "", "linear", 0, "weight", "WEIGHT", ("channel", "in"), tuple(weight.shape), param="weight")
    quantizer = UniformQuantizer(3, Layout((-1,), (6,), 1))
    params = quantizer.range_to_params(*(f * torch.ones(5, 6) * torch.arange(1, 6)[:, None] for f in (-0.7, 0.9)))
    scores, asked = [], []
    made = OwnError.__init__
    monkeypatch.setattr(OwnError, "__init__", lambda self, *given: [asked.append(name), made(self, *given)][1])
    for name in ("mse", "cosine"):
        judge = Judge(torch.nn.Linear(6, 4), Product("linear", left, right, ""), [Chunk(x, weight, x @ weight.T, None)],
                      (quantizer, None), OBJECTIVES[name])  # fmt: skip
        scores.append(judge.score("left", params, alone=True))
    plain = torch.stack(
        [
            (quantizer.simulate_with(x, {n: v[k] for n, v in params.items()}) - x).square().mean(0, dtype=torch.float64)
            for k in range(5)
        ]
    )
    torch.testing.assert_close(scores[0], plain, rtol=1e-6, atol=0)
    assert not torch.allclose(scores[1], plain)
    assert asked == ["mse"]
