"""Artifacts in Hugging Face folders: the same bits through transformers and through vitq, and back to a folder."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

import vitq
from vitq.artifact.wrapped import NOTICE
from vitq.core.errors import ArtifactError, ExportError, InputError
from vitq.data.preprocess import PROCESSOR, Preprocess
from vitq.data.source import load_model
from vitq.data.zoo import build_zoo, seeded_images

from .hf_models import CALIB, UNSEEN, float_model, images, outputs, quantized, same

AUTO = {
    "vit": AutoModelForImageClassification,
    "swin": AutoModelForImageClassification,
    "segformer": AutoModelForSemanticSegmentation,
    "backbone": transformers.Dinov2Backbone,
}
# Between them: folded channels, log formats, QwT's branches, codes that a pass chose, dynamic formats.
RECIPES = ["minmax", "repq_vit+qwt", "vitq_calib", "uq_vit"]
CASES = [("vit", recipe) for recipe in RECIPES] + [
    ("swin", "repq_vit"),
    ("segformer", "repq_vit"),
    ("backbone", "minmax"),
]


FLIPS = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "vit"
    quantized("vit", "repq_vit").save_pretrained(out)
    return out


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, **settings)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_bits_are_the_same_through_transformers_vitq_and_another_folder(
    name: str, recipe: str, tmp_path: Path
) -> None:
    qmodel = quantized(name, recipe)
    qmodel.save_pretrained(tmp_path / "one")
    model = AUTO[name].from_pretrained(tmp_path / "one")
    assert isinstance(model, type(float_model(name)))
    assert model.config.architectures == [type(float_model(name)).__name__]
    assert same(model, qmodel)
    assert not same(model, float_model(name))
    assert same(vitq.load(tmp_path / "one"), qmodel)

    model.save_pretrained(tmp_path / "two")
    assert same(AUTO[name].from_pretrained(tmp_path / "two"), qmodel)
    assert same(vitq.load(tmp_path / "two"), qmodel)
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_codes_are_packed_and_nothing_float_is_left_of_them(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        codes = file.get_tensor("codes/vit.layers.0.mlp.fc1:linear0.weight")
    assert (codes.dtype, codes.numel()) == (torch.uint8, 32 * 64 // 2)
    assert {name for name in names if "/" not in name} == {
        "vit.embeddings.cls_token", "classifier.weight", NOTICE,
    }  # fmt: skip
    written = json.loads((saved / "config.json").read_text())
    assert written["model_type"] == "vit"
    assert {k: v for k, v in written["quantization_config"].items() if k != "document"} == {
        "quant_method": "vitq", "recipe": "repq_vit", "bits": "w4a4", "vitq_version": vitq.__version__,
    }  # fmt: skip
    assert str(Path.cwd()) not in (saved / "config.json").read_text()


def test_it_behaves_like_any_model_of_transformers(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    model, info = load(saved, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "classifier" not in capfd.readouterr().err  # no report of missing weights
    assert not model.training
    assert model.num_parameters() == float_model("vit").num_parameters()
    assert model.config.num_labels == 10
    assert "repq_vit" in repr(model.config.quantization_config)
    assert same(copy.deepcopy(model), model)
    assert same(pickle.loads(pickle.dumps(model)), model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert same(torch.load(stream, weights_only=False), model)


def test_a_copy_saves_its_own_codes(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "twin"), twin)
    assert same(load(tmp_path / "model"), model)
    assert not same(twin, model)


def test_scales_move_along_with_the_model(saved: Path) -> None:
    model = load(saved)
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


def test_other_types_are_those_of_the_artifact(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        model = load(saved, dtype=torch.bfloat16)
    assert "call model.to(torch.bfloat16) after loading" in caplog.text
    assert same(model, quantized("vit", "repq_vit"))
    half, reference = model.to(torch.bfloat16), copy.deepcopy(quantized("vit", "repq_vit")).to(torch.bfloat16)
    x = UNSEEN.to(torch.bfloat16)
    assert all(map(torch.equal, outputs(half, x), outputs(reference, x)))


def test_a_model_of_16_bits_stays_one(tmp_path: Path) -> None:
    qmodel = vitq.quantize(copy.deepcopy(float_model("vit")).bfloat16(), "minmax", "w4a4", CALIB.bfloat16())
    qmodel.save_pretrained(tmp_path / "half")
    model = load(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    x = UNSEEN.bfloat16()
    assert all(map(torch.equal, outputs(model, x), outputs(qmodel, x)))


def test_weights_left_in_float_are_kept(tmp_path: Path) -> None:
    qmodel = quantized("vit", "minmax", "w16a8")
    qmodel.save_pretrained(tmp_path / "out")
    assert same(load(tmp_path / "out"), qmodel)


def test_one_device_of_a_map_and_not_several(saved: Path) -> None:
    assert same(load(saved, device_map="cpu"), load(saved))
    with pytest.raises(InputError, match="onto one device"):
        load(saved, device_map={"vit": "cpu", "classifier": "disk"})


def test_a_folder_keeps_the_other_files_of_a_user(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "notes.txt").write_text("mine, too")
    load(saved).save_pretrained(out)
    assert (out / "README.md").read_text() == "mine"
    assert sorted(f.name for f in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    load(out).save_pretrained(out)  # onto itself
    assert same(load(out), load(saved))


@pytest.mark.parametrize(
    ("given", "named"),
    [({"state_dict": {}}, "state_dict"), ({"push_to_hub": True}, "push_to_hub"), ({"variant": "int4"}, "variant")],
)
def test_what_save_pretrained_cannot_do_is_refused(
    saved: Path, tmp_path: Path, given: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        load(saved).save_pretrained(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_changed_weights_are_not_saved_as_codes(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    with torch.no_grad():
        model.classifier.weight.mul_(1.01)
    with pytest.raises(ArtifactError, match="not those of its codes"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ArtifactError, match="save_pretrained"):
        transformers.PreTrainedModel.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_quantized_model_is_not_quantized_again(saved: Path) -> None:
    with pytest.raises(InputError, match="quantized already"):
        vitq.quantize(load(saved), "minmax", "w4a4", CALIB)


def test_the_folder_is_no_float_model_by_name(saved: Path) -> None:
    with pytest.raises(InputError, match="quantized already"):
        load_model(f"hf:{saved}")


def test_another_class_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(InputError, match=r"is of ViTForImageClassification, and cannot be loaded as ViTModel"):
        transformers.AutoModel.from_pretrained(saved)


def test_preparation_of_images_goes_along(tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photo = Image.fromarray(pixels.numpy())
    for number, own in enumerate(
        (
            Preprocess((3, 32, 32), "bilinear", crop_pct=1.0, crop_mode="squash"),
            Preprocess((3, 32, 32), "bicubic", crop_pct=32 / 36, crop_mode="center_floor"),
        )
    ):
        qmodel = vitq.quantize(float_model("vit"), "minmax", "w4a4", CALIB)
        qmodel.preprocess = own.to_dict()
        qmodel.save_pretrained(tmp_path / str(number))
        assert Preprocess.from_hf(json.loads((tmp_path / str(number) / PROCESSOR).read_text())) == own
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / str(number))
        made = processor(photo, return_tensors="pt")["pixel_values"][0]
        step = 1 / 255 / min(own.std)  # transformers resizes tensors here, vitq images: a few grey levels apart
        assert float((made - own.transform()(photo)).abs().max()) < 6 * step
        model = load(tmp_path / str(number))
        model.save_pretrained(tmp_path / f"{number} again")
        assert (tmp_path / f"{number} again" / PROCESSOR).is_file()


def test_a_preparation_that_no_processor_has_is_left_out(tmp_path: Path) -> None:
    qmodel = vitq.quantize(float_model("vit"), "minmax", "w4a4", CALIB)
    qmodel.preprocess = Preprocess((3, 32, 32), crop_mode="border").to_dict()
    qmodel.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / PROCESSOR).exists()


# -- what cannot be written ----------------------------------------------------------------------------------


def test_a_model_of_another_library_is_refused(tmp_path: Path) -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w4a4", seeded_images(4))
    with pytest.raises(InputError, match="no model of transformers"):
        qmodel.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_replaced(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="exists"):
        quantized("vit", "repq_vit").save_pretrained(saved)


def test_a_model_that_was_changed_after_it_was_built_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(float_model("vit"))
    model.vit.layers[0].mlp.activation_fn = nn.ReLU()
    if hasattr(model.vit.layers[0].mlp, "intermediate_act_fn"):
        model.vit.layers[0].mlp.intermediate_act_fn = nn.ReLU()
    qmodel = vitq.quantize(model, "minmax", "w8a8", images(4))
    with pytest.raises(ExportError, match=r"does not load again|computes something else"):
        qmodel.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- damage --------------------------------------------------------------------------------------------------


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def change_document(folder: Path, old: str, new: str) -> None:
    def change(data: dict[str, Any]) -> None:
        entry = data["quantization_config"]
        assert old in entry["document"]
        entry["document"] = entry["document"].replace(old, new)

    change_config(folder, change)


def refused(folder: Path) -> str:
    """The error through transformers, which must be the same kind through vitq."""
    with pytest.raises(ArtifactError) as own:
        vitq.load(folder)
    with pytest.raises((ArtifactError, InputError)) as theirs:
        load(folder)
    assert theirs.value.args
    return str(own.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["quantization_config"].pop("document"), "no artifact in it"),
        (lambda d: d["quantization_config"].update(document="{"), "no artifact in it"),
        (lambda d: d["quantization_config"].update(document="[]"), "no artifact in it"),
        (lambda d: d["quantization_config"].update(document=[1]), "no artifact in it"),
        (lambda d: d["quantization_config"].update(bits="w8a8"), "bits differ"),
    ],
)
def test_an_entry_that_is_damaged_is_one_error(folder: Path, change: Callable[[Any], Any], told: str) -> None:
    change_config(folder, change)
    assert told in refused(folder)


def test_documents_and_tensors_that_were_changed_or_exchanged(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    quantized("vit", "minmax").save_pretrained(other)
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    assert "damaged" in refused(folder)
    change_document(other, '"seed":0', '"seed":1')
    assert "digest" in refused(other)
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    assert "damaged" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_any_changed_byte_is_noticed_or_changes_nothing(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    draw = random.Random(0)
    expected = outputs(quantized("vit", "repq_vit"))
    for _ in range(FLIPS):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(bytes(data))
        try:
            found = outputs(vitq.load(folder))
        except ArtifactError:
            continue
        assert all(map(torch.equal, found, expected))


def test_a_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    change_document(folder, '"schema_version":1', '"schema_version":9')
    assert "upgrade vitq" in refused(folder)


def test_a_class_that_is_none_of_transformers_is_not_looked_up_elsewhere(folder: Path) -> None:
    from vitq.data.source import build_model

    qmodel = vitq.load(folder)
    assert qmodel.source is not None
    for name in ("os", "AutoModel", "torch.nn.Linear", "PreTrainedModel", "SwinForImageClassification", "__import__"):
        with pytest.raises(ArtifactError, match=r"no model class|does not take a configuration"):
            build_model(qmodel.source | {"architecture": name})
