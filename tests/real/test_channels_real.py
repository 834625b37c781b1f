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


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def errors(
    request: pytest.FixtureRequest,
    loaded: LoadedModel,
    photos: tuple[Tensor, Tensor],
    output_errors: Callable[[QuantModel, Tensor], dict[str, dict[str, float]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Modifier -> role -> site -> error of the linear behind it; activations have one scale for all channels."""
    return {
        name: output_errors(
            vitq.quantize(loaded.model, f"minmax{name}", request.param, photos[0], freeze=False), photos[1]
        )
        for name in ("", "+smoothquant", "+rotation")
    }


@pytest.mark.parametrize(
    ("modifier", "role"),
    [("smoothquant", roles.QKV_IN), ("smoothquant", roles.FC1_IN), ("rotation", roles.PROJ_IN)],
)
def test_channels_that_stand_out_less_lower_the_error(
    errors: dict[str, dict[str, dict[str, float]]], modifier: str, role: str
) -> None:
    plain, helped = errors[""][role], errors[f"+{modifier}"][role]
    ratios = [helped[site] / plain[site] for site in plain]
    assert len(ratios) == BLOCKS
    assert sum(ratios) / len(ratios) < 1, ratios
