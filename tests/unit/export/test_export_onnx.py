"""vitq.export_onnx: what the file holds, and what is refused before any work."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import vitq
from vitq.core.errors import ExportError, InputError, MissingExtraError, UnknownNameError
from vitq.data.zoo import build_zoo, seeded_images
from vitq.export import onnx as export_module
from vitq.export.parity import ALIKE

from .conftest import Small, small_model


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("torch's exporter was reached")

    monkeypatch.setattr(export_module, "to_marked", reached)


def outputs(data: bytes, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("count", [1, 5])
def test_the_batch_size_is_free(small: Small, count: int) -> None:
    images = seeded_images(count, seed=9)
    with torch.no_grad():
        wanted = small.qmodel(images)
    torch.testing.assert_close(outputs(small.data, images), wanted, rtol=1e-4, atol=1e-4)


def test_products_are_of_whole_numbers_but_those_with_a_table(small: Small) -> None:
    # Four linears and queries with keys; probabilities are logarithms, the patches a convolution, the head a Gemm.
    assert sum(small.made.products["whole"].values()) == 5
    assert sum(small.made.products["float"].values()) == 3


def test_a_file_is_one_and_names_nothing_of_this_machine(small: Small) -> None:
    assert [file.name for file in small.made.path.parent.iterdir()] == ["m.onnx"]
    assert str(Path(vitq.__file__).parents[1]).encode() not in small.data
    assert b".py" not in small.data
    assert small.made.bytes == len(small.data)


def test_formats_that_are_tables_are_local_functions_with_their_names(small: Small) -> None:
    import onnx

    model = onnx.load_from_string(small.data)
    # Probabilities; the patches' convolution and the head are the uniform ones that ONNX Runtime does in float.
    wanted = {"logsqrt2_4bit", "uniform_8bit", "uniform_4bit"}
    assert {(f.domain, f.name) for f in model.functions} == {("vitq", name) for name in wanted}
    kinds = {onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer if i.name.endswith("/codes")}
    assert kinds <= {"INT4", "UINT4", "INT8", "UINT8"}


def test_the_model_is_not_changed(small: Small) -> None:
    with torch.no_grad():
        before = small.qmodel(small.images)
        vitq.export_onnx(small.qmodel, small.made.path.with_name("again.onnx"), data=small.images)
        assert torch.equal(small.qmodel(small.images), before)
    assert all(small.qmodel.quantizers[site].observer is None for site in small.qmodel.sites())
    again = small.made.path.with_name("again.onnx")
    assert again.read_bytes() == small.data, "the same model, the same file"
    again.unlink()


def test_without_images_random_inputs_serve(small: Small, tmp_path: Path) -> None:
    made = vitq.export_onnx(small.qmodel, tmp_path / "m.onnx", "reference")
    assert made.parity.data == "8 random inputs"
    assert made.products["whole"] == {}
    assert "8 random inputs" in str(made.parity)


@pytest.mark.parametrize("recipe", ["minmax+smoothquant+qwt", "repq_vit+rotation+gptq+noisy"])
def test_rewrites_come_out_by_themselves(recipe: str, tmp_path: Path) -> None:
    images, model = seeded_images(8), build_zoo("seeded_vit")
    model.blocks = model.blocks[:2]
    qmodel = vitq.quantize(model, recipe, "w4a4", images)
    assert len({rewrite.name for rewrite in qmodel.rewrites}) >= 2
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", data=images)  # parity is with the rewritten model
    assert made.parity.equal_codes >= ALIKE


def test_three_bits_are_stored_as_four_and_that_is_said(tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "minmax", "w3a8", seeded_images(4))
    made = vitq.export_onnx(qmodel, tmp_path / "m.onnx", data=seeded_images(4))
    assert any("of 3 bits are stored as 4-bit" in note for note in made.notes)


@pytest.mark.parametrize(
    ("path", "more", "error", "told"),
    [
        ("m.onnx", {"profile": "ortt"}, UnknownNameError, "Did you mean 'ort'"),
        ("m.onnx", {"opset": 13}, InputError, "opset 13"),
        ("no/m.onnx", {}, InputError, "does not exist"),
        (".", {}, InputError, "is a folder"),
    ],
)
def test_what_cannot_work_is_refused_first(
    small: Small, no_work: None, tmp_path: Path, path: str, more: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        vitq.export_onnx(small.qmodel, tmp_path / path, **more)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    small: Small, no_work: None, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*vitq\[onnx\]"):
        vitq.export_onnx(small.qmodel, tmp_path / "m.onnx")


def test_an_extra_zero_level_is_refused_by_site(no_work: None, tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "repq_vit", "w4a4", seeded_images(4), options={"parity": True})
    with pytest.raises(InputError, match=r"blocks\.0.*parity=false"):
        vitq.export_onnx(qmodel, tmp_path / "m.onnx")


def test_a_model_that_is_not_frozen_is_refused(no_work: None, tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", seeded_images(4), freeze=False)
    with pytest.raises(ExportError, match="freeze"):
        vitq.export_onnx(qmodel, tmp_path / "m.onnx")


def test_another_type_is_refused(small: Small, no_work: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float32"):
        vitq.export_onnx(copy.deepcopy(small.qmodel).to(torch.bfloat16), tmp_path / "m.onnx")


def test_linears_of_one_vector_per_image_are_not_rounded_again(tmp_path: Path) -> None:
    """ONNX Runtime rounds weights and biases of a Gemm between two pairs (its WeightBiasQuantization)."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)).eval()
    images = torch.rand(64, 8)
    made = vitq.export_onnx(vitq.quantize(model, "minmax", "w8a8", images), tmp_path / "m.onnx", data=images)
    assert made.parity.equal_codes > ALIKE


class Odd(torch.nn.Module):
    """A forward that depends on values, or uses an operator that ONNX has not."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.head, self.values = torch.nn.Linear(8, 3), values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.values:
            return self.head(x) if x.sum() > 0 else -self.head(x)
        return torch.special.bessel_j0(self.head(x))


@pytest.mark.parametrize("values", [True, False])
def test_what_torch_cannot_export_is_one_line(values: bool, tmp_path: Path) -> None:
    qmodel = vitq.quantize(Odd(values).eval(), "minmax", "w8a8", torch.rand(4, 8))
    with pytest.raises(ExportError, match="torch could not export this model") as error:
        vitq.export_onnx(qmodel, tmp_path / "m.onnx")
    assert "\n" not in str(error.value)
    assert values or "bessel_j0" in str(error.value)
    assert not list(tmp_path.iterdir())
