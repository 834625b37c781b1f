"""vitq demo, and the embedded images by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import vitq
from vitq.cli import demo
from vitq.data.zoo import zoo_images

from .conftest import Run


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BITS": ("w8a8",), "RECIPES": ("minmax",), "IMAGES": 100, "CALIBRATED": 4}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("short_demo")
def test_demo_measures_accuracy_and_makes_artifacts_that_reload(run: Run, tmp_path: Path) -> None:
    words = ("demo", "--out", tmp_path / "demo")
    answer = run(*words, json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["kind"] == "simulated"
    assert "simulated" in answer.out
    assert "all reload to identical outputs" in answer.out
    assert "--shared" in answer.err, "says what else there is"
    rows = answer.json["rows"]
    assert [(row["model"], row["recipe"]) for row in rows] == [
        (name, recipe) for name in ("fashion_vit", "fashion_swin") for recipe in ("float", "minmax")
    ]
    for reference, row in (rows[:2], rows[2:]):
        assert reference["top1"] >= 80, "100 images of a model that is right on 90 %"
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
        assert row["recovery"] == pytest.approx(row["top1"] / reference["top1"], abs=1e-3)
        assert row["recovery"] > 0.9
        assert (row["images"], row["reloads"]) == (100, "identical")
    again = vitq.load(tmp_path / "demo" / "fashion_vit_minmax_w8a8")
    assert again(zoo_images("fashion_test")[0][:1]).shape == (1, 10)
    assert again.provenance["calibration"] == "zoo:fashion_calib"
    assert run(*words, "--quiet").code == 0, "a second demo replaces the first one's artifacts"


def test_demo_fails_if_an_artifact_gives_other_outputs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_demo: None
) -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

    monkeypatch.setattr(demo, "load", lambda folder: Other())
    answer = run("demo", "--out", tmp_path / "demo")
    assert "fashion_vit minmax w8a8" in answer.error


def test_demo_quantizes_real_weights_where_they_are_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    answer = run("demo", "--out", tmp_path / "demo", "--shared", shared)
    assert f"models/{demo.SHARED}.safetensors is not there" in answer.error
    (shared / "models").mkdir(parents=True)
    (shared / "models" / f"{demo.SHARED}.safetensors").touch()
    (shared / "data" / "imagenet_sample").mkdir(parents=True)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(demo, "MODELS", ())
    monkeypatch.setattr(demo, "quantize_command", lambda *words, **options: asked.append((*words, options)))
    assert run("demo", "--out", tmp_path / "demo", "--shared", shared).code == 0
    ((model, calib, out, options),) = asked
    assert (model, out) == (demo.SHARED, tmp_path / "demo" / demo.SHARED)
    assert str(calib).endswith("calib")
    assert isinstance(options, dict)
    assert options["force"]


def test_embedded_images_are_named_like_folders(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = run("quantize", "zoo:fashion_vit", "--calib", "zoo:fashion_calib", "--calib-size", "4", "--recipe",
                 "minmax", "--bits", "w8a8", "--eval", "zoo:fashion_test", "--out", out, json_file=True)  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.json["images"] == 2000
    assert answer.json["top1_float"] >= 90
    assert answer.json["recovery"] > 0.95
    wrong = run("quantize", "zoo:fashion_vit", "--calib", "zoo:fashion_cal", "--out", tmp_path / "other")
    assert "Did you mean 'fashion_calib'" in wrong.error
