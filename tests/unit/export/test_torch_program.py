"""Programs of torch.export: read by a Python that has torch and nothing else, at any batch size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitq
from vitq.core.errors import ExportError, InputError
from vitq.core.qmodel import QuantModel
from vitq.data.zoo import build_zoo, seeded_images

from .conftest import small_model
from .hf_models import float_model, images, quantized

ALONE = """
import sys, torch
class Only(__import__("importlib.abc").abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vitq", "transformers", "timm", "torchvision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Only())
from safetensors.torch import load_file
program, known = torch.export.load("model.pt2").module(), load_file("known.safetensors")
for n in (1, 2, 7):
    with torch.no_grad():
        found = program(known["x"][:n])
    found = found if torch.is_tensor(found) else found["logits"]
    assert torch.equal(found, known[f"y{n}"]), n
"""


def runs_alone(qmodel: QuantModel, x: Tensor, folder: Path) -> None:
    vitq.export_to(qmodel, "torch", folder / "model.pt2", data=x)
    known = {"x": x}
    for n in (1, 2, 7):
        with torch.no_grad():
            found = qmodel(x[:n])
        known[f"y{n}"] = found if isinstance(found, Tensor) else found.logits
    save_file(known, folder / "known.safetensors")
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_log_formats_and_folded_channels(tmp_path: Path) -> None:
    x = seeded_images(8)
    runs_alone(vitq.quantize(small_model(), "repq_vit", "w4a4", x), x[:7], tmp_path)


def test_dynamic_formats_and_branches(tmp_path: Path) -> None:
    x = seeded_images(8)
    runs_alone(vitq.quantize(build_zoo("seeded_vit"), "uq_vit+qwt", "w4a4", x), x[:7], tmp_path)


def test_outputs_of_transformers_become_a_plain_dict(tmp_path: Path) -> None:
    runs_alone(quantized("vit", "minmax"), images(7, seed=2), tmp_path)


def test_keyword_arguments(tmp_path: Path) -> None:
    qmodel = vitq.quantize(float_model("vit"), "minmax", "w8a8", [{"pixel_values": images(4)}])
    vitq.export_to(qmodel, "torch", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = images(3, seed=5)
    with torch.no_grad():
        assert torch.equal(program(pixel_values=x)["logits"], qmodel(pixel_values=x).logits)


def test_what_is_written_does_not_depend_on_later_changes(tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", seeded_images(4))
    vitq.export_to(qmodel, "torch", tmp_path / "model.pt2")
    x = seeded_images(3, seed=4)
    with torch.no_grad():
        before = qmodel(x)
        qmodel.model.head.bias.add_(1)
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), before)


# -- what cannot be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"), [("model.onnx", "*.pt2"), ("no/model.pt2", "does not exist"), (".", "folder")]
)
def test_places(name: str, told: str, tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", seeded_images(2))
    with pytest.raises(InputError, match=told.replace("*", r"\*")):
        vitq.export_to(qmodel, "torch", tmp_path / name)


class ByNumber(nn.Module):
    """Does something else for one image than for several."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else self.one(x * 2)  # type: ignore[no-any-return]


def test_a_forward_that_depends_on_values(tmp_path: Path) -> None:
    x = torch.rand(4, 4)
    qmodel = vitq.quantize(ByNumber().eval(), "minmax", "w8a8", x)
    (tmp_path / "model.pt2").write_text("old")
    with pytest.raises(ExportError, match="depend on values"):
        vitq.export_to(qmodel, "torch", tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "old"


def test_detectors(tmp_path: Path) -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w8a8", seeded_images(2))
    qmodel.example = {"list": [{"tensor": [3, 32, 32], "dtype": "float32"}]}
    with pytest.raises(InputError, match="list of images"):
        vitq.export_to(qmodel, "torch", tmp_path / "model.pt2")


def test_a_model_that_is_not_frozen(tmp_path: Path) -> None:
    qmodel = vitq.quantize(small_model(), "minmax", "w8a8", seeded_images(2), freeze=False)
    with pytest.raises(ExportError, match="freeze"):
        vitq.export_to(qmodel, "torch", tmp_path / "model.pt2")
