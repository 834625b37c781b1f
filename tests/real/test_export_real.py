"""Two blocks of DeiT-Tiny on real photos, as ONNX: whole numbers in products, and the codes of the simulated model."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import vitq
from vitq.data.source import LoadedModel

pytestmark = pytest.mark.real
BLOCKS, CALIBRATION, OTHERS = 2, 8, 8


@pytest.mark.parametrize(("recipe", "bits", "whole"), [("minmax", "w8a8", 12), ("repq_vit", "w4a4", 10)])
def test_a_real_model_exports(
    loaded: LoadedModel, photos: tuple[Tensor, Tensor], tmp_path: Path, recipe: str, bits: str, whole: int
) -> None:
    qmodel = vitq.quantize(loaded.model, recipe, bits, photos[0])
    saved = vitq.save(qmodel, tmp_path / "artifact")
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", data=photos[1])
    assert made.parity.equal_codes > 0.9999
    assert sum(made.products["whole"].values()) == whole  # qkv, two products, proj, fc1, fc2 of each block
    assert made.bytes <= saved["bytes"] + 500_000
