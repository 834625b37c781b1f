"""Properties of every registered format over drawn inputs: types, shapes, memory layouts, scales, thresholds.

What tests/conformance/test_formats.py shows for chosen tensors is shown here for whatever hypothesis finds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitq.core.format import Format
from vitq.quantizers.base import Quantizer
from vitq.quantizers.packing import pack, packed_size, unpack
from vitq.quantizers.registry import QUANTIZERS, build_quantizer

BITS = (2, 3, 4, 6, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = ("batch", "token", "channel")
POWER_OF_TWO = ("uniform", "log2", "logsqrt2")  # whose arithmetic scales exactly with powers of two
LOGS = ("log2", "logsqrt2")
TINY = torch.finfo(torch.float32).tiny
each_kind = pytest.mark.parametrize("kind", list(QUANTIZERS))
each_log = pytest.mark.parametrize("kind", LOGS)
bits_of = st.sampled_from(BITS)
shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 10**6)
exponents = st.integers(-90, 90)
scales = st.floats(2.0**-99, 2.0**99, width=32)  # about 1e-30 to 1e30
granularity = st.sampled_from(["tensor", "channel", "token", "group:2"])


def normal(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(kind: str, bits: int, per: str, shape: tuple[int, ...], seed: int, power: int = 0) -> Quantizer:
    """A quantizer for (batch, token, channel) tensors, with a range of its own in every scale group."""
    quantizer = build_quantizer(Format.of(kind, bits, per), AXES, shape)
    low = -normal((quantizer.layout.groups,), seed).abs() - 0.1
    high = normal((quantizer.layout.groups,), seed + 1).abs() + 0.1
    quantizer.set_params(quantizer.range_to_params(low * 2.0**power, high * 2.0**power))
    quantizer.state = "on"
    return quantizer


def scaled(kind: str, bits: int, scale: float) -> Quantizer:
    quantizer = QUANTIZERS[kind](bits)
    quantizer.set_params(quantizer.range_to_params(torch.zeros(1), torch.tensor([scale])))
    quantizer.state = "on"
    return quantizer


def inner(quantizer: Quantizer) -> dict[str, Tensor]:
    """Parameters as (groups, 1)."""
    return {name: value.reshape(quantizer.layout.groups, 1) for name, value in quantizer.params().items()}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """(batch, token, channel) tensors of every type and memory layout, with even channels."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), 2 * draw(st.integers(1, 4)))
    x = normal(shape, draw(seeds), draw(st.sampled_from([1e-3, 1.0, 30.0]))).to(draw(st.sampled_from(DTYPES)))
    way = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "offset"]))
    if way == "transposed":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif way == "sliced":
        x = torch.stack([x, x + 1], -1).flatten(2)[..., ::2]
    elif way == "expanded":
        x = x[:1].expand(shape)
    elif way == "offset":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape)
    return x


# -- encode, decode, forward ---------------------------------------------------------------------------------


@each_kind
@given(tensors(), bits_of, granularity, seeds)
def test_forward_is_decode_of_encode_for_every_type_and_layout(
    kind: str, x: Tensor, bits: int, per: str, seed: int
) -> None:
    quantizer = built(kind, bits, per, tuple(x.shape), seed)
    before = x.clone()
    code = quantizer.encode(x)
    expected = quantizer.decode(code).to(x.dtype)
    assert torch.equal(quantizer(x), expected)
    with torch.no_grad():
        found = quantizer(x)
    assert torch.equal(found, expected)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert torch.equal(x, before), "the input is not changed"
    assert found.data_ptr() != x.data_ptr()
    for row in quantizer.layout.by_group(quantizer.decode(code)):
        assert row.unique().numel() <= 2**bits
    if x.dtype == torch.float32:
        assert torch.equal(quantizer(found), found)


@each_kind
@given(bits_of, shapes, seeds, exponents)
def test_a_code_that_is_reached_is_the_code_of_its_value(
    kind: str, bits: int, shape: tuple[int, ...], seed: int, power: int
) -> None:
    quantizer = built(kind, bits, "tensor", shape, seed, power)
    reached = quantizer.encode(normal(shape, seed + 2, 2.0**power)).unique()
    value = quantizer.decode(reached)
    kept = (value == 0) | (value.abs() >= TINY)  # numbers below have fewer bits than a level needs
    assert torch.equal(quantizer.encode(value)[kept], reached[kept])


