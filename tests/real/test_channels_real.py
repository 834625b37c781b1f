"""What smoothing and rotating channels is for, on real weights and other photos. Skipped where ../shared is absent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

import vitq
from vitq.core import roles
from vitq.core.qmodel import QuantModel
from vitq.data.source import LoadedModel

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 8, 6
BLOCKS = 12


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize(
    ("modifier", "role"),
    [("smoothquant", roles.QKV_IN), ("smoothquant", roles.FC1_IN), ("rotation", roles.PROJ_IN)],
)
def test_channels_that_stand_out_less_lower_the_error(
    loaded: LoadedModel,
    photos: tuple[Tensor, Tensor],
    output_errors: Callable[[QuantModel, Tensor], dict[str, dict[str, float]]],
    modifier: str,
    role: str,
    bits: str,
) -> None:
    """Activations with one scale for all channels."""
    errors = []
    for recipe in ("minmax", f"minmax+{modifier}"):
        qmodel = vitq.quantize(loaded.model, recipe, bits, photos[0], freeze=False)
        errors.append(output_errors(qmodel, photos[1])[role])
    plain, helped = errors
    ratios = [helped[site] / plain[site] for site in plain]
    assert len(ratios) == BLOCKS
    assert sum(ratios) / len(ratios) < 1, ratios
