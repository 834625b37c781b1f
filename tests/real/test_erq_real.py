"""What the parts of ERQ are for, on real weights and other photos. Skipped where ../shared is absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.capture import switched_off
from vitq.calibrate.linears import linears
from vitq.core.qmodel import QuantModel
from vitq.data.source import LoadedModel

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 16, 8
BLOCKS = 4
OFF = {"aqer": False, "refine": False, "compensate": False}
STEPS = ("aqer", "compensate", "refine")  # in the order in which each is switched on on top of those before


@pytest.fixture(scope="module")
def errors(loaded: LoadedModel, photos: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]]:
    """Parts that are on -> linear -> squared error of its output, given the inputs that the float model gives it."""
    variants, on = {}, dict(OFF)
    for step in ("", *STEPS):
        on |= {step: True} if step else {}
        variants[step] = vitq.quantize(loaded.model, "erq", "w4a4", photos[0], options=on, freeze=False)
    # Inputs as the fold left them, and what the linears made of them: the same in all variants.
    there = float_linears(variants[""], photos[1])
    found: dict[str, dict[str, float]] = {}
    for step, qmodel in variants.items():
        for linear in linears(qmodel):
            if linear.module is None or not linear.module.startswith("blocks"):
                continue
            x, wanted = there[linear.module]
            module = qmodel.model.get_submodule(linear.module)
            assert isinstance(module, nn.Linear)
            with torch.no_grad():
                weight = qmodel.quantizers[linear.weight](module.weight)
                got = nn.functional.linear(qmodel.quantizers[linear.input](x), weight, module.bias)
            found.setdefault(step, {})[linear.module] = float((got - wanted).double().square().sum())
    return found


@torch.no_grad()
def float_linears(qmodel: QuantModel, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear -> input and output, everything in float."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, (args[0], out)))
        for name, module in qmodel.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with switched_off(qmodel, []):
        qmodel(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("number", range(len(STEPS)), ids=STEPS)
def test_each_step_lowers_the_error_of_the_linears_outputs(errors: dict[str, dict[str, float]], number: int) -> None:
    before, after = errors[("", *STEPS)[number]], errors[STEPS[number]]
    assert len(before) == 4 * BLOCKS
    ratios = [after[name] / before[name] for name in before]
    assert sum(ratios) / len(ratios) < 1, ratios
    assert sum(ratio < 1 for ratio in ratios) > len(ratios) / 2, ratios
