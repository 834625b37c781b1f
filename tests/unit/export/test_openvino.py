"""The profile openvino: operands in signed bytes, and OpenVINO's own files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.errors import ExportError, InputError, MissingExtraError
from vitq.core.qmodel import QuantModel
from vitq.data.zoo import build_zoo, seeded_images
from vitq.export import onnx as export_module
from vitq.export import openvino_ir
from vitq.export.parity import ALIKE

from .conftest import Small, small_model

openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
CHANNELS, TOKENS, IMAGES = 8, 6, 16


class Attention(nn.Module):
    """Products of activations, with a softmax behind the first one or without."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) / CHANNELS**0.5
        if self.softmax:
            scores = scores.softmax(-1)
        return self.proj(scores @ self.v(x))  # type: ignore[no-any-return]


def with_zero_points(qmodel: QuantModel, zero_points: dict[str, int]) -> None:
    """Move the zero-points of activations, by role."""
    for site in qmodel.sites():
        if site.role in zero_points:
            quantizer: Any = qmodel.quantizers[site]
            scale = quantizer.params()["scale"]
            quantizer.set_params({"scale": scale, "zero_point": torch.tensor(float(zero_points[site.role]))})


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("bits", "left", "right"),
    [("w8a8", 128, 128), ("w8a8", 100, 128), ("w8a8", 128, 100), ("w8a8", 90, 150), ("w8a8", 0, 77), ("w4a4", 6, 9)],
)
def test_operands_with_any_zero_points_are_multiplied_in_whole_numbers(
    bits: str, left: int, right: int, softmax: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGES, TOKENS, CHANNELS)
    qmodel = vitq.quantize(nn.Sequential(Attention(softmax)).eval(), "minmax", bits, x)
    with_zero_points(qmodel, {"QUERY": left, "KEY": right, "VALUE": right, "SOFTMAX_OUT": 0})
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", "openvino", data=x)  # raises where codes differ
    assert made.parity.equal_codes >= ALIKE
    assert made.parity.output_error < 1e-5
    # Queries with keys are of bytes. Of the second product, nothing tells where a fused kernel makes its operands.
    assert sum(made.products["whole"].values()) >= 4 + 1
    assert not set(made.products["float"]) & {"FullyConnected", "MatMul"} or not softmax


def test_symmetric_formats_run_attention_as_one_kernel_of_whole_numbers(tmp_path: Path) -> None:
    images = seeded_images(8)
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", images, options={"symmetric": True})
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", "openvino", data=images)
    assert made.products == {"whole": {"FullyConnected": 5, "Subgraph": 2}, "float": {"Convolution": 1}}
    other = vitq.export_onnx(qmodel, tmp_path / "float.onnx", "reference", data=images)
    assert other.products["whole"] == {}


def test_tables_leave_their_product_in_float(small_for: Callable[[str], Small]) -> None:
    made = small_for("openvino").made
    # Four linears, the head, and queries with keys; probabilities are a table.
    assert sum(made.products["whole"].values()) == 6
    assert sum(made.products["float"].values()) == 2


def test_a_swin_has_whole_numbers_in_all_linears(tmp_path: Path) -> None:
    images = seeded_images(8)
    model: Any = build_zoo("seeded_swin")
    model.layers[0].blocks = model.layers[0].blocks[1:]
    model.layers[1].blocks = model.layers[1].blocks[:1]
    made = vitq.export_onnx(
        vitq.quantize(model, "minmax", "w8a8", images), tmp_path / "m.onnx", "openvino", data=images
    )
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(made.products["whole"].values()) >= linears
    assert made.products["float"].get("FullyConnected", 0) == 0


def test_a_weight_that_lacks_another_rest_is_named(tmp_path: Path) -> None:
    import numpy as np

    from .test_parity import broken

    images = seeded_images(8)
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", images)
    small = Small(qmodel, images, vitq.export_onnx(qmodel, tmp_path / "m.onnx", "openvino", data=images))
    name = "blocks.0.mlp.fc1:linear0.weight"
    assert f"{name}/rest".encode() in small.data, "eight bits and a zero-point leave a rest"
    with pytest.raises(ExportError, match=f"weight at {name}"):
        small.check(broken(small.data, f"{name}/rest", lambda rest: rest * np.float32(1.01)))


@pytest.fixture(scope="module")
def ir(small_for: Callable[[str], Small], tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = small_for("openvino")
    path = tmp_path_factory.mktemp("ir") / "m.xml"
    made = vitq.export_openvino(small.qmodel, path, data=small.images)
    assert made.products == small.made.products
    assert made.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    return path


def test_openvinos_own_files_run_without_vitq_at_any_batch_size(ir: Path, small_for: Callable[[str], Small]) -> None:
    assert sorted(file.name for file in ir.parent.iterdir()) == ["m.bin", "m.xml"]
    compiled = openvino.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = seeded_images(3, seed=9)
    with torch.no_grad():
        wanted = small_for("openvino").qmodel(images)
    torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), wanted, rtol=1e-4, atol=1e-4)


def test_weights_are_narrow_in_openvinos_own_files(ir: Path, small_for: Callable[[str], Small]) -> None:
    text = ir.read_text()
    weights = sum(
        q.bits == 4
        for site in small_for("openvino").qmodel.sites("WEIGHT")
        for q in [small_for("openvino").qmodel.quantizers[site]]
    )
    assert text.count('element_type="u4"') >= weights
    assert str(Path(vitq.__file__).parents[1]) not in text


def test_files_of_another_model_are_not_written(
    small_for: Callable[[str], Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_for("openvino")

    def other(data: bytes, xml: Path) -> None:
        from .test_parity import broken

        convert(broken(data, "head.bias", lambda bias: bias + 1e-3), xml)

    convert = openvino_ir._convert
    monkeypatch.setattr(openvino_ir, "_convert", other)
    (tmp_path / "m.xml").write_text("old")
    with pytest.raises(ExportError, match="something else with its own file"):
        vitq.export_openvino(small.qmodel, tmp_path / "m.xml", data=small.images)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.xml", "old")]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("torch's exporter was reached")

    monkeypatch.setattr(export_module, "to_marked", reached)


def test_an_xml_file_is_asked_for(small: Small, no_work: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.xml"):
        vitq.export_openvino(small.qmodel, tmp_path / "m.onnx")


def test_a_dynamic_format_is_refused_by_site(no_work: None, tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "uq_vit", "w4a4", seeded_images(4))
    with pytest.raises(InputError, match=r"blocks\.0\..*softmax: the format demax is dynamic.*static format"):
        vitq.export_onnx(qmodel, tmp_path / "m.onnx", "openvino")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "openvino"])
def test_a_missing_package_names_the_extra(
    small: Small, no_work: None, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*vitq\[openvino\]"):
        vitq.export_openvino(small.qmodel, tmp_path / "m.xml")
    with pytest.raises(MissingExtraError, match=rf"{package}.*vitq\[openvino\]"):
        vitq.export_onnx(small.qmodel, tmp_path / "m.onnx", "openvino")
