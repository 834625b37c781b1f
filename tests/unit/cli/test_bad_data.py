"""Checkpoints and images that cannot be used get one clear line before any long work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitq
import vitq.cli
from vitq.core.errors import DataError, InputError
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

from .conftest import Quantize, Run, write_images

VIT = "zoo:seeded_vit"


# -- weights -----------------------------------------------------------------------------------------------


def checkpoint(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = load_model(VIT).model.state_dict()
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_checkpoint_that_lacks_and_has_other_keys(quantize: Quantize, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda s: s.update(extra=s.pop("blocks.0.mlp.fc1.weight")))
    error = quantize("--checkpoint", path).error
    assert "blocks.0.mlp.fc1.weight" in error
    assert "extra" in error
    assert path.name in error


def test_a_checkpoint_of_another_class_count(quantize: Quantize, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda s: s.update({"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}))
    error = quantize("--checkpoint", path).error
    assert "7 classes" in error
    assert "10" in error


def test_a_checkpoint_that_is_missing_truncated_or_no_checkpoint(
    quantize: Quantize, tmp_path: Path, weights: Path
) -> None:
    assert "no checkpoint file" in quantize("--checkpoint", tmp_path / "none.safetensors").error
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    assert "cut.safetensors" in quantize("--checkpoint", tmp_path / "cut.safetensors").error
    (tmp_path / "notes.txt").write_text("hello")
    assert "unknown kind" in quantize("--checkpoint", tmp_path / "notes.txt").error


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.model."])
def test_wrappers_of_checkpoints_are_understood(
    run: Run, photos: Path, weights: Path, tmp_path: Path, prefix: str
) -> None:
    state = {prefix + name: value for name, value in load_model(VIT).model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
    found = [
        run("evaluate", VIT, "--checkpoint", path, "--data", photos / "eval", json_file=True)
        for path in (weights, tmp_path / "wrapped.pth")
    ]
    assert found[0].code == 0, found[0].err
    assert found[1].json["top1"] == found[0].json["top1"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(quantize: Quantize, tmp_path: Path, value: float) -> None:
    path = checkpoint(tmp_path, lambda s: s["blocks.1.attn.qkv.weight"].view(-1)[3:4].fill_(value))
    error = quantize("--checkpoint", path).error
    assert "NaN or Inf" in error
    assert "blocks.1.attn.qkv.weight" in error


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_library_calls_refuse_weights_and_images_that_are_not_finite(value: float) -> None:
    model, images = load_model(VIT).model, seeded_images(2)
    images[1, 0, 0, 0] = value
    with pytest.raises(DataError, match="NaN or Inf"):
        vitq.quantize(model, "minmax", "w8a8", images)
    with torch.no_grad():
        model.head.weight[0, 0] = value
    with pytest.raises(InputError, match=r"head\.weight"):
        vitq.quantize(model, "minmax", "w8a8", seeded_images(2))


# -- images ------------------------------------------------------------------------------------------------


def spoil(folder: Path, kind: str) -> Path:
    """Make one of the images unusable."""
    victim = sorted(folder.rglob("*.png"))[2]
    if kind == "empty":
        victim.write_bytes(b"")
    elif kind == "foreign":
        victim.write_text("not an image")
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim


@pytest.mark.parametrize("kind", ["empty", "foreign", "truncated"])
def test_unreadable_calibration_images_are_named_and_skipped_only_if_asked(
    run: Run, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = write_images(tmp_path / "calib", 8, 5, classes=0)
    victim = spoil(folder, kind)
    words = ("quantize", VIT, "--recipe", "minmax", "--calib", folder, "--calib-size", "8", "--out", tmp_path / "o")
    skipped = run(*words, "--skip-bad", json_file=True)
    assert skipped.code == 0, skipped.err
    assert skipped.json["calibration_images"] == 7
    assert f"skipped 1 unreadable images of {folder}: {victim.name}" in skipped.err
    ids = vitq.load(tmp_path / "o").provenance["calibration_ids"]
    assert victim.name not in ids
    assert len(ids) == 7
    request.getfixturevalue("not_reached")
    assert victim.name in run(*words, "--force").error


@pytest.mark.parametrize("kind", ["empty", "foreign", "truncated"])
def test_unreadable_evaluation_images_are_named_before_quantizing(
    run: Run, photos: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = write_images(tmp_path / "eval", 20, 6)
    victim = spoil(folder, kind)
    words = ("quantize", VIT, "--recipe", "minmax", "--calib", photos / "calib", "--calib-size", "4", "--eval", folder,
             "--out", tmp_path / "o")  # fmt: skip
    skipped = run(*words, "--skip-bad", json_file=True)
    assert skipped.code == 0, skipped.err
    assert skipped.json["images"] == 19
    assert victim.name in skipped.err
    request.getfixturevalue("not_reached")
    assert victim.name in run(*words, "--force").error
    assert victim.name in run("evaluate", VIT, "--data", folder).error


def test_many_calibration_images_are_streamed_with_the_bad_ones_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitq.cli.work, "IN_MEMORY", 4)
    folder = write_images(tmp_path / "calib", 8, 5, classes=0)
    spoil(folder, "truncated")
    answer = run("quantize", VIT, "--recipe", "minmax", "--calib", folder, "--calib-size", "8", "--skip-bad", "--out",
                 tmp_path / "o", json_file=True)  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.json["calibration_images"] == 7


def test_a_folder_of_unreadable_images_only(quantize: Quantize, tmp_path: Path) -> None:
    folder = tmp_path / "calib"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.png").write_bytes(b"x")
    assert "no readable image" in quantize("--skip-bad", calib=folder).error


def test_fewer_images_than_asked(quantize: Quantize) -> None:
    assert "asked 21, found 20" in quantize("--calib-size", "21").error


def test_folders_that_are_missing_or_hold_no_images(quantize: Quantize, tmp_path: Path) -> None:
    assert "no such file or folder" in quantize(calib=tmp_path / "none").error
    (tmp_path / "empty").mkdir()
    assert "no images" in quantize(calib=tmp_path / "empty").error


def test_more_classes_than_the_model_has(quantize: Quantize, run: Run, artifact: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "eval", 12, 1, classes=12)
    assert "10 classes" in quantize("--eval", folder).error
    assert "10 classes" in run("evaluate", artifact, "--data", folder).error


def test_evaluation_without_labels(quantize: Quantize, run: Run, artifact: Path, photos: Path) -> None:
    assert "has no labels" in quantize("--eval", photos / "flat").error
    assert "has no labels" in run("evaluate", artifact, "--data", photos / "flat").error


def test_images_of_odd_kinds_are_read(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        Image.new(mode, (40, 20)).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    answer = run("quantize", VIT, "--recipe", "minmax", "--calib", folder, "--calib-size", "5", "--out", tmp_path / "o")
    assert answer.code == 0, answer.err
