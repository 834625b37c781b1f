"""DeMax against a slow float64 oracle written from the reference text, row by row, and on attention as it comes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.quantizers.demax import DeMaxQuantizer

BITS = (2, 3, 4, 6, 8)


def oracle(row: list[float], bits: int) -> list[float]:
    """Take the largest element out, quantize what is left uniformly up to the second largest, put it back."""
    at = row.index(max(row))
    rest = [value for place, value in enumerate(row) if place != at]
    step = max(rest, default=0.0) / (2**bits - 1)
    values = [step * min(round(value / step), 2**bits - 1) if step > 0 else 0.0 for value in rest]
    return [*values[:at], row[at], *values[at:]]


def attention(shape: tuple[int, ...] = (2, 3, 17, 17), sharpness: float = 3.0) -> Tensor:
    scores = sharpness * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return scores.softmax(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 6.0])
def test_values_are_those_of_the_oracle(bits: int, sharpness: float) -> None:
    x = attention(sharpness=sharpness)
    expected = torch.tensor([oracle(row, bits) for row in x.double().flatten(0, -2).tolist()], dtype=torch.float64)
    found = DeMaxQuantizer(bits)(x).double().flatten(0, -2)
    wide = x.double().flatten(0, -2)
    step = wide.topk(2).values[:, 1:] / (2**bits - 1)
    sure = ((wide / step % 1) - 0.5).abs() > 1e-4  # float32 may fall on the other side of a threshold
    assert float(sure.double().mean()) > 0.99
    torch.testing.assert_close(found[sure], expected[sure], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_holds_few_values_besides_the_kept_one(bits: int) -> None:
    for row in DeMaxQuantizer(bits)(attention((4, 300))):
        assert row.unique().numel() <= 2**bits + 1


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_is_exact_and_so_is_the_order(bits: int) -> None:
    x = attention()
    y = DeMaxQuantizer(bits)(x)
    assert torch.equal(y.max(-1).values, x.max(-1).values)
    assert torch.equal(y.argmax(-1), x.argmax(-1))
    second = x.topk(2).values[..., 1]
    torch.testing.assert_close(y.topk(2).values[..., 1], second, rtol=1e-6, atol=0)


def test_of_two_largest_one_is_kept_and_the_other_gets_the_last_code() -> None:
    x = torch.tensor([0.1, 0.4, 0.1, 0.4])
    code, side = DeMaxQuantizer(4).encode_rows(x)
    assert side["index"].item() == 1
    assert code.tolist() == [4.0, 0.0, 4.0, 15.0]  # 0.1 / (0.4 / 15) = 3.75
    torch.testing.assert_close(DeMaxQuantizer(4)(x), torch.tensor([4, 15, 4, 15]) * 0.4 / 15)


@pytest.mark.parametrize(
    "row",
    [[1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
    ids=["one", "one-hot", "zero", "constant"],
)
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_one_or_two_values_are_exact(row: list[float], bits: int) -> None:
    """The official code divides 0 by 0 where nothing but the largest is left."""
    x = torch.tensor([row, row])
    torch.testing.assert_close(DeMaxQuantizer(bits)(x), x, rtol=1e-6, atol=0)


def test_masked_attention_keeps_its_zeros() -> None:
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[0] = False  # this query sees nothing: zeros, as fused kernels have it
    scores = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(1)).masked_fill(~mask, -torch.inf)
    x = scores.softmax(-1).nan_to_num(nan=0.0)
    y = DeMaxQuantizer(4)(x)
    assert bool((y[:, ~mask] == 0).all())
    assert torch.equal(y[:, 1, 0], x[:, 1, 0]) or torch.equal(y[:, 1, 1], x[:, 1, 1])
    assert bool(y.isfinite().all())


def test_rows_lie_along_the_dimension_that_is_summed() -> None:
    x = attention((2, 5, 7))
    assert torch.equal(DeMaxQuantizer(4, -2)(x.mT), DeMaxQuantizer(4)(x).mT)


def test_peaked_rows_lose_less_than_with_one_scale_for_all() -> None:
    """The mechanism: without it the largest probability sets the step of all others."""
    x = attention((4, 50, 50), sharpness=4.0)
    step = x.max() / 15
    uniform = (x / step).round().clamp(0, 15) * step
    values = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(2))
    errors = [float(((y - x) @ values).square().sum()) for y in (DeMaxQuantizer(4)(x), uniform)]
    assert errors[0] < 0.3 * errors[1]


def test_side_information_is_two_floats_and_a_place() -> None:
    assert DeMaxQuantizer(4).row_bits(197) == 32 + 32 + 8
    assert DeMaxQuantizer(4).row_bits(1) == 64
    assert DeMaxQuantizer(4).carried_bits((2, 3, 197, 197)) == 2 * 3 * 197 * 72


def test_gradients_go_through_what_is_kept_and_through_the_steps() -> None:
    x = attention((3, 20)).requires_grad_()
    weights = torch.linspace(-1, 1, 20)
    (DeMaxQuantizer(4)(x) * weights).sum().backward()
    assert x.grad is not None
    largest = x.argmax(-1)
    assert torch.equal(x.grad.gather(-1, largest[:, None])[:, 0], weights[largest])
    assert bool((x.grad != 0).any(dim=1).all())


def test_it_works_inside_a_fused_attention_that_is_exported() -> None:
    quantizer, x = DeMaxQuantizer(4), attention((2, 6, 6))
    program = torch.export.export(quantizer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=8)},))
    assert torch.equal(program.module()(F.pad(x, (0, 0, 0, 0, 0, 1))), quantizer(F.pad(x, (0, 0, 0, 0, 0, 1))))
