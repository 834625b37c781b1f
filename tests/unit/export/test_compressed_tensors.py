"""The schema of compressed-tensors: valid by its own classes, read by its own code, equal to the bit."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vitq
from vitq.core.errors import ArtifactError, ExportError, InputError
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.data.zoo import build_zoo, seeded_images

from .hf_models import CALIB, UNSEEN, float_model, outputs, quantized

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

TO = "compressed-tensors"
APART = ("role=PATCH_IN", "role=QUERY", "role=KEY", "role=SOFTMAX_OUT", "role=VALUE")
LINEARS = 13


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> weight, by the package alone: its configuration, its decompression."""
    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(config_in(folder))
    found = {}
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            local = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            packer = BaseCompressor.get_value_from_registry(scheme.format)
            found[name] = packer.decompress(local, scheme)["weight"]
    return found


def linear_weights(qmodel: QuantModel) -> dict[str, torch.Tensor]:
    modules = dict(qmodel.model.named_modules())
    names = [site.owner for site in qmodel.sites(WEIGHT) if isinstance(modules[site.owner], torch.nn.Linear)]
    return {name: modules[name].weight.detach() for name in names}


def load(folder: Path) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return transformers.AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "recipe", "bits", "settings", "form", "weights"),
    [
        ("vit", "minmax", "w4a16", {}, "int-quantized", {"num_bits": 4, "symmetric": False, "strategy": "channel"}),
        ("vit", "liu2021", "w4a16", {}, "pack-quantized", {"num_bits": 4, "symmetric": True, "strategy": "channel"}),
        ("swin", "minmax", "w3a16", {}, "int-quantized", {"num_bits": 3, "symmetric": False, "strategy": "channel"}),
        ("vit", "minmax", "w8a8", {"exclude": APART}, "int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("vit", "repq_vit", "w4a4", {"exclude": APART}, "int-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("vit", "liu2021", "w4a8", {"exclude": APART}, "pack-quantized", {"num_bits": 4, "symmetric": True}),
    ],
)
def test_the_package_reads_the_weights_to_the_bit(
    name: str, recipe: str, bits: str, settings: dict[str, Any], form: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    qmodel = quantized(name, recipe, bits, **settings)
    made = vitq.export_to(qmodel, TO, tmp_path / "ct", data=UNSEEN)
    config = QuantizationConfig.model_validate(config_in(tmp_path / "ct"))
    assert config.format == form
    assert config.quantization_status.value == "compressed"
    groups = list(config.config_groups.values())
    assert sum(len(group.targets) for group in groups) == made.facts["linears"]
    assert all({key: getattr(group.weights, key) for key in weights} == weights for group in groups)

    expected, found = linear_weights(qmodel), decompressed(tmp_path / "ct")
    assert set(found) == set(expected)
    assert all(torch.equal(found[module], weight) for module, weight in expected.items())

    model = load(tmp_path / "ct")
    if bits.endswith("a16"):
        assert all(group.input_activations is None for group in groups)
        assert all(map(torch.equal, outputs(model), outputs(qmodel)))
    else:
        assert {(g.input_activations.strategy, g.input_activations.dynamic) for g in groups} == {("tensor", False)}
        assert made.facts["equal_codes"] > 0.999
        far = max(float((a - b).abs().max()) for a, b in zip(outputs(model), outputs(qmodel), strict=True))
        assert far < 0.05 * float(outputs(qmodel)[0].abs().max())
        off = copy.deepcopy(qmodel)
        off.set_state("off", [site for site in off.sites() if site.role != WEIGHT])
        assert not all(map(torch.equal, outputs(model), outputs(off)))  # inputs are really quantized


def test_groups_of_input_channels_are_a_strategy_of_their_own(tmp_path: Path) -> None:
    from vitq.core.format import Format
    from vitq.core.recipe import PassSpec, Recipe, Rule
    from vitq.core.roles import QKV_IN

    grouped = Rule(Format.of("uniform", 4, "group:8", symmetric=True), roles=(WEIGHT,))
    recipe = Recipe(name="grouped", paper="none", formats=(grouped,), passes=(PassSpec("fit"),))
    qmodel = vitq.quantize(float_model("vit"), recipe, "w4a16", CALIB, exclude=["vit.embeddings"])
    assert not qmodel.sites(QKV_IN)
    vitq.export_to(qmodel, TO, tmp_path / "ct")
    (group,) = QuantizationConfig.model_validate(config_in(tmp_path / "ct")).config_groups.values()
    assert (group.weights.strategy, group.weights.group_size) == ("group", 8)
    found = decompressed(tmp_path / "ct")
    assert all(torch.equal(found[module], weight) for module, weight in linear_weights(qmodel).items())


def test_a_process_without_vitq_computes_the_same(tmp_path: Path) -> None:
    qmodel = quantized("vit", "liu2021", "w4a16")
    vitq.export_to(qmodel, TO, tmp_path / "ct")
    save_file({"x": UNSEEN, "logits": outputs(qmodel)[0]}, tmp_path / "expected.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
model, known = AutoModelForImageClassification.from_pretrained("ct"), load_file("expected.safetensors")
with torch.no_grad():
    assert torch.equal(model(known["x"]).logits, known["logits"])
assert not any(name.partition(".")[0] == "vitq" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_weights_of_other_layers_are_named(tmp_path: Path) -> None:
    made = vitq.export_to(quantized("vit", "minmax", "w4a16"), TO, tmp_path / "ct")
    assert made.facts["decoded"] == ["vit.embeddings.patch_embeddings.projection.weight"]
    assert made.facts["linears"] == LINEARS
    assert any("take a byte per code" in line for line in made.lines)


# -- what cannot be written ----------------------------------------------------------------------------------


def refused(qmodel: QuantModel, tmp_path: Path) -> str:
    with pytest.raises(InputError) as caught:
        vitq.export_to(qmodel, TO, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
    return str(caught.value)


def test_sites_that_it_does_not_have_are_named_with_what_to_do(tmp_path: Path) -> None:
    told = refused(quantized("vit", "repq_vit"), tmp_path)
    assert "vit.layers.0.attention:sdpa0.softmax" in told
    assert all(f"--exclude {name}" in told for name in APART)
    assert "w4a16" in told


@pytest.mark.parametrize(
    ("recipe", "settings", "told"),
    [
        ("adalog", {"overrides": ()}, "levels that are not equally spaced"),
        ("noisyquant", {}, "(add_noise)"),
        ("repq_vit+qwt", {}, "no longer what ViTForImageClassification builds"),
    ],
)
def test_formats_and_rewrites_that_it_cannot_express(
    recipe: str, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    qmodel = quantized("vit", recipe, "w4a4", exclude=APART, **settings)
    assert told in refused(qmodel, tmp_path)


def test_models_of_other_libraries_and_folders_that_exist(tmp_path: Path) -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w4a16", seeded_images(4))
    assert "no model of transformers" in refused(qmodel, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ArtifactError, match="exists"):
        vitq.export_to(quantized("vit", "minmax", "w4a16"), TO, tmp_path / "full")


def test_a_package_that_reads_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    usual = PackedQuantizationCompressor.compress.__func__

    def other(cls: Any, state: Any, scheme: Any) -> Any:
        packed = usual(cls, state, scheme)
        packed["weight_packed"] = packed["weight_packed"] ^ 1
        return packed

    monkeypatch.setattr(PackedQuantizationCompressor, "compress", classmethod(other))
    with pytest.raises(ExportError, match=r"as others than they are|does not load"):
        vitq.export_to(quantized("vit", "liu2021", "w4a16"), TO, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
