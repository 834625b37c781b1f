"""Twin uniform formats against T_k of PTQ4ViT in float64, from the text of reference/methods-1.md, section 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitq.quantizers.twin_uniform import GELU_MINIMUM, SPLITS, TwinGeluQuantizer, TwinSoftmaxQuantizer

each_width = pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
each_split = pytest.mark.parametrize("shift", [0, 1, 2, 3, 4, 7, 12, 19])


def psi(x: Tensor, step: float, low: int, high: int) -> Tensor:
    """clamp(round(x / step), low, high) step"""
    return (x / step).round().clamp(low, high) * step


def softmax_twin(x: Tensor, bits: int, shift: int) -> Tensor:
    """Psi_{k-1}(x, D1) in R1 = [0, 2^{k-1} D1), else Psi_{k-1}(x, D2), D2 = 2^m D1 ending at 1."""
    count = 2 ** (bits - 1)
    coarse = 1 / (count - 1)
    fine = coarse / 2**shift
    return torch.where(x < count * fine, psi(x, fine, 0, count - 1), psi(x, coarse, 0, count - 1))


def softmax_quantizer(bits: int, shift: int) -> TwinSoftmaxQuantizer:
    quantizer = TwinSoftmaxQuantizer(bits, unit=True)
    params = quantizer.range_to_params(torch.zeros(1), torch.tensor([0.3]))
    quantizer.set_params(params | {"shift": torch.tensor([float(shift)])})
    quantizer.state = "on"
    return quantizer


def probabilities() -> Tensor:
    return torch.cat([torch.rand(4000), torch.exp2(-20 * torch.rand(8000))])


@each_width
@each_split
def test_probabilities_get_the_value_of_the_formula_away_from_the_split(bits: int, shift: int) -> None:
    x = probabilities()
    count = 2 ** (bits - 1)
    coarse = 1 / (count - 1)
    fine = coarse / 2**shift
    wanted = softmax_twin(x.double(), bits, shift)
    steps = x.double() / torch.where(x < count * fine, fine, coarse)
    sure = (((steps - steps.floor()) - 0.5).abs() > 1e-3) & ~(
        (x > (count - 0.51) * fine) & (x < 0.5001 * coarse + fine * count)
    )
    assert sure.double().mean() > 0.2
    torch.testing.assert_close(softmax_quantizer(bits, shift)(x)[sure].double(), wanted[sure], rtol=1e-6, atol=1e-12)


@each_width
@each_split
def test_every_probability_gets_the_nearest_level_and_so_never_more_error_than_the_formula(
    bits: int, shift: int
) -> None:
    x, count = probabilities(), 2 ** (bits - 1)
    coarse = torch.arange(count, dtype=torch.float64) / (count - 1)
    levels = torch.cat([coarse / 2**shift, coarse]).unique()
    nearest = (x.double()[:, None] - levels).abs().min(1).values
    error = (softmax_quantizer(bits, shift)(x).double() - x).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-7)
    assert bool((error <= (softmax_twin(x.double(), bits, shift) - x).abs() + 1e-7).all())


def test_beside_a_small_split_the_formula_has_zeros_and_ours_has_not() -> None:
    x = torch.tensor([0.03])  # above the split, but less than half a step of the upper range
    assert float(softmax_twin(x.double(), 4, 6)) == 0.0
    assert float(softmax_quantizer(4, 6)(x)) == pytest.approx(7 / 7 / 64)


@each_width
def test_products_with_both_ranges_are_added_after_a_shift(bits: int) -> None:
    for shift in range(SPLITS):
        quantizer = softmax_quantizer(bits, shift)
        fine = float(quantizer.params()["scale"]) / 2**shift
        steps = quantizer(probabilities()).double() / fine
        torch.testing.assert_close(steps, steps.round(), rtol=1e-7, atol=1e-3)
    aligned = TwinGeluQuantizer(bits, aligned=True)
    for high in (0.3, 1.0, 7.7, 50.0):
        aligned.set_params(aligned.range_to_params(torch.tensor([-0.1]), torch.tensor([high])))
        ratio = float(aligned.decode(torch.tensor([2.0 ** (bits - 1) + 1]))) / (GELU_MINIMUM / 2 ** (bits - 1))
        assert abs(torch.tensor(ratio).log2().frac()) % 1 == pytest.approx(0, abs=1e-5)
        assert (
            2**-0.5 - 1e-6
            <= ratio * (GELU_MINIMUM / 2 ** (bits - 1)) / float(aligned.params()["scale"])
            <= 2**0.5 + 1e-6
        )


def test_the_search_is_offered_every_split_once_per_range() -> None:
    quantizer = TwinSoftmaxQuantizer(4)
    ranges = torch.tensor([[0.5, 1.0], [0.25, 0.5], [0.1, 0.2]])
    tried = quantizer.variants(quantizer.range_to_params(torch.zeros_like(ranges), ranges))
    assert tried["scale"].shape == tried["shift"].shape == (3 * SPLITS, 2)
    pairs = {
        (float(scale), float(shift)) for scale, shift in zip(tried["scale"][:, 1], tried["shift"][:, 1], strict=True)
    }
    assert pairs == {(float(r / 7), float(m)) for r in ranges[:, 1] for m in range(SPLITS)}


@each_width
@pytest.mark.parametrize("high", [0.3, 2.0, 11.0])
def test_activations_get_the_value_of_the_formula(bits: int, high: float) -> None:
    quantizer = TwinGeluQuantizer(bits)
    quantizer.set_params(quantizer.range_to_params(torch.tensor([-0.05]), torch.tensor([high])))
    quantizer.state = "on"
    x = torch.nn.functional.gelu(torch.cat([torch.randn(3000), high * torch.randn(3000)]))
    count = 2 ** (bits - 1)
    coarse, fine = float(torch.tensor(high)) / (count - 1), GELU_MINIMUM / count
    wide = x.double()
    wanted = torch.where(wide < 0, psi(wide, fine, -count, 0), psi(wide, coarse, 0, count - 1))
    steps = wide / torch.where(wide < 0, fine, coarse)
    sure = ((steps - steps.floor()) - 0.5).abs() > 1e-3
    torch.testing.assert_close(quantizer(x)[sure].double(), wanted[sure], rtol=1e-6, atol=1e-12)
    assert (quantizer.encode(x) < count).double().mean() > 0.2  # many are negative, with a code of their own
    lowest = torch.tensor([-GELU_MINIMUM])
    torch.testing.assert_close(quantizer(lowest), lowest)


def test_a_range_without_negative_values_has_no_grid_for_them() -> None:
    quantizer = TwinGeluQuantizer(4)
    quantizer.set_params(quantizer.range_to_params(torch.zeros(1), torch.ones(1)))
    quantizer.state = "on"
    assert torch.equal(quantizer(torch.tensor([-0.1, -1e-9, -5.0])), torch.zeros(3))
