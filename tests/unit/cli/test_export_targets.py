"""vitq export --to hf, compressed-tensors and torch: what is written, told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitq
from vitq.core.target import TARGETS
from vitq.data.families_hf import hf_source
from vitq.data.preprocess import Preprocess
from vitq.data.zoo import seeded_images

from .conftest import Run

transformers = pytest.importorskip("transformers")
APART = ["role=PATCH_IN", "role=QUERY", "role=KEY", "role=SOFTMAX_OUT", "role=VALUE"]


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=8, num_labels=10,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model of transformers, whose uniform sites are those of linear layers."""
    qmodel = vitq.quantize(model, "minmax", "w8a8", seeded_images(8), exclude=APART)
    qmodel.source = hf_source(model, None)
    qmodel.preprocess = Preprocess.from_image_size(32).to_dict()
    out = tmp_path_factory.mktemp("artifact") / "vit"
    vitq.save(qmodel, out, metrics={"top1": 12.5})
    return out


@torch.no_grad()
def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(x).logits
    return found


def test_a_folder_for_transformers(run: Run, folder: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    words = ["--out", out, "--data", photos / "eval", "--images", 6]
    answer = run("export", folder, "--to", "hf", *words, json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert (answer.json["to"], answer.json["architecture"]) == ("hf", "ViTForImageClassification")
    assert answer.json["data"] == f"6 images of {photos / 'eval'}"
    assert "to the bit" in answer.out
    x = seeded_images(3, seed=9)
    found = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert torch.equal(logits(found, x), logits(vitq.load(folder), x))
    assert (out / "preprocessor_config.json").is_file()
    assert "12.5" in (out / "README.md").read_text()
    assert "from_pretrained" in (out / "README.md").read_text()


def test_commands_take_such_a_folder_as_any_artifact(run: Run, folder: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert run("export", folder, "--to", "hf", "--out", out).code == 0
    for command in (["inspect"], ["evaluate", "--data", photos / "eval"]):
        one, other = (run(command[0], where, *command[1:], json_file=True) for where in (folder, out))
        assert one.code == other.code == 0, other.err
    assert run("export", out, "--to", "torch", "--out", tmp_path / "m.pt2").code == 0


def test_a_folder_for_compressed_tensors(run: Run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    answer = run("export", folder, "--to", "compressed-tensors", "--out", tmp_path / "ct", json_file=True)
    assert answer.code == 0, answer.err
    assert (answer.json["linears"], answer.json["inputs"]) == (7, 7)
    assert answer.json["equal_codes"] > 0.999
    assert "all weights are equal to the bit" in answer.out


def test_a_program_of_torch(run: Run, artifact: Path, tmp_path: Path) -> None:
    answer = run("export", artifact, "--to", "torch", "--out", tmp_path / "m.pt2", json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["bytes"] == (tmp_path / "m.pt2").stat().st_size
    x = seeded_images(3, seed=9)
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), vitq.load(artifact)(x))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "hf", "--out", "full"], "exists"),
        (["--to", "hf", "--out", "x", "--profile", "reference"], "--profile is for --to onnx"),
        (["--to", "torch", "--out", "m.onnx"], "*.pt2"),
        (["--to", "compressed-tensor", "--out", "x"], "Did you mean 'compressed-tensors'"),
        (["--to", "hf", "--out", "x"], "no model of transformers"),
    ],
)
def test_bad_input_is_refused(run: Run, artifact: Path, tmp_path: Path, words: list[str], told: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    given = [tmp_path / word if before == "--out" else word for before, word in zip(["", *words], words, strict=False)]
    assert told in run("export", artifact, *given).error
    assert not (tmp_path / "x").exists()


def test_every_target_is_in_the_help(run: Run) -> None:
    shown = " ".join(run("export", "--help").out.split())
    assert {"compressed-tensors", "hf", "torch"} <= set(TARGETS)
    assert all(name in shown for name in TARGETS)
