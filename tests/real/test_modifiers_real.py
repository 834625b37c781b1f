"""What each modifier is for, on real weights and photos it was not fitted on. Skipped where ../shared is absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.linears import as_used, linears
from vitq.core.qmodel import QuantModel
from vitq.data.source import LoadedModel

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 16, 12


def quantized(loaded: LoadedModel, recipe: str, images: Tensor) -> QuantModel:
    return vitq.quantize(loaded.model, recipe, "w4a4", images, freeze=False)


def inputs(qmodel: QuantModel, images: Tensor) -> dict[str, Tensor]:
    """Weight site -> rows that the weight is multiplied with, on the quantized model."""
    found: dict[str, Tensor] = {}
    for linear in linears(qmodel):
        quantizer = qmodel.quantizers[linear.input]

        def look(q: object, x: Tensor, linear: object = linear, quantizer: object = quantizer) -> None:
            found[linear.weight.id] = linear.rows(qmodel.model, as_used(quantizer, x))  # type: ignore[attr-defined]

        quantizer.observer = look
    with torch.no_grad():
        qmodel(images)
    return found


def test_gptq_lowers_the_error_of_the_linears_outputs(loaded: LoadedModel, photos: tuple[Tensor, Tensor]) -> None:
    calib, others = photos
    qmodel = quantized(loaded, "repq_vit+gptq", calib)
    ratios = []
    for site, x in inputs(qmodel, others).items():
        weight, quantizer = qmodel.weight(site), qmodel.quantizers[site]
        assert weight is not None
        w = weight.data
        nearest, chosen = quantizer.decode(quantizer.encode(w)), quantizer(w)
        errors = [float((x @ (w - q).flatten(1).T).double().square().sum()) for q in (chosen, nearest)]
        ratios.append(errors[0] / errors[1])
    assert len(ratios) == 50  # the head keeps nearest rounding: fewer images than inputs
    assert sum(ratio < 1 for ratio in ratios) >= 47
    assert sum(ratios) / len(ratios) < 0.75


def block_outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Block -> what goes in and comes out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found.__setitem__(name, (args[0].clone(), out.clone()))
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_bias_correction_lowers_the_error_of_the_mean_block_outputs(
    loaded: LoadedModel, photos: tuple[Tensor, Tensor]
) -> None:
    calib, others = photos
    plain, helped = (quantized(loaded, r, calib) for r in ("repq_vit+gptq", "repq_vit+gptq+bias_correction"))
    names = list(plain.graph.blocks)
    wanted = block_outputs(loaded.model, names, others)
    off = []
    for qmodel in (plain, helped):
        got = block_outputs(qmodel.model, names, others)
        off.append([float((got[n][1].mean((0, 1)) - wanted[n][1].mean((0, 1))).square().sum()) for n in names])
    assert all(after < before for before, after in zip(*off, strict=True))


def test_the_map_lowers_the_error_of_the_blocks(loaded: LoadedModel, photos: tuple[Tensor, Tensor]) -> None:
    calib, others = photos
    qmodel = quantized(loaded, "repq_vit+qwt", calib)
    names = [rewrite.args["block"] for rewrite in qmodel.rewrites if rewrite.name == "compensate_block"]
    assert len(names) >= 10
    gains = []
    for name, (x, got) in block_outputs(qmodel.model, names, others).items():
        block = qmodel.model.get_submodule(name)
        with torch.no_grad():
            wanted = loaded.model.get_submodule(name)(x)
            without = got - block.get_submodule("compensation")(x)
        errors = [float((out - wanted).double().square().sum()) for out in (got, without)]
        gains.append(errors[0] / errors[1])
    assert sum(gain < 1 for gain in gains) >= len(gains) - 1
    assert sum(gains) / len(gains) < 0.97
