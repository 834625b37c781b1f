"""The contract of a number format (design: contracts), for everything in the QUANTIZERS registry.

A new format is tested with no edit. Options named in PARITY reproduce a paper's own arithmetic, which has more
values than 2**bits; they are exempt from that count, and must refuse to be lowered.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitq.calibrate.search import METHODS, Search
from vitq.core.errors import InputError, NotFittedError
from vitq.core.format import Format, Scalar
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import QUANTIZERS, build_quantizer

BITS = (2, 3, 4, 6, 8)
PARITY = ("extra_zero_level", "fractional_zero_point")
AXES = ("batch", "head", "token", "channel")
SHAPE = (2, 3, 5, 8)
GRANULARITIES = ("tensor", "channel", "head", "token", "group:4")


def variants() -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Every registered kind, as it is and with each of its options that is not a parity option."""
    for kind in QUANTIZERS:
        yield kind, {}
        for name, parameter in inspect.signature(QUANTIZERS[kind]).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is False and name not in PARITY:
                yield kind, {name: True}


VARIANTS = [pytest.param(kind, options, id="-".join((kind, *options))) for kind, options in variants()]
each_variant = pytest.mark.parametrize(("kind", "options"), VARIANTS)
each_width = pytest.mark.parametrize("bits", BITS)
each_granularity = pytest.mark.parametrize("per", GRANULARITIES)


