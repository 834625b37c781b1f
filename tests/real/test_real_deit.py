"""The main job on real weights and real photos: DeiT-Tiny from ../shared. Skipped, saying so, where that is absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vitq
from vitq.cli import app

pytestmark = pytest.mark.real
MODEL = "deit_tiny_patch16_224"
PHOTOS = 20


@pytest.fixture(scope="module")
def photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One photo of each of the first classes of `report`, as links, in folders named by wnid."""
    source, root = shared / "data" / "imagenet_sample" / "report", tmp_path_factory.mktemp("report")
    for folder in sorted(p for p in source.iterdir() if p.is_dir())[:PHOTOS]:
        (root / folder.name).mkdir()
        photo = min(folder.iterdir())
        (root / folder.name / photo.name).symlink_to(photo)
    return root


@pytest.fixture(scope="module")
def result(shared: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The issue's main command, on fewer images: where the artifact is, and what --json holds."""
    out = tmp_path_factory.mktemp("real")
    words = [
        "quantize", MODEL, "--checkpoint", shared / "models" / f"{MODEL}.safetensors", "--recipe", "repq_vit",
        "--bits", "w4a4", "--calib", shared / "data" / "imagenet_sample" / "calib", "--calib-size", "8",
        "--eval", photos, "--out", out / "artifact", "--json", out / "result.json",
    ]  # fmt: skip
    answer = CliRunner().invoke(app, [*map(str, words)])
    assert answer.exit_code == 0, answer.stderr
    found: dict[str, object] = json.loads((out / "result.json").read_text())
    return out / "artifact", found


def test_the_main_command_gives_an_honest_number(result: tuple[Path, dict[str, object]]) -> None:
    _, found = result
    assert found["images"] == PHOTOS
    assert found["kind"] == "simulated"
    # Labels come from wnids of 20 of 1000 classes: were they ranks of folders, both would be near zero.
    assert isinstance(found["top1_float"], float)
    assert found["top1_float"] >= 60
    assert isinstance(found["top1"], float)
    assert found["top1"] >= 25


def test_the_artifact_is_small_and_loads_by_name(result: tuple[Path, dict[str, object]]) -> None:
    folder, found = result
    assert isinstance(found["bytes"], int)
    assert found["bytes"] < 3.6e6
    qmodel = vitq.load(folder)
    assert qmodel.num_classes == 1000
    assert qmodel.plan.recipe.name == "repq_vit"
    assert qmodel.provenance["calibration_images"] == 8


def test_the_loaded_artifact_predicts_what_was_measured(
    result: tuple[Path, dict[str, object]], photos: Path, tmp_path: Path
) -> None:
    folder, found = result
    words = ["evaluate", folder, "--data", photos, "--json", tmp_path / "again.json", "--quiet"]
    answer = CliRunner().invoke(app, [*map(str, words)])
    assert answer.exit_code == 0, answer.stderr
    assert json.loads((tmp_path / "again.json").read_text())["top1"] == found["top1"]