@each_kind
@given(bits_of, seeds, st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32))
def test_a_larger_value_never_gets_a_smaller_one(kind: str, bits: int, seed: int, a: float, b: float) -> None:
    quantizer = built(kind, bits, "tensor", (1,), seed)
    x = torch.cat([normal((200,), seed), torch.tensor([a, b, 0.0])]).sort().values
    y = quantizer(x)
    assert bool((y.diff() >= 0).all())
    step = quantizer.encode(x).diff()
    assert bool(((step <= 0) if quantizer.descending else (step >= 0)).all())


@each_kind
@settings(max_examples=15)
@given(bits_of, granularity, seeds, st.integers(-60, 60))
def test_lowered_thresholds_are_exact_at_below_and_above(kind: str, bits: int, per: str, seed: int, power: int) -> None:
    quantizer = built(kind, bits, per, (2, 3, 4), seed, power)
    lowered, params = quantizer.lower(), inner(quantizer)
    at = lowered.thresholds.masked_fill(lowered.thresholds.isinf(), 0.0)
    for x in (at, at.nextafter(torch.tensor(math.inf)), at.nextafter(torch.tensor(-math.inf))):
        index = lowered.index(x)
        code = quantizer.encode_with(x, params)
        assert torch.equal(lowered.codes[index].float(), code)
        with torch.no_grad():
            assert torch.equal(quantizer.simulate_with(x, params), lowered.levels.gather(1, index))
    reached = lowered.thresholds.isfinite()
    index = torch.arange(1, 2**bits).expand_as(reached)
    assert bool((lowered.index(at)[reached] >= index[reached]).all())
    assert bool((lowered.index(at.nextafter(torch.tensor(-math.inf)))[reached] < index[reached]).all())


@each_kind
@given(bits_of, granularity, seeds)
def test_a_state_dict_carries_everything_that_is_fitted(kind: str, bits: int, per: str, seed: int) -> None:
    shape = (2, 3, 4)
    quantizer, other = built(kind, bits, per, shape, seed), build_quantizer(Format.of(kind, bits, per), AXES, shape)
    other.load_state_dict(quantizer.state_dict())
    x = normal(shape, seed + 3)
    assert torch.equal(other.encode(x), quantizer.encode(x))
    assert all(torch.equal(a, b) for a, b in zip(other.params().values(), quantizer.params().values(), strict=True))


@pytest.mark.parametrize("kind", POWER_OF_TWO)
@given(bits_of, seeds, st.integers(-40, 40))
def test_scaling_by_a_power_of_two_scales_the_values_and_keeps_the_codes(
    kind: str, bits: int, seed: int, power: int
) -> None:
    factor = 2.0**power
    quantizer, x = built(kind, bits, "tensor", (64,), seed), normal((64,), seed + 2)
    larger = QUANTIZERS[kind](bits)
    params = quantizer.params()
    larger.set_params(params | {"scale": params["scale"] * factor})
    larger.state = "on"
    assert torch.equal(larger.encode(x * factor), quantizer.encode(x))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = quantizer(x)
            kept = (y == 0) | ((y * factor).abs() >= TINY)
            assert torch.equal(larger(x * factor)[kept], (y * factor)[kept])


@given(st.sampled_from((2, 3, 4, 6, 8)), shapes, seeds, st.booleans())
def test_packed_codes_of_any_shape_come_back(bits: int, shape: tuple[int, ...], seed: int, turned: bool) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).float()
    codes = codes.T if turned and codes.ndim == 2 else codes
    packed = pack(codes, bits)
    assert packed.numel() == packed_size(codes.numel(), bits)
    assert torch.equal(unpack(packed, bits, codes.numel()).reshape(codes.shape).float(), codes)


# -- what must not be passed over ----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("state", ["on", "learn"])
def test_nan_stays_nan_and_touches_nothing_else(kind: str, grad: bool, state: str) -> None:
    """Found by this test: the exponent bits of NaN are those of a large number, so it became the scale."""
    for bits in BITS:
        quantizer = scaled(kind, bits, 0.7)
        if state == "learn":
            quantizer.learn()
        x = torch.rand(67)
        expected = quantizer(x).detach()
        bad = torch.zeros(67, dtype=torch.bool)
        bad[[0, 31, 66]] = True
        for nan in (math.nan, -math.nan):
            with torch.set_grad_enabled(grad):
                found = quantizer(x.masked_fill(bad, nan)).detach()
            assert bool(found[bad].isnan().all()), bits
            assert torch.equal(found[~bad], expected[~bad])


