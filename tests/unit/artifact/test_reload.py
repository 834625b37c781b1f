"""What is loaded computes bit for bit what was saved, in every way in which a model can be given."""

from __future__ import annotations

import copy
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.artifact import schema
from vitq.core.errors import VitqError
from vitq.core.recipe import RECIPES
from vitq.core.rewrite import REWRITES
from vitq.quantizers.packing import packed_size

from .conftest import CALIB, TINY_IN, UNSEEN, fresh, outputs, quantized, source_of, tiny, tiny_qmodel, zoo

MODELS = ("seeded_vit", "seeded_swin")
BITS = ("w8a8", "w6a6", "w4a4", "w3a3", "w2a4", "w4a16")
FEW = {"steps": 32, "rounds": 1, "rows": 32}  # options of searches, for recipes that have them


def assert_reloads(qmodel: vitq.QuantModel, folder: Path, **options: object) -> vitq.QuantModel:
    vitq.save(qmodel, folder)
    again = vitq.load(folder, **options)  # type: ignore[arg-type]
    x = UNSEEN.to(next(qmodel.parameters()).dtype)
    assert torch.equal(outputs(again, x), outputs(qmodel, x))
    assert again.formats == qmodel.formats
    assert again.plan == qmodel.plan
    assert again.effective_bits() == qmodel.effective_bits()
    assert again.frozen
    return again


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_reloads_at_every_width(model: str, recipe: str, bits: str, tmp_path: Path) -> None:
    known = inspect.signature(RECIPES[recipe]).parameters
    few = {option: value for option, value in FEW.items() if option in known}
    qmodel = quantized(model, recipe, bits, options=few)
    assert_reloads(qmodel, tmp_path / "o")
    tensors = (tmp_path / "o" / schema.TENSORS).stat().st_size
    codes = sum(
        packed_size(w.numel(), qmodel.quantizers[s].bits) for s in qmodel.sites() if (w := qmodel.weight(s)) is not None
    )
    assert tensors >= codes


@pytest.mark.parametrize("model", MODELS)
def test_exclusions_overrides_and_parity_mode_reload(model: str, tmp_path: Path) -> None:
    qmodel = quantized(
        model,
        exclude=["role=PATCH_IN", "*.attn.proj:*"],
        overrides=["role=HEAD_IN:w8a8", "role=FC2_IN:a8", "*.mlp.fc1:*:w3"],
        options={"parity": True},
    )
    again = assert_reloads(qmodel, tmp_path / "o")
    assert any(dict(f.options).get("fractional_zero_point") for f in again.formats.values())
    assert not [s for s in again.sites() if s.owner.endswith("attn.proj")]
    assert {again.formats[s.id].bits for s in again.sites("WEIGHT") if s.owner.endswith("fc1")} == {3}


def test_rewrites_are_replayed_with_the_bias_they_add(tmp_path: Path) -> None:
    qmodel = quantized("seeded_swin")
    assert zoo("seeded_swin").get_submodule("layers.1.downsample.reduction").bias is None
    again = assert_reloads(qmodel, tmp_path / "o")
    assert again.model.get_submodule("layers.1.downsample.reduction").bias is not None
    assert [r.name for r in again.rewrites] == [r.name for r in qmodel.rewrites] == ["fold_norm_scale"] * 9
    assert all(r.name in REWRITES for r in again.rewrites)


