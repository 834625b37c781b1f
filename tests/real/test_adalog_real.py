"""What the parts of AdaLog are for, on real weights and photos they were not fitted on. Skipped without ../shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vitq
from vitq.calibrate.linears import linears
from vitq.calibrate.progressive import finalists
from vitq.core import roles
from vitq.core.format import Format
from vitq.data.source import LoadedModel
from vitq.quantizers.base import Params
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 8, 4
BLOCKS = 4
ROWS = 8  # of a weight's output channels, one in so many: each has scales of its own


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("role", "option", "share"), [(roles.SOFTMAX_OUT, "unit", 0.95), (roles.FC2_IN, "shifted", 0.98)]
)
def test_a_base_that_is_searched_lowers_the_error(
    loaded: LoadedModel,
    photos: tuple[Tensor, Tensor],
    product_errors: Callable[..., dict[str, float]],
    bits: int,
    role: str,
    option: str,
    share: float,
) -> None:
    adaptive = product_errors(loaded, Format.of("adaptive_log", bits, **{option: True}), role, photos)
    assert len(adaptive) == BLOCKS
    for q in (37.0, 18.5):  # bases 2 and sqrt 2
        fixed = product_errors(loaded, Format.of("adaptive_log", bits, **{option: True}, fixed=q), role, photos)
        assert sum(adaptive[site] < 1.02 * fixed[site] for site in fixed) >= BLOCKS - 1, q
        assert sum(adaptive.values()) < share * sum(fixed.values()), q


@pytest.mark.parametrize("bits", [3, 4])
def test_the_progressive_search_lowers_the_error_of_weights(loaded: LoadedModel, bits: int) -> None:
    """Against ranges shrunken evenly, as many of them as the search looks at candidates."""
    qmodel = vitq.quantize(loaded.model, "minmax", "w8a16", example=torch.zeros(1, 3, 224, 224), freeze=False)
    ratios = []
    for linear in linears(qmodel)[1:9]:
        weight = qmodel.weight(linear.weight)
        assert weight is not None
        w = weight.data.flatten(1)[::ROWS]
        quantizer = UniformQuantizer(bits, Layout((-2,), (len(w),), 2))

        def error(params: Params, w: Tensor = w, quantizer: UniformQuantizer = quantizer) -> Tensor:
            wide = {name: value[..., None] for name, value in params.items()}
            tried = quantizer.simulate_with(w.expand(len(wide["scale"]), *w.shape), wide)
            return (tried - w).square().mean(-1, dtype=torch.float64)

        low, high = w.aminmax(dim=1)
        whole, middle = (quantizer.range_to_params(a[None], b[None]) for a, b in ((low, high), quantizer.middle(w)))
        with torch.no_grad():
            found = error(finalists(quantizer, error, whole, middle, whole, 0.5)).amin(0)
            factors = torch.linspace(0.2, 1.0, 768)[:, None]
            grid = [error(quantizer.range_to_params(f * low, f * high)) for f in factors.split(64)]
        ratios.append(float(found.mean() / torch.cat(grid).amin(0).mean()))
    assert len(ratios) == 8
    # A zero-point of its own and finer scales: little where weights lie around zero, and never worse.
    assert max(ratios) < 1.0001
    assert sum(ratios) / len(ratios) < 0.998