@each_kind
@given(bits_of, scales)
def test_infinity_and_zero_go_to_the_ends(kind: str, bits: int, scale: float) -> None:
    quantizer = scaled(kind, bits, scale)
    x = torch.tensor([-math.inf, -1.0, -0.0, 0.0, math.inf])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = quantizer(x)
        assert torch.equal(y[:4], torch.zeros(4))
        torch.testing.assert_close(y[4], torch.tensor(scale), rtol=1e-5, atol=0)


# -- logarithms on exponent bits -----------------------------------------------------------------------------


def hostile(scale: float) -> Tensor:
    """Subnormals, zeros, negative values, values above the scale, and both sides of every level and threshold."""
    steps = torch.arange(0, 300, dtype=torch.float64) / 4
    near = (scale * 2.0**-steps).float()
    big = torch.tensor(3.4e38)
    return torch.cat(
        [
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, TINY, -TINY, 3e38, -3e38, scale, -scale, 2 * scale, 1e30]),
            near,
            near.nextafter(big),
            near.nextafter(-big),
            torch.linspace(-1.5 * scale, 1.5 * scale, 201),
        ]
    ).nan_to_num(posinf=3.4e38, neginf=-3.4e38)


@each_log
@pytest.mark.parametrize("extra", [False, True])
@given(bits_of, scales)
def test_simulating_in_place_is_decode_of_encode_on_hostile_values(
    kind: str, extra: bool, bits: int, scale: float
) -> None:
    options: dict[str, Any] = {"extra_zero_level": True} if extra else {}
    quantizer = QUANTIZERS[kind](bits, **options)
    quantizer.set_params({"scale": torch.tensor([scale])})
    quantizer.state = "on"
    x = hostile(scale)
    before = x.clone()
    code = quantizer.encode(x)
    expected = quantizer.decode(code)
    assert bool(((code >= 0) & (code <= quantizer.zero_code) & (code == code.round())).all())  # type: ignore[operator]
    assert bool(((expected >= 0) & (expected <= scale)).all())
    with torch.no_grad():
        found = quantizer(x)
    # Levels below the normal numbers round once in one way and twice in the other.
    normal_level = (expected == 0) | (expected >= TINY)
    assert torch.equal(found[normal_level], expected[normal_level])
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(x, before)


@each_log
@given(bits_of, scales)
def test_codes_are_those_of_the_logarithm_in_float64(kind: str, bits: int, scale: float) -> None:
    quantizer = QUANTIZERS[kind](bits)
    quantizer.set_params({"scale": torch.tensor([scale])})
    steps = 2 if kind == "logsqrt2" else 1
    x = hostile(scale)
    position = -steps * (x.double() / float(torch.tensor(scale))).log2()
    sure = (x > TINY) & (((position - position.floor()) - 0.5).abs() > 1e-4) & (position < 120)
    last = min(2**bits - 2, 123)
    expected = position.round().clamp(0, last)
    expected = torch.where(position.round() >= min(2**bits, 124), 2.0**bits - 1, expected)
    assert torch.equal(quantizer.encode(x).double()[sure], expected[sure])
    assert bool((quantizer.encode(x)[x <= 0] == 2**bits - 1).all())


@each_log
@given(bits_of, st.floats(2.0**-66, 2.0**66, width=32), seeds)
def test_gradients_while_learning_are_finite_and_reach_the_scale(kind: str, bits: int, scale: float, seed: int) -> None:
    quantizer = scaled(kind, bits, scale)
    quantizer.learn()
    x = torch.cat([normal((40,), seed).abs() * scale, torch.tensor([0.0, -scale, 1e-45, 3 * scale])]).requires_grad_()
    y = quantizer(x)
    assume(bool((y > 0).any()))
    (y / scale).sum().backward()
    (parameter,) = quantizer.parameters()
    assert x.grad is not None
    assert parameter.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(parameter.grad.isfinite().all())
    assert bool((x.grad[x > scale] == 0).all()) or bool(x.grad.abs().max() > 0)
    with torch.no_grad():
        assert torch.equal(quantizer(x), y)


@each_log
def test_a_huge_scale_does_not_overflow_on_the_way(kind: str) -> None:
    """Found by this test: without gradients, values were doubled before they were scaled down."""
    quantizer = scaled(kind, 4, 3.4e38)
    x = torch.tensor([3.4e38, 1.7e38, 1e37, 0.0])
    with torch.no_grad():
        assert bool(quantizer(x).isfinite().all())
        assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))
