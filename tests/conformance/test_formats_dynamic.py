"""The contract of a dynamic number format, for everything in the DYNAMIC registry.

A new one is tested with no edit. What a static format promises of scales, a dynamic one promises of rows.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vitq
from vitq.core.errors import InputError
from vitq.core.format import PER_ROW, Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import SOFTMAX_OUT, WEIGHT
from vitq.core.site import Site
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.dynamic import DynamicQuantizer
from vitq.quantizers.registry import DYNAMIC, QUANTIZERS, quantizer_at

BITS = (2, 3, 4, 6, 8)
SHAPE = (2, 3, 5, 8)
each_kind = pytest.mark.parametrize("kind", list(DYNAMIC))
each_width = pytest.mark.parametrize("bits", BITS)


def site(summed: int = -1, role: str = SOFTMAX_OUT, shape: tuple[int, ...] = SHAPE) -> Site:
    axes = ("batch", "head", "token", "token")
    return Site("a:matmul0.lhs", "a", "matmul", 0, "lhs", role, axes, shape, summed=summed)


def built(kind: str, bits: int, summed: int = -1) -> DynamicQuantizer:
    quantizer = quantizer_at(site(summed), Format(kind, bits, PER_ROW))
    assert isinstance(quantizer, DynamicQuantizer)
    return quantizer


def probabilities(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@each_kind
@each_width
def test_codes_are_whole_and_in_range_and_side_information_is_one_of_each_per_row(kind: str, bits: int) -> None:
    x = probabilities()
    code, side = built(kind, bits).encode_rows(x)
    assert code.shape == x.shape
    assert code.dtype == torch.float32
    assert torch.equal(code, code.round())
    assert float(code.min()) >= 0
    assert float(code.max()) <= 2**bits - 1
    assert side
    assert all(value.shape == (*x.shape[:-1], 1) for value in side.values())


@each_kind
@each_width
@pytest.mark.parametrize("summed", [-1, -2])
def test_every_row_stands_alone(kind: str, bits: int, summed: int) -> None:
    quantizer, x = built(kind, bits, summed), probabilities().movedim(-1, summed)
    together = quantizer(x).movedim(summed, -1).reshape(-1, SHAPE[-1])
    alone = built(kind, bits)
    for row, expected in zip(x.movedim(summed, -1).reshape(-1, SHAPE[-1]), together, strict=True):
        assert torch.equal(alone(row), expected)


@each_kind
@each_width
def test_forward_is_decode_of_encode_and_leaves_its_input(kind: str, bits: int) -> None:
    quantizer, x = built(kind, bits), probabilities()
    before = x.clone()
    expected = quantizer.decode_rows(*quantizer.encode_rows(x))
    assert not torch.equal(expected, x) or bits == 8
    with torch.no_grad():
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer(x.clone().requires_grad_()), expected)
    assert torch.equal(quantizer.quantized(x), expected)
    assert torch.equal(x, before)


@each_kind
def test_more_bits_are_better(kind: str) -> None:
    x = probabilities()
    errors = [float((built(kind, bits)(x) - x).square().sum()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@each_kind
def test_there_is_nothing_to_fit_store_or_forget(kind: str) -> None:
    quantizer, x = built(kind, 4), probabilities()
    assert quantizer.fitted
    assert quantizer.state == "on"
    assert quantizer.active
    assert not quantizer.params()
    assert not quantizer.state_dict()
    assert quantizer.side_bits() == 0
    expected = quantizer(x)
    quantizer.set_params({})
    for step in (quantizer.unfit, quantizer.learn, quantizer.freeze):
        step()
        assert torch.equal(quantizer(x), expected)
    assert not list(quantizer.parameters())
    quantizer.state = "off"
    assert quantizer(x) is x
    assert torch.equal(quantizer.quantized(x), expected)


@each_kind
@each_width
def test_what_goes_along_with_the_codes_is_counted(kind: str, bits: int) -> None:
    quantizer = built(kind, bits)
    rows = math.prod(SHAPE[:-1])
    assert quantizer.carried_bits(SHAPE) == rows * quantizer.row_bits(SHAPE[-1]) > 0
    assert built(kind, bits, -2).carried_bits(SHAPE) == math.prod(SHAPE) // SHAPE[-2] * quantizer.row_bits(SHAPE[-2])


@each_kind
def test_it_refuses_to_be_lowered(kind: str) -> None:
    quantizer = built(kind, 4)
    assert not quantizer.exportable
    quantizer.where = "the.site"
    with pytest.raises(InputError, match=r"the\.site.*dynamic.*static"):
        quantizer.lower()


@each_kind
def test_weights_and_other_granularities_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="activations"):
        quantizer_at(site(role=WEIGHT), Format(kind, 4, PER_ROW))
    with pytest.raises(InputError, match=PER_ROW):
        quantizer_at(site(), Format(kind, 4))


@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_a_static_format_has_no_rows(kind: str) -> None:
    with pytest.raises(InputError, match=PER_ROW):
        quantizer_at(site(), Format(kind, 4, PER_ROW))


HOSTILE = {
    "constant": torch.full((4, 8), 0.125),
    "zero": torch.zeros(4, 8),
    "negative zero": -torch.zeros(4, 8),
    "one-hot": torch.eye(8),
    "one element": torch.tensor([[1.0]]),
    "two elements": torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
    "two largest": torch.tensor([[0.4, 0.1, 0.4, 0.1]]),
    "huge": 3.4e38 * torch.linspace(0, 1, 32).reshape(4, 8),
    "subnormal": torch.linspace(0, 1e-43, 32).reshape(4, 8),
    "negative": -torch.linspace(0, 1, 32).reshape(4, 8),
}


@each_kind
@each_width
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_rows_give_finite_values_and_gradients(kind: str, bits: int, name: str) -> None:
    quantizer, x = built(kind, bits), HOSTILE[name].clone().requires_grad_()
    y = quantizer(x)
    assert bool(y.isfinite().all())
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@each_kind
@each_width
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_any_probabilities_keep_the_contract(kind: str, bits: int, numbers: list[float]) -> None:
    quantizer, x = built(kind, bits), torch.tensor(numbers)
    code, _ = quantizer.encode_rows(x)
    y = quantizer(x)
    assert torch.equal(code, code.round())
    assert float(code.min()) >= 0
    assert float(code.max()) <= 2**bits - 1
    assert bool(y.isfinite().all())
    assert float(y.min()) >= 0
    assert torch.equal(quantizer(x.clone().requires_grad_()), y)


@each_kind
def test_nan_touches_no_other_row(kind: str) -> None:
    quantizer, x = built(kind, 4), probabilities((6, 8))
    expected = quantizer(x)
    x[2, 5] = math.nan
    found = quantizer(x)
    assert bool(found[2, 5].isnan())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], expected[others])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_and_autocast_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    quantizer, x = built(kind, 4), probabilities().to(dtype)
    out = quantizer(x)
    assert out.dtype == dtype
    assert torch.equal(out, quantizer(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x.float()), quantizer.decode_rows(*quantizer.encode_rows(x.float())))


@each_kind
def test_copies_and_pickles_do_the_same(kind: str) -> None:
    quantizer, x = built(kind, 4, -2), probabilities()
    expected = quantizer(x)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert (twin.bits, twin.summed, twin.settings()) == (4, -2, quantizer.settings())
        assert torch.equal(twin(x), expected)


@each_kind
def test_it_is_a_final_documented_class(kind: str) -> None:
    cls = DYNAMIC[kind]
    assert getattr(cls, "__final__", False)
    assert cls.__doc__
    module = inspect.getmodule(cls)
    assert module is not None
    assert "Source:" in (module.__doc__ or "")
    assert kind not in QUANTIZERS


@each_kind
@pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])
def test_in_a_model_it_is_on_from_the_start_and_its_side_information_counts(kind: str, model: str) -> None:
    rules = (Rule(Format("uniform", 8)), Rule(Format("uniform", 8, "channel"), (WEIGHT,)))
    images, fit = seeded_images(4), (PassSpec.of("fit", flow="prefix"),)
    static = vitq.quantize(build_zoo(model), Recipe("static", "none", rules, fit), "w8a8", images)
    more = Rule(Format(kind, 8, PER_ROW), (SOFTMAX_OUT,))
    qmodel = vitq.quantize(build_zoo(model), Recipe("dynamic", "none", (*rules, more), fit), "w8a8", images)
    sites = qmodel.sites(SOFTMAX_OUT)
    assert sites
    assert all(isinstance(qmodel.quantizers[s], DynamicQuantizer) for s in sites)
    carried = sum(qmodel.quantizers[s].carried_bits(s.shape) for s in sites)
    values = sum(math.prod(s.shape) for s in qmodel.sites() if s.role != WEIGHT)
    extra = qmodel.effective_bits()["act"] - static.effective_bits()["act"]
    assert extra == pytest.approx(carried / values, abs=1e-3)
    assert extra > 0.01
    with torch.no_grad():
        expected, a, b = build_zoo(model)(images), qmodel(images), static(images)
    assert float((a - expected).square().sum()) < 0.02 * float(expected.square().sum())
    assert not torch.equal(a, b)
