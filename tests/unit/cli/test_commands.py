"""Every command does its job on the zoo's models, and says what it did in JSON."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitq
from vitq.cli.recipes import parse_options
from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.data.images import open_images
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

from .conftest import Run, write_images

QUANTIZE_KEYS = {
    "model", "recipe", "bits", "images", "top1_float", "top1", "recovery", "seconds", "float_forward_seconds",
    "peak_rss_mb", "bytes", "effective_bits", "kind",
}  # fmt: skip
VIT, SWIN = "zoo:seeded_vit", "zoo:seeded_swin"

UNFAITHFUL = """
import torch
from torch import nn


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        return self.fc(x.flatten(2).mean(-1).repeat(1, 3)[:, :8]) + self.seen


def build():
    return Picky().eval()
"""

MLP = """
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
"""


def predictions_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_recipes_lists_everything_registered(run: Run) -> None:
    answer = run("recipes", json_file=True)
    assert answer.code == 0
    assert [row["name"] for row in answer.json["recipes"]] == [*RECIPES, *MODIFIERS]
    assert all(row["paper"] and row["what"] for row in answer.json["recipes"])
    assert all(name in answer.out for name in RECIPES)


@pytest.mark.parametrize("model", [VIT, SWIN])
def test_inspect_accounts_for_every_product(run: Run, model: str) -> None:
    answer = run("inspect", model, json_file=True)
    assert answer.code == 0
    found = answer.json
    assert found["ok"]
    assert found["off_difference"] < 1e-4
    assert found["quantized_share"] >= 0.99
    assert found["has_attention"]
    assert found["blocks"]
    assert {"id", "role", "owner", "axes", "shape"} <= set(found["sites"][0])
    assert all(call["sites"] or call["reason"] for call in found["calls"])
    assert {"QKV_IN", "SOFTMAX_OUT", "HEAD_IN"} <= {site["role"] for site in found["sites"]}
    assert "100.00 %" in answer.out


def test_inspect_fails_where_switched_off_quantizers_change_the_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(UNFAITHFUL)
    answer = run("inspect", f"{tmp_path}/picky.py:build", "--quiet", json_file=True)
    assert answer.code == 1
    assert not answer.json["ok"]
    assert "switched off change the output" in answer.err
    assert not answer.out


def test_inspect_tells_what_an_artifact_is(run: Run, artifact: Path, tmp_path: Path) -> None:
    answer, config = run("inspect", artifact, json_file=True), json.loads((artifact / "config.json").read_text())
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["recipe"], found["bits"]) == (config["plan"]["recipe"]["name"], config["plan"]["bits"])
    assert sum(row["sites"] for row in found["roles"]) == len(config["formats"])
    assert found["bytes"] == sum(file.stat().st_size for file in artifact.iterdir())
    assert found["effective_bits"] == config["effective_bits"]
    assert all(text in answer.out for text in ("simulated", "SOFTMAX_OUT", "bits per weight", "calibration_images"))
    broken = shutil.copytree(artifact, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "is damaged" in run("inspect", broken).error
    weights.unlink()
    assert "is missing" in run("inspect", broken).error
    assert "are for models" in run("inspect", artifact, "--image-size", "32").error
    assert "no config.json" in run("inspect", tmp_path).error


def test_a_model_without_attention_works_and_says_so(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mlp.py").write_text(MLP)
    spec = f"{tmp_path}/mlp.py:build"
    answer = run("inspect", spec, "--image-size", "32", json_file=True)
    assert answer.code == 0
    assert not answer.json["has_attention"]
    assert "no attention" in answer.out
    qmodel = vitq.quantize(load_model(spec).model, "minmax", "w8a8", seeded_images(4))
    assert not qmodel.graph.has_attention
    assert len(qmodel.sites()) == 4


def test_quantize_reports_what_it_measured(run: Run, photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = run(
        "quantize", VIT, "--checkpoint", weights, "--recipe", "repq_vit", "--bits", "w6a6", "--calib",
        photos / "calib", "--calib-size", "8", "--eval", photos / "eval", "--out", out, json_file=True,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    found = answer.json
    assert set(found) >= QUANTIZE_KEYS
    assert found["kind"] == "simulated"
    assert (found["recipe"], found["bits"], found["images"], found["calibration_images"]) == ("repq_vit", "w6a6", 20, 8)
    assert 0 <= found["top1"] <= 100
    assert found["agreement"] > 50, "six bits must stay close to the float model"
    assert found["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert 6 < found["effective_bits"]["weight"] < 7
    assert found["seconds"] > 0
    assert found["float_forward_seconds"] > 0
    assert found["peak_rss_mb"] > 0
    stored = json.loads((out / "config.json").read_text())["metrics"]
    assert stored["top1"] == found["top1"]
    assert "simulated" in answer.out
    assert "simulated" in (out / "README.md").read_text()


def test_without_evaluation_the_same_keys_are_there(run: Run, photos: Path, tmp_path: Path) -> None:
    answer = run("quantize", SWIN, "--recipe", "minmax", "--bits", "w8a8", "--calib", photos / "flat", "--calib-size",
                 "4", "--out", tmp_path / "o", json_file=True)  # fmt: skip
    assert answer.code == 0, answer.err
    assert set(answer.json) >= QUANTIZE_KEYS
    assert answer.json["images"] == 0
    assert answer.json["top1"] is None


def test_exclusions_overrides_and_options_reach_the_artifact(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    answer = run(
        "quantize", VIT, "--calib", photos / "calib", "--calib-size", "4", "--exclude", "role=PATCH_IN", "--exclude",
        "blocks.0.mlp", "--set", "role=HEAD_IN:w8a8", "--option", "parity=true", "--out", out,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    qmodel = vitq.load(out)
    assert qmodel.plan.exclude == ("role=PATCH_IN", "blocks.0.mlp")
    assert not [s for s in qmodel.sites() if s.owner.startswith("blocks.0.mlp") or s.role == "PATCH_IN"]
    assert {qmodel.formats[s.id].bits for s in qmodel.sites() if s.owner == "head"} == {8}
    assert any(dict(f.options).get("extra_zero_level") for f in qmodel.formats.values())


def test_a_recipe_of_a_file_is_used(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from vitq import Format, PassSpec, Recipe, Rule\n\n\n"
        "@dataclass\nclass Settings:\n    note: str = ''\n\n\n"
        "def mine(weight_bits, act_bits):\n"
        "    rules = (Rule(Format('uniform', weight_bits, 'channel'), roles=('WEIGHT',)),)\n"
        "    return Recipe('mine', 'none', rules, (PassSpec.of('fit'),))\n"
    )
    answer = run("quantize", VIT, "--recipe", f"{tmp_path}/mine.py:mine", "--bits", "w4a4", "--calib",
                 photos / "calib", "--calib-size", "4", "--out", tmp_path / "o", json_file=True)  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.json["recipe"] == "mine"
    assert {s.role for s in vitq.load(tmp_path / "o").sites()} == {"WEIGHT"}


def test_evaluate_an_artifact_alone_and_beside_its_float_model(
    run: Run, artifact: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    alone = run("evaluate", artifact, "--data", photos / "eval", "--predictions", tmp_path / "q.csv", json_file=True)
    assert alone.code == 0, alone.err
    assert alone.json["kind"] == "simulated"
    assert alone.json["images"] == 20
    rows = predictions_of(tmp_path / "q.csv")
    assert len(rows) == 20
    assert alone.json["top1"] == pytest.approx(100 * sum(r["label"] == r["predicted"] for r in rows) / 20)

    pair = run("evaluate", artifact, "--data", photos / "eval", "--checkpoint", weights, "--fidelity", json_file=True)
    assert pair.code == 0, pair.err
    assert pair.json["top1"] == alone.json["top1"]
    assert {"top1_float", "recovery", "agreement", "difference"} <= set(pair.json)
    assert pair.json["fidelity"]["agreement"] == pytest.approx(pair.json["agreement"])
    assert len(pair.json["fidelity"]["sites"]) > 20

    single = run("evaluate", VIT, "--checkpoint", weights, "--data", photos / "eval", json_file=True)
    assert single.code == 0, single.err
    assert single.json["kind"] == "float"
    assert single.json["top1"] == pair.json["top1_float"]


def test_evaluate_another_checkpoint_than_the_quantized_one_is_refused(
    run: Run, artifact: Path, photos: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    other = {name: value + 1e-3 for name, value in load_model(VIT).model.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    answer = run("evaluate", artifact, "--data", photos / "eval", "--checkpoint", tmp_path / "other.safetensors")
    assert "digests differ" in answer.error


def test_calibration_images_are_left_out_and_said(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(photos / "calib", mixed)
    answer = run("evaluate", artifact, "--data", mixed, json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["images"] == 12
    assert "8 images" in answer.err
    assert "left out" in answer.err

    quantized = run("quantize", VIT, "--calib", photos / "calib", "--calib-size", "8", "--eval", mixed, "--recipe",
                    "minmax", "--bits", "w8a8", "--out", tmp_path / "o", json_file=True)  # fmt: skip
    assert quantized.code == 0, quantized.err
    assert (quantized.json["images"], quantized.json["left_out"]) == (12, 8)
    assert "8 images" in quantized.err

    nothing = run("quantize", VIT, "--calib", photos / "calib", "--calib-size", "20", "--eval", mixed, "--out",
                  tmp_path / "o2")  # fmt: skip
    assert "calibration images too" in nothing.error


def test_compare_an_artifact_with_a_prediction_file(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    csv_file = tmp_path / "float.csv"
    assert run("evaluate", VIT, "--data", photos / "eval", "--predictions", csv_file).code == 0
    answer = run("compare", artifact, csv_file, "--data", photos / "eval", json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["images"] == 20
    assert [p["name"] for p in answer.json["predictions"]] == [str(artifact), str(csv_file)]
    (pair,) = answer.json["pairs"]
    top1 = [p["top1"] for p in answer.json["predictions"]]
    assert pair["mean"] == pytest.approx(top1[0] - top1[1], abs=1e-3)


@pytest.mark.parametrize("by", ["site", "role", "block"])
def test_diagnose_ranks_the_groups_of_an_artifact(
    run: Run, artifact: Path, weights: Path, photos: Path, by: str
) -> None:
    answer = run("diagnose", artifact, "--checkpoint", weights, "--data", photos / "flat", "--images", "4", "--by", by,
                 json_file=True)  # fmt: skip
    assert answer.code == 0, answer.err
    suspects = answer.json["suspects"]
    assert suspects[-1]["name"] == "(all)"
    kls = [s["kl"] for s in suspects[:-1]]
    assert kls == sorted(kls, reverse=True)
    assert sum(s["sites"] for s in suspects[:-1]) == suspects[-1]["sites"] == len(vitq.load(artifact).sites())


def test_diagnose_a_model_and_an_artifact_that_needs_no_checkpoint(run: Run, photos: Path, tmp_path: Path) -> None:
    words = ("--calib", photos / "calib", "--calib-size", "8", "--recipe", "minmax", "--bits", "w4a4")
    out = tmp_path / "o"
    assert run("quantize", VIT, *words, "--out", out).code == 0
    ask = ("--data", photos / "flat", "--images", "4", "--by", "role")
    model = run("diagnose", VIT, *words, *ask, json_file=True)
    assert model.code == 0, model.err
    assert run("diagnose", out, *ask, json_file=True).json["suspects"] == model.json["suspects"]


@pytest.mark.parametrize("recipe", ["minmax", "repq_vit"])
def test_batch_size_changes_neither_the_artifact_nor_a_prediction(
    run: Run, photos: Path, tmp_path: Path, recipe: str
) -> None:
    tensors, predictions = [], []
    for size in ("1", "50"):
        out = tmp_path / size
        answer = run("quantize", VIT, "--calib", photos / "calib", "--calib-size", "16", "--eval", photos / "eval",
                     "--recipe", recipe, "--batch-size", size, "--out", out)  # fmt: skip
        assert answer.code == 0, answer.err
        tensors.append((out / "model.safetensors").read_bytes())
        ask = ("evaluate", tmp_path / "1", "--data", photos / "eval", "--batch-size", size)
        assert run(*ask, "--predictions", tmp_path / f"{size}.csv").code == 0
        predictions.append(predictions_of(tmp_path / f"{size}.csv"))
    assert tensors[0] == tensors[1]
    assert predictions[0] == predictions[1]


def test_same_seed_gives_the_same_bytes_and_another_seed_other_images(run: Run, photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        answer = run("quantize", VIT, "--calib", photos / "calib", "--calib-size", "8", "--seed", seed, "--out",
                     tmp_path / name)  # fmt: skip
        assert answer.code == 0, answer.err
        torch.randn(100)  # whatever else draws numbers in between changes nothing
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    drawn = [json.loads((tmp_path / n / "config.json").read_text())["provenance"]["calibration_ids"] for n in "abc"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == open_images(photos / "calib", labels="none").sample(8, 0).ids


def test_quiet_prints_nothing_when_all_is_well(
    run: Run, artifact: Path, weights: Path, photos: Path, tmp_path: Path
) -> None:
    calib = ("--calib", photos / "calib", "--calib-size", "4")
    commands: list[tuple[str | Path, ...]] = [
        ("recipes",),
        ("inspect", VIT),
        ("quantize", VIT, *calib, "--eval", photos / "eval", "--out", tmp_path / "o"),
        ("evaluate", artifact, "--data", photos / "eval", "--checkpoint", weights, "--fidelity"),
        ("compare", artifact, tmp_path / "o", "--data", photos / "eval"),
        ("diagnose", artifact, "--checkpoint", weights, "--data", photos / "flat", "--images", "2", "--by", "role"),
    ]
    for words in commands:
        answer = run(*words, "--quiet")
        assert (answer.code, answer.out, answer.err) == (0, "", ""), words


def test_unicode_and_spaces_in_paths(run: Run, tmp_path: Path, weights: Path) -> None:
    place = tmp_path / "größe  зд 图 [x]"
    calib = write_images(place / "fotos à", 20, 3)
    shutil.copy(weights, place / "poids é.safetensors")
    out = place / "sortie ü"
    answer = run("quantize", VIT, "--checkpoint", place / "poids é.safetensors", "--calib", calib, "--calib-size", "4",
                 "--recipe", "minmax", "--out", out)  # fmt: skip
    assert answer.code == 0, answer.err
    assert str(out) in answer.out
    assert run("evaluate", out, "--data", calib, "--predictions", place / "p é.csv").code == 0
    assert (place / "p é.csv").is_file()


def test_option_values_are_read_as_what_they_look_like() -> None:
    assert parse_options(["a=true", "b=False", "c=3", "d=0.5", "e=mean", "f=x=y"]) == {
        "a": True, "b": False, "c": 3, "d": 0.5, "e": "mean", "f": "x=y",
    }  # fmt: skip


def test_the_command_is_installed() -> None:
    script = Path(sys.executable).with_name("vitq")
    if not script.exists():
        pytest.skip("vitq is not installed as a script here")
    answer = subprocess.run([script, "recipes"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "repq_vit" in answer.stdout