def values(quantizer: Quantizer, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Activations of a kind that the format is for: different in every scale group, with a few outliers."""
    x = torch.randn(shape) * torch.linspace(0.2, 5, shape[-1]) + torch.linspace(-1, 1, shape[-1])
    return x.abs().pow(3) / 40 if quantizer.one_sided else x


def fitted(kind: str, options: dict[str, Scalar], bits: int, per: str = "tensor") -> tuple[Quantizer, Tensor]:
    quantizer = build_quantizer(Format.of(kind, bits, per, **options), AXES, SHAPE)
    x = values(quantizer)
    Search("minmax").fit(quantizer, x)
    quantizer.state = "on"
    return quantizer, x


def wider(x: Tensor) -> Tensor:
    """The same values, and some beyond every range."""
    return torch.cat([x, 3 * x, -x, torch.zeros_like(x)])


@each_variant
@each_width
@each_granularity
def test_codes_are_whole_in_range_and_few(kind: str, options: dict[str, Scalar], bits: int, per: str) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    x = wider(x)
    code = quantizer.encode(x)
    assert code.shape == x.shape
    assert code.dtype == torch.float32
    assert torch.equal(code, code.round())
    assert float(code.min()) >= 0
    assert float(code.max()) <= 2**bits - 1
    for row in quantizer.layout.by_group(quantizer.decode(code)):
        assert row.unique().numel() <= 2**bits


@each_variant
@each_width
@each_granularity
def test_quantizing_twice_changes_nothing(kind: str, options: dict[str, Scalar], bits: int, per: str) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    once = quantizer(wider(x))
    assert torch.equal(quantizer(once), once)


@each_variant
@each_width
@each_granularity
def test_forward_is_decode_of_encode_with_and_without_gradients(
    kind: str, options: dict[str, Scalar], bits: int, per: str
) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    x = wider(x)
    expected = quantizer.decode(quantizer.encode(x))
    with torch.no_grad():
        assert torch.equal(quantizer(x), expected)
    with torch.inference_mode():
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer(x.clone().requires_grad_()), expected)
    quantizer.learn()
    assert torch.equal(quantizer(x), expected)


@each_variant
@each_width
@each_granularity
def test_the_input_is_not_changed(kind: str, options: dict[str, Scalar], bits: int, per: str) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    before = x.clone()
    with torch.no_grad():
        quantizer(x)
        quantizer.encode(x)
        code = quantizer.encode(x)
        kept = code.clone()
        quantizer.decode(code)
    assert torch.equal(x, before)
    assert torch.equal(code, kept)


@each_variant
@each_granularity
def test_each_scale_group_has_its_own_scale(kind: str, options: dict[str, Scalar], per: str) -> None:
    """Group by group with one scale each gives the same values as the granular quantizer."""
    quantizer, x = fitted(kind, options, 4, per)
    together = quantizer.layout.by_group(quantizer(x))
    for row, expected in zip(quantizer.layout.by_group(x), together, strict=True):
        alone = build_quantizer(Format.of(kind, 4, **options), ("token",), tuple(row.shape))
        Search("minmax").fit(alone, row)
        assert torch.equal(alone.decode(alone.encode(row)), expected)


@each_variant
@each_granularity
def test_fittedness_survives_the_state_dict(kind: str, options: dict[str, Scalar], per: str) -> None:
    quantizer, x = fitted(kind, options, 4, per)
    other = build_quantizer(Format.of(kind, 4, per, **options), AXES, SHAPE)
    assert not other.fitted
    other.load_state_dict(quantizer.state_dict())
    other.state = "on"
    assert other.fitted
    assert torch.equal(other(x), quantizer(x))
    empty = build_quantizer(Format.of(kind, 4, per, **options), AXES, SHAPE)
    other.load_state_dict(empty.state_dict())
    assert not other.fitted


@each_variant
def test_unfitted_use_raises(kind: str, options: dict[str, Scalar]) -> None:
    quantizer = build_quantizer(Format.of(kind, 4, **options), AXES, SHAPE)
    x = values(quantizer)
    assert quantizer(x) is x  # off
    quantizer.state = "on"
    for use in (
        lambda: quantizer(x),
        lambda: quantizer.encode(x),
        lambda: quantizer.decode(x),
        quantizer.lower,
        quantizer.learn,
        quantizer.freeze,
    ):
        with pytest.raises(NotFittedError, match="fit"):
            use()
    fitted_one, _ = fitted(kind, options, 4)
    fitted_one.unfit()
    with pytest.raises(NotFittedError):
        fitted_one(x)


@each_variant
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_or_of_another_number_are_refused(
    kind: str, options: dict[str, Scalar], bad: float
) -> None:
    quantizer, _ = fitted(kind, options, 4, "channel")
    before = copy.deepcopy(quantizer.state_dict())
    params = {name: value.clone() for name, value in quantizer.params().items()}
    params[quantizer.fields[-1]].view(-1)[3] = bad
    with pytest.raises(InputError, match="finite"):
        quantizer.set_params(params)
    with pytest.raises(InputError, match="needs 8"):
        quantizer.set_params({name: torch.ones(5) for name in quantizer.fields})
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


HOSTILE = {
    "constant": torch.full((4, 8), 3.7),
    "negative constant": torch.full((4, 8), -3.7),
    "small constant": torch.full((4, 8), 1e-7),
    "zero": torch.zeros(4, 8),
    "negative zero": -torch.zeros(4, 8),
    "one element": torch.tensor([[2.5]]),
    "one negative element": torch.tensor([[-2.5]]),
    "huge": 3.4e38 * torch.linspace(-1, 1, 32).reshape(4, 8),
    "huge constant": torch.full((4, 8), 3.4e38),
    "tiny": torch.linspace(-1e-37, 1e-37, 32).reshape(4, 8),
    "subnormal": torch.linspace(0, 1e-43, 32).reshape(4, 8),
    "one outlier": torch.cat([torch.full((31,), 1e-6), torch.tensor([1e6])]).reshape(4, 8),
    "nearly constant": torch.linspace(100, 100.0005, 32).reshape(4, 8),
    "all negative": -torch.linspace(1, 2, 32).reshape(4, 8),
}


@each_variant
@each_width
def test_hostile_inputs_give_finite_values_that_stay(kind: str, options: dict[str, Scalar], bits: int) -> None:
    everything = torch.cat([x.flatten() for x in HOSTILE.values()])[:, None]
    assert bool(everything.isfinite().all())
    for name, x in HOSTILE.items():
        for method in METHODS:
            case = f"{name}, {method}"
            quantizer = build_quantizer(Format.of(kind, bits, **options), ("token", "channel"), tuple(x.shape))
            Search(method).fit(quantizer, x)
            quantizer.state = "on"
            y = quantizer(x)
            assert bool(y.isfinite().all()), case
            assert torch.equal(quantizer(y), y), case
            assert torch.equal(quantizer(x.clone().requires_grad_()), y), case
            assert bool(quantizer(everything).isfinite().all()), case
            assert bool(quantizer(everything.clone().requires_grad_()).isfinite().all()), case


@each_variant
@each_width
@each_granularity
def test_gradients_are_finite(kind: str, options: dict[str, Scalar], bits: int, per: str) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    quantizer.learn()
    x = wider(x).requires_grad_()
    quantizer(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    learned = dict(quantizer.named_parameters())
    assert learned
    for parameter in learned.values():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool((parameter.grad != 0).any())


@each_variant
@each_granularity
def test_learn_and_freeze_are_a_round_trip(kind: str, options: dict[str, Scalar], per: str) -> None:
    quantizer, x = fitted(kind, options, 4, per)
    before, keys = quantizer(x), list(quantizer.state_dict())
    assert not list(quantizer.parameters())
    quantizer.learn()
    quantizer.learn()
    assert quantizer.state == "learn"
    assert list(quantizer.parameters())
    assert sorted(quantizer.state_dict()) == sorted(keys)
    quantizer.freeze()
    quantizer.freeze()
    assert quantizer.state == "on"
    assert not list(quantizer.parameters())
    assert torch.equal(quantizer(x), before)


@each_variant
def test_codes_stay_whole_after_a_training_step(kind: str, options: dict[str, Scalar]) -> None:
    """Found by this test: the zero-point was trained, too, and became a fraction."""
    quantizer, x = fitted(kind, options, 4)
    quantizer.learn()
    for _ in range(3):
        (quantizer(x) - 0.9 * x).square().sum().backward()
        for parameter in quantizer.parameters():
            assert parameter.grad is not None
            parameter.data -= 1e-5 * parameter.grad
            parameter.grad = None
    for step in (lambda: None, quantizer.freeze):
        step()
        code = quantizer.encode(wider(x)).detach()
        assert torch.equal(code, code.round())
        assert float(code.min()) >= 0
        assert float(code.max()) <= 15


@each_variant
@each_granularity
def test_a_deep_copy_is_the_same_and_independent(kind: str, options: dict[str, Scalar], per: str) -> None:
    for learning in (False, True):
        quantizer, x = fitted(kind, options, 4, per)
        if learning:
            quantizer.learn()
        twin = copy.deepcopy(quantizer)
        assert (twin.bits, twin.layout, twin.state, twin.settings()) == (
            quantizer.bits,
            quantizer.layout,
            quantizer.state,
            quantizer.settings(),
        )
        before = quantizer(x).detach()
        assert torch.equal(twin(x), before)
        twin.unfit()
        assert torch.equal(quantizer(x), before)


@each_variant
@each_width
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(
    kind: str, options: dict[str, Scalar], bits: int, dtype: torch.dtype
) -> None:
    quantizer, x = fitted(kind, options, bits, "channel")
    low = wider(x).to(dtype)
    assert torch.equal(quantizer.encode(low), quantizer.encode(low.float()))
    out = quantizer(low)
    assert out.dtype == dtype
    assert torch.equal(out, quantizer(low.float()).to(dtype))


@each_variant
@each_width
def test_autocast_does_not_touch_the_arithmetic(kind: str, options: dict[str, Scalar], bits: int) -> None:
    quantizer, x = fitted(kind, options, bits, "channel")
    expected, code = quantizer(x), quantizer.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x), expected)
        assert quantizer(x).dtype == torch.float32
        assert torch.equal(quantizer.encode(x), code)
        assert torch.equal(quantizer.decode(code), expected)


@each_variant
@each_width
@each_granularity
def test_lowering_names_the_code_of_every_float(kind: str, options: dict[str, Scalar], bits: int, per: str) -> None:
    quantizer, x = fitted(kind, options, bits, per)
    lowered = quantizer.lower()
    groups = quantizer.layout.groups
    params = {name: value.reshape(groups, 1) for name, value in quantizer.params().items()}
    assert lowered.thresholds.shape == (groups, 2**bits - 1)
    assert lowered.levels.shape == (groups, 2**bits)
    assert sorted(lowered.codes.tolist()) == list(range(2**bits))
    for ascending in (lowered.levels, lowered.thresholds):
        assert bool((ascending[:, 1:] >= ascending[:, :-1]).all())
    reached = lowered.thresholds.masked_fill(lowered.thresholds.isinf(), 0.0)
    biggest = torch.finfo(torch.float32).max
    random = torch.empty(groups, 300).uniform_(-40, 40).exp2() * torch.randint(0, 2, (groups, 300)).mul(2).sub(1)
    limits = torch.tensor([0.0, -0.0, biggest, -biggest, 1e-45, -1e-45, 1e-38, -1e-38]).expand(groups, 8)
    hard = torch.cat(
        [
            quantizer.layout.by_group(wider(x)),
            reached,
            reached.nextafter(torch.tensor(biggest)),
            reached.nextafter(torch.tensor(-biggest)),
            lowered.levels,
            random,
            limits,
        ],
        dim=1,
    )
    index = lowered.index(hard)
    code = quantizer.encode_with(hard, params)
    assert torch.equal(lowered.codes[index].float(), code)
    assert torch.equal(lowered.levels.gather(1, index), quantizer.decode_with(code, params))


@each_variant
@each_granularity
def test_by_group_puts_every_value_in_one_row(kind: str, options: dict[str, Scalar], per: str) -> None:
    quantizer = build_quantizer(Format.of(kind, 4, per, **options), AXES, SHAPE)
    x = torch.arange(math.prod(SHAPE)).float().reshape(SHAPE)
    rows = quantizer.layout.by_group(x)
    assert rows.shape[0] == quantizer.layout.groups
    assert torch.equal(rows.flatten().sort().values, x.flatten())
    assert torch.equal(quantizer.layout.join(quantizer.layout.split(x)), x)
    count = {"tensor": 1, "channel": 8, "head": 3, "token": 5, "group:4": 2}[per]
    assert quantizer.layout.groups == count
    if per != "tensor":
        row = x[..., :4] if per == "group:4" else x.select(AXES.index(per), 0)
        assert torch.equal(rows[0].sort().values, row.flatten().sort().values)


@each_variant
@each_width
def test_a_weight_has_groups_of_input_channels_within_each_output_channel(
    kind: str, options: dict[str, Scalar], bits: int
) -> None:
    quantizer = build_quantizer(Format.of(kind, bits, "group:4", **options), ("channel", "in"), (6, 8))
    weight = values(quantizer, (6, 8))
    Search("minmax").fit(quantizer, weight)
    quantizer.state = "on"
    assert quantizer.layout.groups == 12
    assert torch.equal(quantizer.layout.by_group(weight), weight.reshape(12, 4))
    assert torch.equal(quantizer(quantizer(weight)), quantizer(weight))


@each_variant
@each_granularity
def test_the_side_information_is_counted(kind: str, options: dict[str, Scalar], per: str) -> None:
    quantizer = build_quantizer(Format.of(kind, 4, per, **options), AXES, SHAPE)
    assert 32 * quantizer.layout.groups <= quantizer.side_bits() <= 32 * len(quantizer.fields) * quantizer.layout.groups


@each_variant
def test_settings_rebuild_the_quantizer(kind: str, options: dict[str, Scalar]) -> None:
    quantizer, x = fitted(kind, options, 4)
    again = build_quantizer(Format.of(kind, 4, **quantizer.settings()), AXES, SHAPE)
    again.load_state_dict(quantizer.state_dict())
    again.state = "on"
    assert again.settings() == quantizer.settings()
    assert torch.equal(again(x), quantizer(x))


def parity_variants() -> Iterator[tuple[str, str]]:
    for kind in QUANTIZERS:
        for name in inspect.signature(QUANTIZERS[kind]).parameters:
            if name in PARITY:
                yield kind, name


@pytest.mark.parametrize(("kind", "option"), list(parity_variants()))
@each_width
def test_a_parity_option_keeps_the_contract_but_refuses_to_be_lowered(kind: str, option: str, bits: int) -> None:
    quantizer, x = fitted(kind, {option: True}, bits)
    assert not quantizer.exportable
    with pytest.raises(InputError, match="parity"):
        quantizer.lower()
    once = quantizer(wider(x))
    assert bool(once.isfinite().all())
    assert torch.equal(quantizer(once), once)
    assert torch.equal(quantizer(wider(x)), quantizer.decode(quantizer.encode(wider(x))))


@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_every_format_is_a_final_documented_class(kind: str) -> None:
    cls = QUANTIZERS[kind]
    assert getattr(cls, "__final__", False)
    assert cls.__doc__
    module = inspect.getmodule(cls)
    assert module is not None
    assert "arXiv" in (module.__doc__ or "")


@given(
    st.sampled_from([(kind, options) for kind, options in variants()]),
    st.sampled_from(BITS),
    st.sampled_from(sorted(METHODS)),
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
)
def test_any_finite_numbers_keep_the_contract(
    variant: tuple[str, dict[str, Scalar]], bits: int, method: str, numbers: list[float]
) -> None:
    kind, options = variant
    x = torch.tensor(numbers)
    quantizer = build_quantizer(Format.of(kind, bits, **options), ("token",), tuple(x.shape))
    Search(method).fit(quantizer, x)
    quantizer.state = "on"
    code, y = quantizer.encode(x), quantizer(x)
    assert torch.equal(code, code.round())
    assert float(code.min()) >= 0
    assert float(code.max()) <= 2**bits - 1
    assert bool(y.isfinite().all())
    assert torch.equal(y, quantizer.decode(code))
    assert torch.equal(quantizer(y), y)
    assert torch.equal(quantizer(x.requires_grad_()), y)