class Tied(nn.Module):
    """Two linears that share one weight, and a third that is another name of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.alias = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(torch.relu(self.b(self.a(self.norm(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_tied_weights_are_stored_once_and_stay_tied(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Tied().eval()
    qmodel = vitq.quantize(model, recipe, "w4a4", TINY_IN)
    vitq.save(qmodel, tmp_path / "o")
    again = vitq.load(tmp_path / "o", model=Tied())
    assert torch.equal(outputs(again, TINY_IN), outputs(qmodel, TINY_IN))
    assert again.model.get_parameter("b.weight") is again.model.get_parameter("a.weight")
    config = json.loads((tmp_path / "o" / schema.CONFIG).read_text())
    assert len(config["packed"]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["minmax", "repq_vit"])
def test_models_of_other_types_reload_in_their_type(dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    qmodel = vitq.quantize(fresh("seeded_vit").to(dtype), recipe, "w4a4", CALIB.to(dtype))
    qmodel.source = source_of("seeded_vit")
    again = assert_reloads(qmodel, tmp_path / "o")
    assert {p.dtype for p in again.model.parameters()} == {dtype}


def test_a_given_architecture_gets_the_weights(tmp_path: Path) -> None:
    qmodel = quantized("seeded_vit")
    qmodel.source = None
    vitq.save(qmodel, tmp_path / "o")
    model = fresh("seeded_vit")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    again = vitq.load(tmp_path / "o", model=model.train())
    assert again.model is model
    assert torch.equal(outputs(again), outputs(qmodel))


@pytest.mark.parametrize("model", MODELS)
def test_float_weights_are_kept_where_the_float_model_is_given(model: str, tmp_path: Path) -> None:
    qmodel = quantized(model)
    vitq.save(qmodel, tmp_path / "o")
    again = vitq.load(tmp_path / "o", float_model=fresh(model))
    assert torch.equal(outputs(again), outputs(qmodel))
    assert not again.frozen
    again.set_state("off")
    expected = outputs(zoo(model))
    assert torch.allclose(outputs(again), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    again.set_state("on")
    assert torch.equal(outputs(again.freeze()), outputs(qmodel))
    with pytest.raises(VitqError, match="float_model="):
        vitq.load(tmp_path / "o").set_state("off")


def test_without_rewrites_the_float_output_is_exact(tmp_path: Path) -> None:
    vitq.save(quantized("seeded_vit", "minmax"), tmp_path / "o")
    again = vitq.load(tmp_path / "o", float_model=fresh("seeded_vit"))
    again.set_state("off")
    assert torch.equal(outputs(again), outputs(zoo("seeded_vit")))


def test_a_loaded_artifact_can_be_saved_again(tmp_path: Path) -> None:
    vitq.save(quantized("seeded_swin"), tmp_path / "a")
    vitq.save(vitq.load(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a" / schema.TENSORS).read_bytes() == (tmp_path / "b" / schema.TENSORS).read_bytes()
    assert torch.equal(outputs(vitq.load(tmp_path / "b")), outputs(vitq.load(tmp_path / "a")))


def test_copies_states_and_attributes_work_as_for_any_module(tmp_path: Path) -> None:
    qmodel = quantized("seeded_vit")
    vitq.save(qmodel, tmp_path / "o")
    again = vitq.load(tmp_path / "o")
    expected = outputs(again)
    twin = copy.deepcopy(again)
    assert torch.equal(outputs(twin), expected)
    with torch.no_grad():
        next(iter(twin.quantizers.children())).scale.mul_(3)  # type: ignore[union-attr, operator]
    assert not torch.equal(outputs(twin), expected)
    assert torch.equal(outputs(again), expected), "a copy shares nothing"
    twin.load_state_dict(again.state_dict())
    assert torch.equal(outputs(twin), expected)
    assert torch.equal(outputs(again.to("cpu")), expected)
    assert again.num_classes == 10
    assert again.embed_dim == 64
    assert again.head.out_features == 10
    assert again.get_classifier() is again.model.head
    with pytest.raises(AttributeError, match="nonsense"):
        again.nonsense  # noqa: B018


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_take_no_more_room_than_their_bits(bits: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    qmodel = quantized("seeded_vit", "minmax", f"w{bits}a8")
    written = vitq.save(qmodel, tmp_path / "o")
    tensors = load_file(tmp_path / "o" / schema.TENSORS)
    weights = qmodel.sites("WEIGHT")
    assert weights
    for site in weights:
        weight = qmodel.weight(site)
        assert weight is not None
        assert tensors[f"codes/{site.id}"].numel() == math.ceil(weight.numel() * bits / 8)
        assert f"state/{site.param}" not in tensors
    assert written["bytes"] == sum(f.stat().st_size for f in (tmp_path / "o").iterdir())
    assert bits < written["effective_bits"]["weight"] < bits + 1


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        vitq.save(quantized("seeded_swin"), tmp_path / name)
    log = [json.loads((tmp_path / n / schema.CONFIG).read_text()) for n in "ab"]
    assert (tmp_path / "a" / schema.TENSORS).read_bytes() == (tmp_path / "b" / schema.TENSORS).read_bytes()
    assert {k: v for k, v in log[0].items() if k not in ("log", "digest")} == {
        k: v for k, v in log[1].items() if k not in ("log", "digest")
    }


def test_metrics_and_logs_of_any_plain_kind_survive(tmp_path: Path) -> None:
    qmodel = tiny_qmodel()
    qmodel.log["by width"] = {10: 1.5, 9: (1, 2)}
    vitq.save(qmodel, tmp_path / "o", metrics={"top1": 0.1, "kl": math.inf, "name": "größe"})
    assert vitq.load(tmp_path / "o", model=tiny()).log["by width"] == {"10": 1.5, "9": [1, 2]}
    with pytest.raises(vitq.VitqError, match="plain JSON"):
        vitq.save(qmodel, tmp_path / "p", metrics={"top1": np.float32(1)})
    assert not (tmp_path / "p").exists()


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    vitq.save(quantized("seeded_vit"), tmp_path / "named", metrics={"top1": 71.5})
    card = (tmp_path / "named" / schema.CARD).read_text()
    assert "repq_vit" in card
    assert "simulated" in card
    assert "71.5" in card
    assert 'vitq.load("path/to/this/folder")' in card
    vitq.save(tiny_qmodel(), tmp_path / "unnamed")
    assert "model=architecture" in (tmp_path / "unnamed" / schema.CARD).read_text()


# -- other module names --------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """Tiny with other names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ln = nn.Linear(6, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 7, bias=False), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.ln(self.first(x)))))  # type: ignore[no-any-return]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_renaming_map_carries_an_artifact_to_other_names(tmp_path: Path) -> None:
    qmodel = tiny_qmodel()
    assert qmodel.rewrites, "names inside of rewrites must be mapped, too"
    vitq.save(qmodel, tmp_path / "o")
    names = {"stem": "first", "norm": "ln", "fc1": "up", "fc2": "down"}
    again = vitq.load(tmp_path / "o", model=Renamed(), rename=names)
    assert torch.equal(outputs(again, TINY_IN), outputs(qmodel, TINY_IN))
    vitq.save(again, tmp_path / "p")
    assert torch.equal(outputs(vitq.load(tmp_path / "p", model=Renamed()), TINY_IN), outputs(qmodel, TINY_IN))


def test_a_model_inside_of_another_is_named_by_the_empty_name(tmp_path: Path) -> None:
    qmodel = tiny_qmodel()
    vitq.save(qmodel, tmp_path / "o")
    wrapped = vitq.load(tmp_path / "o", model=Wrapped(), rename={"": "inner"})
    assert torch.equal(outputs(wrapped, TINY_IN), outputs(qmodel, TINY_IN))
    vitq.save(wrapped, tmp_path / "p")
    back = vitq.load(tmp_path / "p", model=tiny(), rename={"inner": ""})
    assert torch.equal(outputs(back, TINY_IN), outputs(qmodel, TINY_IN))
