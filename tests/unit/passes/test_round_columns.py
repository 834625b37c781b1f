"""Rounding column by column: against a slow float64 form of its definition, and never worse than nearest rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitq
from vitq.calibrate.moments import ErrorMoments
from vitq.calibrate.search import Search
from vitq.core.errors import CompositionError, InputError
from vitq.core.format import Bits, Format
from vitq.core.recipe import PassSpec, Recipe, resolve_recipe
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.round.absorb import absorbed
from vitq.passes.round.columns import RoundColumns, choose
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import build_quantizer

DAMP = 0.01


def fitted(w: Tensor, bits: int, per: str = "channel") -> Quantizer:
    axes = ("channel", "in") if w.ndim == 2 else ("channel", "in", "kernel", "kernel")
    quantizer = build_quantizer(Format("uniform", bits, per), axes, tuple(w.shape))
    Search("minmax").fit(quantizer, w)
    return quantizer


def mixed(rows: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(H, x): inputs whose channels have much to do with one another."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=draw) @ torch.randn(size, size, generator=draw) / size**0.5
    wide = x.double()
    return wide.T @ wide / rows, x


def definition(w: Tensor, h: Tensor, quantizer: Quantizer, order: Tensor) -> Tensor:
    """Column after column: the best real value of what is not rounded yet, given what is, then nearest rounding."""
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    wide, chosen = w.double(), w.double().clone()
    done: list[int] = []
    for j in order.tolist():
        left = [k for k in range(len(h)) if k not in done]
        best = wide.clone()
        if done:  # minimise (w - q) H (w - q)^T over the columns that are left
            pull = torch.linalg.solve(h[left][:, left], h[left][:, done])
            best[:, left] = wide[:, left] + (wide[:, done] - chosen[:, done]) @ pull.T
        chosen[:, j] = quantizer(best.float()).double()[:, j]
        done.append(j)
    return chosen.float()


def output_error(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    wrong = (w - q).double()
    return ((wrong @ h) * wrong).sum(1)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("per", ["channel", "tensor", "group:4"])
def test_the_codes_are_those_of_the_definition(per: str, order: bool) -> None:
    h, _ = mixed(200, 16, seed=0)
    w = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    quantizer = fitted(w, 3, per)
    quantizer.state = "on"
    got, _ = choose(w, h, quantizer, DAMP, order=order)
    columns = (h.diagonal() + DAMP * h.diagonal().mean()).argsort(descending=True) if order else torch.arange(16)
    expected, nearest = definition(w, h, quantizer, columns), quantizer(w)
    better = output_error(w, expected, h) < output_error(w, nearest, h)
    assert bool(better.any())
    assert torch.equal(got[better], expected[better])
    assert bool((output_error(w, got, h) <= output_error(w, nearest, h) * (1 + 1e-6)).all())


def test_columns_beyond_one_panel_are_corrected_too() -> None:
    h, _ = mixed(600, 150, seed=3)
    w = torch.randn(4, 150, generator=torch.Generator().manual_seed(2))
    quantizer = fitted(w, 4)
    quantizer.state = "on"
    got, ratio = choose(w, h, quantizer, DAMP, order=False)
    expected = definition(w, h, quantizer, torch.arange(150))
    assert float((got != expected).float().mean()) < 0.01  # float32 against float64
    assert ratio < 0.7


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_never_worse_than_nearest_and_on_the_grid(rows: int, size: int, bits: int, seed: int) -> None:
    h, _ = mixed(rows, size, seed)  # often singular: fewer rows than channels
    h[:, 0] = h[0] = 0  # a channel that is always zero
    w = torch.randn(5, size, generator=torch.Generator().manual_seed(seed))
    quantizer = fitted(w, bits)
    quantizer.state = "on"
    got, ratio = choose(w, h, quantizer, DAMP)
    assert torch.equal(quantizer(got), got)
    assert ratio <= 1 + 1e-6


def test_a_convolution_is_a_linear_of_patches() -> None:
    images = seeded_images(16)
    noise = {}
    for recipe in ("minmax", "minmax+gptq"):
        qmodel = vitq.quantize(build_zoo("seeded_vit"), recipe, "w3a16", images, exclude=["blocks", "head"])
        float_conv = build_zoo("seeded_vit").get_submodule("patch_embed.proj")
        conv = qmodel.model.get_submodule("patch_embed.proj")
        assert isinstance(conv, nn.Conv2d)
        with torch.no_grad():
            noise[recipe] = float((conv(images) - float_conv(images)).square().mean())
    assert noise["minmax+gptq"] < 0.5 * noise["minmax"]


@pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])
def test_mechanism_later_columns_make_up_for_earlier_ones(model: str) -> None:
    """Switched off, nearest rounding is left: the output of the model on other images is worse."""
    images, others = seeded_images(32), seeded_images(64)[32:]
    float_model = build_zoo(model)
    with torch.no_grad():
        expected = float_model(others)
        noise = [
            float((vitq.quantize(float_model, recipe, "w4a16", images)(others) - expected).square().mean())
            for recipe in ("minmax+gptq", "minmax")
        ]
    assert noise[0] < 0.5 * noise[1]


def test_the_log_tells_what_was_rounded_and_what_it_gained() -> None:
    log = vitq.quantize(build_zoo("seeded_vit"), "minmax+gptq", "w4a4", seeded_images(32)).log["round_columns"]
    assert log["rounded"] == 13
    assert log["kept"] == 1  # the head: 32 tokens for 64 inputs
    assert 0 < log["error_of_nearest"] < 1


def test_values_that_no_code_has_are_refused() -> None:
    w = torch.randn(4, 4)
    with pytest.raises(InputError, match="are not those of any codes"):
        fitted(w, 4).round_to(w)


def test_a_damp_that_cannot_be_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"damp 0\.0 must be in"):
        RoundColumns(damp=0.0)


def test_a_ridge_that_cannot_be_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"absorb -0\.1 must not be negative"):
        RoundColumns(absorb=-0.1)


@pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])
def test_mechanism_weights_make_up_for_quantized_inputs(model: str) -> None:
    """Switched off, the output of the model on other images is worse."""
    images, others = seeded_images(32), seeded_images(64)[32:]
    float_model, base = build_zoo(model), resolve_recipe("minmax", Bits(8, 3))
    noise = []
    for absorb in (0.3, 0.0):
        recipe = Recipe("absorb", "none", base.formats, (*base.passes, PassSpec.of("round_columns", absorb=absorb)))
        with torch.no_grad():
            made = vitq.quantize(float_model, recipe, "w8a3", images)(others)
            noise.append(float((made - float_model(others)).square().mean()))
    assert noise[0] < 0.9 * noise[1]


def test_what_is_absorbed_is_the_weighted_regression_of_what_inputs_lose() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=draw), torch.randn(3, 6, generator=draw)
    q, count = (x * 2).round() / 2, torch.rand(50, generator=draw)
    count = count / count.mean()
    moments = ErrorMoments(6, torch.device("cpu"))
    moments.add(x[:20], q[:20], count[:20])
    moments.add(x[20:], q[20:], count[20:])
    h = moments.used.matrix
    found = absorbed(weight.double(), h, moments.matrix, 0.3)
    # Rows that count double are there twice: by their roots, and the ridge as rows of its own.
    root, ridge = count.double().sqrt()[:, None], (0.3 * 50 * h.diagonal().mean()).sqrt() * torch.eye(6)
    rows = torch.cat([root * q, ridge.double()])
    wanted = torch.cat([root * (x @ weight.T).double(), ridge.double() @ weight.T.double()])
    torch.testing.assert_close(found.T, torch.linalg.lstsq(rows, wanted).solution, rtol=1e-5, atol=1e-6)


def test_biases_on_the_way_mend_the_mean_output_as_a_correction_behind_it_does() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(8)
    base = resolve_recipe("repq_vit", Bits(3, 4))
    together = (PassSpec.of("round_columns", biases=True),)
    apart = (PassSpec.of("round_columns"), PassSpec.of("correct_bias"))
    means = []
    for passes in ((), together, apart):
        recipe = Recipe("biases", "none", base.formats, (*base.passes, *passes))
        qmodel = vitq.quantize(copy.deepcopy(model), recipe, "w3a4", images)
        with torch.no_grad():
            means.append((qmodel(images) - model(images)).mean(0).norm())
        assert [r.name for r in qmodel.rewrites].count("shift_bias") == bool(passes)
    assert max(means[1:]) < 0.05 * means[0]
