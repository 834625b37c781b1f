"""The contract of an export (design: contracts), for every recipe on a ViT and a Swin, in each runtime."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitq
from vitq.core.errors import InputError
from vitq.core.recipe import RECIPES
from vitq.data.zoo import build_zoo, seeded_images
from vitq.export.lower import PROFILES
from vitq.export.runtime import runtime_named
from vitq.quantizers.dynamic import DynamicQuantizer

FEW = {"steps": 32, "rounds": 1, "rows": 128}
LARGER = 500_000  # bytes that a file may be larger than the artifact: the graph, and 3-bit codes in 4 bits
# One width each: torch's exporter takes seconds, whatever the width is.
WIDTHS = ("w8a8", "w4a8", "w4a4", "w3a3", "w4a16")


def vit() -> nn.Module:
    """zoo:seeded_vit with one block."""
    model: Any = build_zoo("seeded_vit")
    model.blocks = model.blocks[:1]
    return model


def swin() -> nn.Module:
    """zoo:seeded_swin with two blocks: one with shifted windows, and one behind the merging."""
    model: Any = build_zoo("seeded_swin")
    model.layers[0].blocks = model.layers[0].blocks[1:]
    model.layers[1].blocks = model.layers[1].blocks[:1]
    return model


@pytest.mark.parametrize("profile", ["ort", "openvino"])
@pytest.mark.parametrize("model", [vit, swin])
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_exports_and_the_file_computes_its_codes(name: str, model: Any, profile: str, tmp_path: Path) -> None:
    if profile == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    images = seeded_images(8)
    known = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in FEW.items() if option in known}
    bits = WIDTHS[(list(RECIPES).index(name) + 2 * (model is swin) + (profile == "openvino")) % len(WIDTHS)]
    qmodel = vitq.quantize(model(), name, bits, images[:4], options=options)
    if profile == "openvino" and any(isinstance(qmodel.quantizers[s], DynamicQuantizer) for s in qmodel.sites()):
        with pytest.raises(InputError, match=r"is dynamic.*--profile ort"):
            vitq.export_onnx(qmodel, tmp_path / "m.onnx", profile, data=images)
        return
    saved = vitq.save(qmodel, tmp_path / "artifact")
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", profile, data=images)  # raises where it does not hold
    quantized = [s for s in qmodel.sites() if not qmodel.quantizers[s].baked]
    assert {site.site for site in made.parity.sites} == {site.id for site in quantized}
    assert made.bytes <= saved["bytes"] + LARGER
    other = vitq.load(tmp_path / "artifact", model=model())
    three = seeded_images(3, seed=7)
    session = runtime_named(PROFILES[profile].runtime).session(str(tmp_path / "m.onnx"))
    (got,) = session.run({"images": three.numpy()}).values()
    with torch.no_grad():
        assert got.shape == other(three).shape
