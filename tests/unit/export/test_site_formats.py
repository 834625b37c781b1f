"""What a site becomes in a file has the same values as its quantizer, on inputs made to break it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitq.calibrate.search import Search
from vitq.core.format import Format
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import QUANTIZERS, build_quantizer
from vitq.quantizers.uniform import UniformQuantizer

AXES, SHAPE = ("batch", "head", "token", "channel"), (2, 3, 5, 8)
THROUGH = Callable[..., Tensor]
each_kind = pytest.mark.parametrize("kind", list(QUANTIZERS))
each_profile = pytest.mark.parametrize("profile", ["ort", "reference"])


def fitted(kind: str, bits: int, per: str = "tensor", **options: bool) -> Quantizer:
    quantizer = build_quantizer(Format.of(kind, bits, per, **options), AXES, SHAPE)
    x = torch.randn(SHAPE) * torch.linspace(0.2, 5, SHAPE[-1])
    Search("minmax").fit(quantizer, x.abs().pow(3) / 40 if quantizer.one_sided else x)
    quantizer.state = "on"
    return quantizer


def hard(quantizer: Quantizer) -> Tensor:
    """Thresholds of all scale groups, the floats on both sides of them, levels, zeros, ends: as many rows as needed."""
    lowered = quantizer.lower()
    edges = lowered.thresholds.flatten()
    edges = edges[edges.isfinite()]
    up, down = (edges.nextafter(torch.full_like(edges, end)) for end in (torch.inf, -torch.inf))
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 3e38, -3e38])
    flat = torch.cat([edges, up, down, lowered.levels.flatten(), (edges[1:] + edges[:-1]) / 2, ends])
    one = SHAPE[1] * SHAPE[2] * SHAPE[3]
    # Every head and channel sees every value.
    return flat[:, None].expand(-1, one).reshape(-1, *SHAPE[1:]).contiguous()


@each_kind
@each_profile
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_those_of_the_quantizer(kind: str, profile: str, bits: int, through_file: THROUGH) -> None:
    quantizer = fitted(kind, bits)
    x = hard(quantizer)
    assert torch.equal(through_file(quantizer, x, profile), quantizer.quantized(x))


@each_kind
@pytest.mark.parametrize("per", ["channel", "head", "group:4"])
def test_scale_groups_keep_their_own_levels(kind: str, per: str, through_file: THROUGH) -> None:
    quantizer = fitted(kind, 3, per)
    x = hard(quantizer)
    assert torch.equal(through_file(quantizer, x), quantizer.quantized(x))


@pytest.mark.parametrize(("kind", "options"), [("adaptive_log", {"shifted": True}), ("twin_gelu", {"aligned": True})])
def test_options_of_formats_come_along(kind: str, options: dict[str, bool], through_file: THROUGH) -> None:
    quantizer = fitted(kind, 4, **options)
    x = hard(quantizer)
    assert torch.equal(through_file(quantizer, x), quantizer.quantized(x))


@pytest.mark.parametrize("zero_point", [-7.0, 300.0, 40_000.0])
def test_a_zero_point_that_is_no_byte_is_exact_too(zero_point: float, through_file: THROUGH) -> None:
    quantizer = UniformQuantizer(8)
    quantizer.set_params({"scale": torch.tensor(0.037), "zero_point": torch.tensor(zero_point)})
    x = hard(quantizer)
    assert torch.equal(through_file(quantizer, x), quantizer.quantized(x))


@settings(max_examples=25)
@given(
    bits=st.integers(2, 8),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero_point=st.integers(0, 255),
    steps=st.lists(st.integers(-600, 600), min_size=1, max_size=40),
)
def test_ties_go_where_the_quantizer_sends_them(
    through_file: THROUGH, bits: int, scale: float, zero_point: int, steps: list[int]
) -> None:
    quantizer = UniformQuantizer(bits)
    quantizer.set_params(
        {"scale": torch.tensor(scale), "zero_point": torch.tensor(float(min(zero_point, 2**bits - 1)))}
    )
    halves = torch.tensor(steps, dtype=torch.float32) / 2 * np.float32(scale)
    x = torch.cat([halves, halves.nextafter(torch.tensor(torch.inf)), halves.nextafter(torch.tensor(-torch.inf))])[None]
    assert torch.equal(through_file(quantizer, x), quantizer.quantized(x))


def test_the_pair_is_one_of_bytes_and_functions_are_named_after_formats() -> None:
    from vitq.export.sites import fits_bytes

    assert fits_bytes(fitted("uniform", 4))
    assert not fits_bytes(fitted("uniform", 4, "head")), "ONNX Runtime fails on several scales before a product"
    assert not fits_bytes(fitted("log2", 4))
