"""The adaptive logarithm against its formula in float64, from the text of reference/methods-1.md, section 8."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.core.errors import InputError
from vitq.core.format import Format
from vitq.quantizers.adaptive_log import FIRST, LAST, OCTAVES, SHIFT, AdaptiveLogQuantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.log import LogSqrt2Quantizer
from vitq.quantizers.registry import build_quantizer

BITS = (2, 3, 4, 6, 8)
BASES = (10, 18.5, 23, 37, 74, 101, 137)


def formula(x: float, scale: float, q: float, bits: int) -> tuple[int, float]:
    """k = round(-(37/q) log2(clamp(x/s, 1e-15, 1))), zero if k >= 2^b; s 2^-T1 T2, T2 in steps of 1/(2^(b+1) - 2)."""
    k = round(-(37 / q) * math.log2(min(max(x / scale, 1e-15), 1.0)))
    if k >= 2**bits:
        return 2**bits, 0.0
    whole, grid = math.floor(k * q / 37), 2 ** (bits + 1) - 2
    return k, scale * 2.0**-whole * round(2.0 ** -(k * q / 37 - whole) * grid) / grid


def position(x: Tensor, scale: float, q: float) -> Tensor:
    return -(37 / q) * (x.double() / scale).clamp(1e-15, 1).log2()


def made(bits: int, q: float, scale: float = 1.0, **options: bool) -> AdaptiveLogQuantizer:
    quantizer = AdaptiveLogQuantizer(bits, **options)
    quantizer.set_params({"scale": torch.tensor([scale]), "q": torch.tensor([float(q)])})
    quantizer.state = "on"
    return quantizer


def samples(scale: float) -> Tensor:
    return torch.cat([torch.rand(400) * 1.2 * scale, scale * torch.empty(400).uniform_(-OCTAVES, 0.3).exp2()])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("q", BASES)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_codes_and_values_are_those_of_the_formula(bits: int, q: float, scale: float) -> None:
    x, true_scale = samples(scale), float(torch.tensor(scale))
    at = position(x, true_scale, q)
    sure = (((at - at.floor()) - 0.5).abs() > 1e-4) & (at < OCTAVES * 37 / q - 1)
    found = [formula(value, true_scale, q, bits) for value in x.tolist()]
    code, value = (torch.tensor(part, dtype=torch.float64) for part in zip(*found, strict=True))
    theirs = made(bits, q, scale, extra_zero_level=True)
    assert torch.equal(theirs.encode(x).double()[sure & (code < 2**bits)], code[sure & (code < 2**bits)])
    torch.testing.assert_close(theirs(x).double()[sure], value[sure], rtol=1e-6, atol=0)
    ours = made(bits, q, scale)
    expected = torch.where(code >= 2**bits, 2.0**bits - 1, code.clamp(max=2**bits - 2))
    assert torch.equal(ours.encode(x).double()[sure], expected[sure])
    kept = sure & (code < 2**bits - 1)
    torch.testing.assert_close(ours(x).double()[kept], value[kept], rtol=1e-6, atol=0)
    assert bool((ours(x)[sure & (code >= 2**bits)] == 0).all())


def test_every_bound_is_exact_in_whole_numbers() -> None:
    """y is above the middle of steps j and j + 1 if y**74 > 2**-(q (2 j + 1)); of a tie the even one is taken."""
    for q in range(FIRST, LAST + 1):
        bounds = AdaptiveLogQuantizer(4)._bounds(torch.tensor([float(q)]))[0].tolist()
        below = torch.tensor(bounds).nextafter(torch.zeros(17)).tolist()
        assert bounds[-1] == 0
        for step, (bound, under) in enumerate(zip(bounds[:-1], below[:-1], strict=True)):
            middle = Fraction(1, 2 ** (q * (2 * step + 1)))
            above, not_above = Fraction(bound) ** 74, Fraction(under) ** 74
            if step % 2:
                assert above > middle >= not_above
            else:
                assert above >= middle > not_above


def test_ties_go_to_the_even_code() -> None:
    quantizer = made(4, 74)  # two octaves a step: the middles are 2**-1, 2**-3, …
    assert quantizer.encode(2.0 ** -torch.tensor([1.0, 3.0, 5.0, 7.0])).tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_with_every_base_levels_fall_and_stay_what_they_are(bits: int, shifted: bool) -> None:
    for q in (*range(FIRST, LAST + 1), 18.5):
        quantizer = made(bits, q, 3.0, shifted=shifted)
        x = torch.cat([samples(3.0), -samples(3.0)])
        once = quantizer(x)
        assert once.unique().numel() <= 2**bits
        assert torch.equal(quantizer(once), once), q
        with torch.no_grad():
            assert torch.equal(quantizer(x), once), q
        levels = quantizer.decode(torch.arange(2**bits))
        drops, reached = -levels.diff(), levels[1:] > float(levels[-1])
        assert bool((drops[reached] > 0).all())
        assert bool((drops >= 0).all())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("per", ["tensor", "head", "channel"])
def test_several_bases_at_once_give_what_each_gives_alone(per: str, shifted: bool) -> None:
    shape, axes = (2, 3, 5, 8), ("batch", "head", "token", "channel")
    quantizer = build_quantizer(Format.of("adaptive_log", 4, per, shifted=shifted), axes, shape)
    assert isinstance(quantizer, AdaptiveLogQuantizer)
    groups = quantizer.layout.groups
    params = {"scale": torch.linspace(0.5, 3, groups), "q": torch.linspace(10, 60, groups).round()}
    quantizer.set_params(params)
    quantizer.state = "on"
    x = torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2)
    x[0, 0, 0, 0] = math.nan
    with torch.no_grad():
        found = quantizer(x)
    torch.testing.assert_close(quantizer(x), found, rtol=0, atol=0, equal_nan=True)
    alone = [
        made(4, float(params["q"][g]), float(params["scale"][g]), shifted=shifted)(row)
        for g, row in enumerate(quantizer.layout.by_group(x))
    ]
    torch.testing.assert_close(quantizer.layout.by_group(found), torch.stack(alone), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("special", [(), (math.nan,), (math.inf, -math.inf, 0.0, -0.0)])
@pytest.mark.parametrize("per", ["tensor", "head"])
def test_candidates_give_what_each_gives_alone(bits: int, shifted: bool, special: tuple[float, ...], per: str) -> None:
    axes, shape = ("batch", "head", "token", "channel"), (2, 3, 5, 8)
    quantizer = build_quantizer(Format.of("adaptive_log", bits, per, shifted=shifted), axes, shape)
    assert isinstance(quantizer, AdaptiveLogQuantizer)
    x = torch.randn(shape).mul(8).round().div(8)  # many are equal
    x[0, 1, 2, : len(special)] = torch.tensor(special)
    wide = quantizer.layout.split(x)
    size = (5, *(1,) * (wide.ndim - len(quantizer.layout.scale_shape)), *quantizer.layout.scale_shape)
    params = {"scale": torch.rand(size) + 0.5, "q": torch.rand(size).mul(120).round() + 10}
    params["scale"][0] = 1e-30
    with torch.no_grad():
        found = quantizer.simulator(wide)(params)
        alone = [quantizer.simulate_with(wide, {name: value[k] for name, value in params.items()}) for k in range(5)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=0, equal_nan=True)


def test_what_is_shifted_covers_gelu_from_its_least_value_on() -> None:
    wide = torch.linspace(-6, 6, 100001, dtype=torch.float64)
    assert float(F.gelu(wide).min()) == pytest.approx(-SHIFT, abs=1e-7)
    quantizer = AdaptiveLogQuantizer(4, shifted=True)
    quantizer.set_params(quantizer.range_to_params(torch.tensor([-0.17]), torch.tensor([2.0])))
    quantizer.state = "on"
    y = quantizer(torch.tensor([-9.0, -0.17, 2.0, 9.0]))
    torch.testing.assert_close(y, torch.tensor([-SHIFT, -SHIFT, 2.0, 2.0]), rtol=1e-6, atol=1e-6)
    assert bool(quantizer.fitted)
    assert not quantizer.one_sided


def test_without_its_shift_it_gives_the_same_values_higher_by_it() -> None:
    quantizer, x = made(4, 23, 2.5, shifted=True), torch.randn(5000)
    before, codes = quantizer(x), quantizer.encode(x)
    assert quantizer.unshift() == SHIFT
    assert torch.equal(quantizer.encode(x + SHIFT), codes)
    torch.testing.assert_close(quantizer(x + SHIFT), before + SHIFT, rtol=0, atol=1e-6)
    assert quantizer.settings()["shifted"] is False
    assert quantizer.one_sided


def test_a_fixed_base_is_not_searched() -> None:
    quantizer = AdaptiveLogQuantizer(4, fixed=18.5)
    params = quantizer.range_to_params(torch.zeros(3, 1), torch.ones(3, 1))
    assert quantizer.variants(params)["q"].tolist() == [[18.5]] * 3
    quantizer.set_params({name: value[0] for name, value in params.items()})
    like = LogSqrt2Quantizer(4)
    like.set_params({"scale": torch.ones(1)})
    x = torch.rand(1000)
    assert torch.equal(quantizer.encode(x), like.encode(x))
    for wrong in (9.9, 138.0, -3.0):
        with pytest.raises(InputError, match="fixed q"):
            AdaptiveLogQuantizer(4, fixed=wrong)


def test_every_range_is_tried_with_every_base_and_a_unit_has_one() -> None:
    quantizer = AdaptiveLogQuantizer(4, unit=True)
    params = quantizer.range_to_params(torch.zeros(2, 3), torch.tensor([[0.5, 7.0, 0.0], [0.1, 0.2, 0.3]]))
    assert bool((params["scale"] == 1).all())
    tried = quantizer.variants(params)
    assert tried["q"].shape == tried["scale"].shape == (2 * (LAST - FIRST + 1), 3)
    assert tried["q"][:, 0].unique().tolist() == list(range(FIRST, LAST + 1))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
def test_gradients_are_those_of_encoding_and_decoding(bits: int, shifted: bool, groups: int) -> None:
    """The function that forgets its codes against autograd, which keeps them, and its slope by x against the text."""
    torch.manual_seed(bits)
    quantizer = AdaptiveLogQuantizer(bits, Layout() if groups == 1 else Layout((-1,), (6,), 1), shifted=shifted)
    x = F.gelu(2 * torch.randn(300, 6)) if shifted else torch.randn(300, 6).abs()
    x[0, 0], grad = -SHIFT if shifted else 0.0, torch.randn(300, 6)
    scale, q = torch.rand(1, groups) + 1, torch.randint(FIRST, LAST, (1, groups)).float()

    def gradients(long_way: bool) -> list[Tensor]:
        given, learned = x.clone().requires_grad_(), scale.clone().requires_grad_()
        params = {"scale": learned, "q": q}
        if long_way:
            value = quantizer.decode_with(quantizer.encode_with(given, params), params)
        else:
            value = quantizer.simulate_with(given, params)
        value.backward(grad)
        assert given.grad is not None
        assert learned.grad is not None
        return [value.detach(), given.grad, learned.grad]

    (value, by_x, by_scale), wanted = gradients(False), gradients(True)
    assert torch.equal(value, wanted[0])
    torch.testing.assert_close(by_x, wanted[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(by_scale, wanted[2], rtol=1e-4, atol=1e-4)
    y = (x.double() + quantizer.shift) / scale.double()
    code = quantizer.encode_with(x, {"scale": scale, "q": q}).double()
    slope = torch.where((code < quantizer.zero_code) & (y <= 1), torch.exp2(-code * q.double() / 37) / y, 0.0)
    torch.testing.assert_close(by_x.double(), slope * grad, rtol=1e-5, atol=1e-7)
