"""Each format against its formula in float64, from the text of reference/methods-1.md, sections 0 and 3."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitq.quantizers.log import Log2Quantizer, LogSqrt2Quantizer
from vitq.quantizers.uniform import UniformQuantizer

BITS = (2, 3, 4, 6, 8)


def affine(x: Tensor, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """q = clamp(round(x/s) + z, 0, 2^b - 1), x^ = s (q - z), s = (max - min)/(2^b - 1), z = round(-min/s)."""
    step = (high - low) / (2**bits - 1)
    zero = torch.tensor(-low / step, dtype=torch.float64).round()
    code = ((x.double() / step).round() + zero).clamp(0, 2**bits - 1)
    return code, step * (code - zero)


def symmetric(x: Tensor, magnitude: float, bits: int) -> tuple[Tensor, Tensor]:
    """clamp(round(x/D), -2^(b-1), 2^(b-1) - 1) D with D = absmax/(2^(b-1) - 0.5); codes counted from 0."""
    step = magnitude / (2 ** (bits - 1) - 0.5)
    code = (x.double() / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return code + 2 ** (bits - 1), step * code


def log2(x: Tensor, step: float, bits: int) -> tuple[Tensor, Tensor]:
    """q = round(-log2(A/s)); s 2^-q, and exact zero from q = 2^b on."""
    code = (-(x.double() / step).log2()).round().clamp(min=0)
    return code, torch.where(code >= 2**bits, 0.0, step * 2.0**-code)


def log_sqrt2(x: Tensor, step: float, bits: int) -> tuple[Tensor, Tensor]:
    """q = round(-2 log2(A/s)); s 2^-ceil(q/2) (1 + (q mod 2)(sqrt2 - 1)), and exact zero from q = 2^b on."""
    code = (-2 * (x.double() / step).log2()).round().clamp(min=0)
    finite = code.clamp(max=2**bits)
    value = step * 2.0 ** -(finite / 2).ceil() * (1 + (finite % 2) * (math.sqrt(2) - 1))
    return code, torch.where(code >= 2**bits, 0.0, value)


def away_from_ties(position: Tensor, margin: float = 1e-3) -> Tensor:
    """Where float32 and float64 cannot disagree about rounding."""
    return ((position - position.floor()) - 0.5).abs() > margin


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.0, 7.7), (-5.0, -0.5), (2.0, 3.0), (-1e-4, 1e-4), (-9e6, 1e6)]
)
def test_affine_codes_and_values_are_those_of_the_formula(bits: int, low: float, high: float) -> None:
    quantizer = UniformQuantizer(bits)
    quantizer.set_params(quantizer.range_to_params(torch.tensor([low]), torch.tensor([high])))
    low, high = float(torch.tensor(low)), float(torch.tensor(high))  # what float32 makes of them
    x = torch.empty(5000).uniform_(low - 0.3 * (high - low), high + 0.3 * (high - low))
    code, value = affine(x, low, high, bits)
    sure = away_from_ties(x.double() * (2**bits - 1) / (high - low))
    assert sure.sum() > 4900
    assert torch.equal(quantizer.encode(x)[sure].double(), code[sure])
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x))[sure].double(), value[sure], rtol=3e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e-7, 0.3, 4.0, 1e8])
def test_symmetric_codes_and_values_are_those_of_the_formula(bits: int, magnitude: float) -> None:
    quantizer = UniformQuantizer(bits, symmetric=True)
    quantizer.set_params(quantizer.range_to_params(torch.tensor([-0.5 * magnitude]), torch.tensor([magnitude])))
    x = torch.empty(5000).uniform_(-1.3 * magnitude, 1.3 * magnitude)
    code, value = symmetric(x, float(torch.tensor(magnitude)), bits)
    sure = away_from_ties(x.double() / magnitude * (2 ** (bits - 1) - 0.5))
    assert torch.equal(quantizer.encode(x)[sure].double(), code[sure])
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x))[sure].double(), value[sure], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3])
@pytest.mark.parametrize(
    ("kind", "oracle", "steps"), [(Log2Quantizer, log2, 1), (LogSqrt2Quantizer, log_sqrt2, 2)], ids=["log2", "logsqrt2"]
)
def test_log_codes_and_values_are_those_of_the_formula(
    kind: type[Log2Quantizer | LogSqrt2Quantizer], oracle: object, steps: int, bits: int, scale: float
) -> None:
    assert callable(oracle)
    x = torch.cat([torch.rand(3000) * 1.2 * scale, scale * torch.empty(3000).uniform_(-(2.0**bits), 0.3).exp2()])
    true_scale = float(torch.tensor(scale))
    code, value = oracle(x, true_scale, bits)
    sure = away_from_ties(-steps * (x.double() / true_scale).log2())
    theirs = kind(bits, extra_zero_level=True)  # the papers' code: 2**bits codes, and zero beyond them
    theirs.set_params({"scale": torch.tensor(scale)})
    assert torch.equal(theirs.encode(x)[sure].double(), code.clamp(max=2**bits)[sure])
    torch.testing.assert_close(theirs.decode(theirs.encode(x))[sure].double(), value[sure], rtol=1e-6, atol=0)
    ours = kind(bits)  # zero begins where theirs does; the code that means zero gives its values to its neighbour
    ours.set_params({"scale": torch.tensor(scale)})
    last, zero = 2**bits - 2, code >= 2**bits
    expected_code = torch.where(zero, 2.0**bits - 1, code.clamp(max=last))
    assert torch.equal(ours.encode(x)[sure].double(), expected_code[sure])
    expected = torch.where(zero, 0.0, true_scale * 2.0 ** (-code.clamp(max=last) / steps))
    torch.testing.assert_close(ours.decode(ours.encode(x))[sure].double(), expected[sure], rtol=1e-6, atol=0)


def test_the_two_ways_to_write_a_power_of_sqrt2_agree() -> None:
    quantizer = LogSqrt2Quantizer(6)
    quantizer.set_params({"scale": torch.tensor(1.0)})
    code = torch.arange(63)
    expected = 2.0 ** -(code.double() / 2).ceil() * (1 + (code % 2) * (math.sqrt(2) - 1))
    torch.testing.assert_close(quantizer.decode(code).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Log2Quantizer, LogSqrt2Quantizer])
def test_a_negative_value_has_no_logarithm_and_becomes_zero(kind: type[Log2Quantizer | LogSqrt2Quantizer]) -> None:
    quantizer = kind(4)
    quantizer.set_params({"scale": torch.tensor(1.0)})
    assert torch.equal(quantizer.decode(quantizer.encode(torch.tensor([-1.0, -1e-30, 0.0]))), torch.zeros(3))


@given(low=st.floats(-1e4, 1e4, width=32), width=st.floats(2.0**-10, 1e4, width=32), bits=st.sampled_from(BITS))
def test_an_affine_range_is_covered_to_half_a_step(low: float, width: float, bits: int) -> None:
    quantizer = UniformQuantizer(bits)
    ends = torch.tensor([low, low + width])
    quantizer.set_params(quantizer.range_to_params(ends[:1], ends[1:]))
    x = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 257))
    error = (quantizer.decode(quantizer.encode(x)) - x).abs().max()
    # Rounding the zero-point moves the grid by up to half a step, so an end may be one step off.
    assert error <= quantizer.scale * (1 + 1e-2)
    assert float(quantizer.zero_point) == float(quantizer.zero_point.round())


@pytest.mark.parametrize("constant", [3.0, -3.0, 1e-3, 1e20, -1e-5])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_is_exact_and_its_zero_point_is_in_code_range(bits: int, constant: float) -> None:
    quantizer = UniformQuantizer(bits)
    value = torch.tensor([constant])
    quantizer.set_params(quantizer.range_to_params(value, value))
    torch.testing.assert_close(quantizer.decode(quantizer.encode(value)), value, rtol=2e-7, atol=0)
    assert 0 <= float(quantizer.zero_point) <= 2**bits - 1
    assert float(quantizer.decode(quantizer.encode(torch.zeros(1)))) == 0.0


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_range_finer_than_float32_resolves_still_gives_values_that_stay(bits: int) -> None:
    """2**24 steps away from zero codes come in multiples of 16, and quantizing twice moved values."""
    quantizer = UniformQuantizer(bits)
    ends = torch.tensor([1000.0, 1000.0 + 2e-3])
    quantizer.set_params(quantizer.range_to_params(ends[:1], ends[1:]))
    x = torch.linspace(999.999, 1000.004, 301)
    once = quantizer.decode(quantizer.encode(x))
    assert torch.equal(quantizer.decode(quantizer.encode(once)), once)
    assert (once - x).abs().max() <= 1000 / (2**bits - 1) + 4e-3


def test_gradients_with_respect_to_scale_agree_with_finite_differences_of_the_straight_through_form() -> None:
    """d/ds of s * (clamp(round(x/s)) ) with round passed through: round(x/s) - x/s inside, the code at the ends."""
    quantizer = UniformQuantizer(3)
    quantizer.set_params({"scale": torch.tensor(0.5), "zero_point": torch.tensor(4.0)})
    quantizer.learn()
    assert isinstance(quantizer.scale, torch.nn.Parameter)
    x = torch.tensor([-9.0, -0.7, 0.3, 0.9, 9.0])
    for value in x:
        quantizer.scale.grad = None
        quantizer(value[None]).sum().backward()
        inside = value / 0.5
        expected = inside.round() - inside if -4 <= inside.round() <= 3 else inside.clamp(-4, 3)
        assert quantizer.scale.grad is not None
        torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-5, atol=1e-6)


def test_scales_stay_float32_when_a_model_changes_its_type() -> None:
    quantizer = UniformQuantizer(4)
    quantizer.set_params(quantizer.range_to_params(torch.tensor([-0.1234567]), torch.tensor([1.7654321])))
    before = quantizer.params()["scale"].clone()
    quantizer.to(torch.bfloat16)
    assert quantizer.params()["scale"].dtype == torch.float32
    assert torch.equal(quantizer.params()["scale"], before)
