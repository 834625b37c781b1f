"""Range search against brute force in float64, written from the text of reference/methods-1.md, section 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitq.calibrate import candidates
from vitq.calibrate.observe import Sketch, Statistics
from vitq.calibrate.search import METHODS, Search, sketch_error
from vitq.core.errors import InputError
from vitq.core.format import Format
from vitq.quantizers.base import Quantizer
from vitq.quantizers.log import LogSqrt2Quantizer
from vitq.quantizers.registry import QUANTIZERS, build_quantizer
from vitq.quantizers.uniform import UniformQuantizer


def activations(groups: int, count: int) -> Tensor:
    return torch.randn(groups, count).pow(3) * torch.linspace(0.1, 10, groups)[:, None] + torch.randn(groups, 1)


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return step * (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero)


def best_affine_range(row: Tensor, ranges: list[tuple[Tensor, Tensor]], bits: int) -> tuple[int, list[float]]:
    """Which (low, high) has the smallest mean squared error, scored on every value in float64; the first of equals."""
    errors = []
    for low, high in ranges:
        value = affine(row.double(), low.double(), high.double(), bits)
        errors.append(float((value - row.double()).square().mean()))
    return min(range(len(errors)), key=errors.__getitem__), errors


def quantizer_for(kind: str, bits: int, groups: int) -> Quantizer:
    return build_quantizer(Format(kind, bits, "channel"), ("channel", "in"), (groups, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [300, 40_000])
def test_percentile_mse_is_the_percentile_initialiser_of_the_papers_code(bits: int, count: int) -> None:
    """For p in {0.999, 0.9999, 0.99999}: [quantile(1 - p), quantile(p)]; the p with the smallest squared error."""
    x = activations(6, count)
    quantizer = quantizer_for("uniform", bits, 6)
    assert isinstance(quantizer, UniformQuantizer)
    Search("percentile_mse", exact=True).fit(quantizer, x)
    for row, scale, zero in zip(x, quantizer.scale.flatten(), quantizer.zero_point.flatten(), strict=True):
        ranges = [(torch.quantile(row, 1 - p), torch.quantile(row, p)) for p in (0.999, 0.9999, 0.99999)]
        best, _ = best_affine_range(row, ranges, bits)
        low, high = ranges[best]
        assert torch.equal(scale, (high - low) / (2**bits - 1))
        assert torch.equal(zero, (-low / scale).round())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_full_mse_search_is_the_brute_force_over_shrunken_ranges(bits: int) -> None:
    x = activations(5, 5000)
    quantizer = quantizer_for("uniform", bits, 5)
    assert isinstance(quantizer, UniformQuantizer)
    Search("mse", exact=True).fit(quantizer, x)
    for row, scale in zip(x, quantizer.scale.flatten(), strict=True):
        ranges = [(f * row.min(), f * row.max()) for f in torch.linspace(1.0, 0.2, 100)]
        _, errors = best_affine_range(row, ranges, bits)
        steps = torch.stack([(high - low) / (2**bits - 1) for low, high in ranges])
        chosen = int((steps - scale).abs().argmin())
        torch.testing.assert_close(steps[chosen], scale, rtol=1e-6, atol=0)
        assert errors[chosen] <= min(errors) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_log_search_takes_the_percentile_with_the_smallest_error(bits: int) -> None:
    x = torch.randn(4, 33, 33).mul(3).softmax(-1).reshape(1, -1)
    quantizer = LogSqrt2Quantizer(bits)
    Search("percentile_mse", exact=True).fit(quantizer, x)
    errors, scales = [], [torch.quantile(x, p) for p in (0.999, 0.9999, 0.99999)]
    for scale in scales:
        code = (-2 * (x.double() / scale.double()).log2()).round().clamp(min=0)
        value = torch.where(code >= 2**bits - 1, 0.0, scale.double() * 2.0 ** (-code / 2))
        errors.append(float((value - x).square().mean()))
    assert torch.equal(quantizer.scale, scales[errors.index(min(errors))])


@pytest.mark.parametrize("kind", list(QUANTIZERS))
@pytest.mark.parametrize("groups", [1, 7])
def test_the_objective_is_the_mean_squared_error_of_every_candidate(kind: str, groups: int) -> None:
    x = activations(groups, 3001).abs()
    quantizer = quantizer_for(kind, 4, groups)
    sketch = Sketch()
    sketch.observe(x)
    stats = sketch.statistics()
    low, high = candidates.shrunken(stats, steps=9)
    params = quantizer.range_to_params(low, high)
    score = sketch_error(quantizer, params, stats)
    assert score.shape == (9, groups)
    for k in range(9):
        one = {name: value[k][:, None] for name, value in params.items()}
        value = quantizer.decode_with(quantizer.encode_with(x, one), one)
        torch.testing.assert_close(score[k], (value.double() - x.double()).square().mean(1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", list(QUANTIZERS))
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("parts", [2, 5])
def test_streamed_micro_batches_choose_the_same_bits_as_one_batch(kind: str, method: str, parts: int) -> None:
    x = activations(3, 9000).abs()
    quantizer = quantizer_for(kind, 4, 3)
    for exact in (False, True):
        search = Search(method, exact=exact)
        chosen = []
        for images in (None, parts):
            sketch = search.sketch(quantizer, images)
            for part in x.tensor_split(images or 1, dim=1):
                sketch.observe(part)
            chosen.append(search.params(quantizer, sketch.statistics()))
        assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])


@pytest.mark.parametrize("method", ["percentile_mse", "mse"])
@pytest.mark.parametrize("kind", list(QUANTIZERS))
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_sample_of_the_body_chooses_a_range_that_is_hardly_worse(method: str, kind: str, bits: int) -> None:
    x = torch.randn(1, 2**18 + 999).abs().pow(3)
    quantizer = quantizer_for(kind, bits, 1)
    errors = []
    for exact in (True, False):
        Search(method, exact=exact).fit(quantizer, x)
        errors.append(float((quantizer.decode(quantizer.encode(x)) - x).square().mean()))
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert errors[1] <= errors[0] * 1.02


@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_minmax_covers_everything(kind: str) -> None:
    x = activations(4, 777).abs()
    quantizer = quantizer_for(kind, 8, 4)
    Search("minmax").fit(quantizer, x)
    largest = x.amax(1)
    value = quantizer.decode(quantizer.encode(x)).amax(1)
    assert bool(((value - largest).abs() <= largest * (2 ** (1 / 4) - 1)).all())


def test_percentiles_that_coincide_fall_back_on_the_whole_range() -> None:
    x = torch.zeros(1, 100_000)
    x[0, 5] = 3.0
    quantizer = UniformQuantizer(4)
    for method in METHODS:
        Search(method, exact=True).fit(quantizer, x)
        assert float(quantizer.decode(quantizer.encode(x)).max()) > 0


def test_percentile_has_one_candidate_and_no_scoring() -> None:
    x = activations(1, 50_000)
    quantizer = UniformQuantizer(4)
    Search("percentile", 0.9995).fit(quantizer, x)
    low, high = torch.quantile(x, 1 - 0.9995), torch.quantile(x, 0.9995)
    assert torch.equal(quantizer.scale, (high - low) / 15)


@pytest.mark.parametrize("percentile", [0.99, -1.0, 1.5, float("nan")])
def test_a_percentile_that_is_no_probability_in_the_tail_is_refused(percentile: float) -> None:
    with pytest.raises(InputError, match="probability"):
        Search("percentile", percentile)


def test_an_unknown_method_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(InputError, match="percentile_mse"):
        Search("percentil")


def test_ties_go_to_the_first_candidate() -> None:
    ones = torch.ones(2)
    stats = Statistics(4, 0 * ones, ones, torch.empty(2, 0), torch.empty(2, 0), torch.zeros(2, 4), ones, True)
    quantizer = quantizer_for("uniform", 4, 2)
    params = Search("mse").params(quantizer, stats)
    assert torch.equal(params["scale"], ones / 15)
