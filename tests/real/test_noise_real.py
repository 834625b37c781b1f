"""What noise is for, on real weights and photos that it was not chosen on. Skipped where ../shared is absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitq
from vitq.core.qmodel import QuantModel
from vitq.core.roles import FC2_IN
from vitq.data.source import LoadedModel
from vitq.quantizers.base import Quantizer

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 16, 12


def ratios(qmodel: QuantModel, images: Tensor) -> dict[str, list[float]]:
    """Role -> of each linear with noise, the error of its output in parts of that without, on the same inputs."""
    found: dict[str, list[float]] = {}
    seen: dict[str, Tensor] = {}
    noisy = [s for s in qmodel.sites() if isinstance(q := qmodel.quantizers[s], Quantizer) and q.noise is not None]
    for site in noisy:
        qmodel.quantizers[site].observer = lambda q, x, site=site: seen.__setitem__(site.id, x)
    with torch.no_grad():
        qmodel(images)
        for site in noisy:
            quantizer = qmodel.quantizers[site]
            assert isinstance(quantizer, Quantizer)
            quantizer.observer = None
            weight = qmodel.quantizers[f"{site.call}.weight"](qmodel.model.get_parameter(f"{site.owner}.weight"))
            errors = []
            for noise in (quantizer.noise, None):
                quantizer.noise = noise
                wrong = quantizer(seen[site.id]) - seen[site.id]
                errors.append(float((wrong @ weight.T).square().sum(dtype=torch.float64)))
            found.setdefault(site.role, []).append(errors[0] / errors[1])
    return found


@pytest.mark.parametrize("recipe", ["noisyquant", "repq_vit+noisy"])
def test_noise_lowers_the_error_of_the_output_on_other_photos(
    recipe: str, loaded: LoadedModel, photos: tuple[Tensor, Tensor]
) -> None:
    calib, others = photos
    qmodel = vitq.quantize(loaded.model, recipe, "w6a6", calib, freeze=False)
    found = ratios(qmodel, others)
    every = [ratio for role in found.values() for ratio in role]
    print(recipe, {role: (len(r), round(sum(r) / len(r), 4)) for role, r in found.items()}, max(every))  # noqa: T201
    assert len(every) >= 10
    assert sum(every) / len(every) < 0.99
    assert sum(found[FC2_IN]) / len(found[FC2_IN]) < 0.95
