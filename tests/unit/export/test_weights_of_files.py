"""Weights in a file: numbers of 4 and 8 bits, whose values are those of the model to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vitq.calibrate.search import Search
from vitq.core.format import Format
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import QUANTIZERS, build_quantizer
from vitq.quantizers.uniform import UniformQuantizer

THROUGH = Callable[..., tuple[Tensor, Any]]
SHAPE = (6, 8)


def coded(kind: str, bits: int, per: str, **options: bool) -> tuple[Quantizer, Tensor]:
    quantizer = build_quantizer(Format.of(kind, bits, per, **options), ("channel", "in"), SHAPE)
    weight = torch.randn(SHAPE) * torch.linspace(0.1, 3, SHAPE[0])[:, None]
    weight = weight.abs() if quantizer.one_sided else weight
    Search("minmax").fit(quantizer, weight)
    quantizer.state = "on"
    return quantizer, quantizer.quantized(weight)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("per", ["tensor", "channel", "group:4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_uniform_weights(bits: int, symmetric: bool, per: str, whole: bool, weight_through_file: THROUGH) -> None:
    quantizer, weight = coded("uniform", bits, per, symmetric=symmetric)
    values, kind = weight_through_file(quantizer, weight, whole)
    assert torch.equal(values, weight)
    assert kind.endswith("4" if bits <= 4 else "8")


@pytest.mark.parametrize("kind", [k for k in QUANTIZERS if k != "uniform"])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_weights_of_any_format(kind: str, per: str, weight_through_file: THROUGH) -> None:
    quantizer, weight = coded(kind, 4, per)
    values, stored = weight_through_file(quantizer, weight, True)
    assert torch.equal(values, weight)
    assert stored == "UINT4"


@pytest.mark.parametrize("zero_point", [-3.0, 900.0])
def test_a_zero_point_out_of_range(zero_point: float, weight_through_file: THROUGH) -> None:
    quantizer = UniformQuantizer(4)
    quantizer.set_params({"scale": torch.tensor(0.01), "zero_point": torch.tensor(zero_point)})
    weight = quantizer.quantized(torch.linspace(-10, 10, 48).reshape(SHAPE))
    values, stored = weight_through_file(quantizer, weight, True)
    assert torch.equal(values, weight)
    assert stored == "UINT4"
