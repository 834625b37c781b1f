"""What tests of the command line share: folders of small images, and one way to run a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vitq.cli
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

CLASSES = 10


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code, what it printed, and its --json file."""

    code: int
    out: str
    err: str
    json: Any

    @property
    def error(self) -> str:
        """The one line that a refusal consists of."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], "something was printed after the error"
        assert "Traceback" not in self.err
        return lines[0]


Run = Callable[..., Answer]
Quantize = Callable[..., Answer]


def write_images(root: Path, count: int, seed: int, *, classes: int = CLASSES) -> Path:
    """Image i of a seed as PNG, in class folders, or in one folder for classes=0."""
    pixels = ((seeded_images(count, seed=seed) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        folder = root / f"class{index % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calib/ and eval/ with 20 labelled images each, of which none are shared; flat/ with 20 and no labels."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "calib", 20, 0)
    write_images(root / "eval", 20, 1)
    write_images(root / "flat", 20, 2, classes=0)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of zoo:seeded_vit as a checkpoint."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(load_model("zoo:seeded_vit").model.state_dict(), path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command; `json=True` adds a --json file and reads it."""

    def run_command(*words: str | Path, json_file: bool = False) -> Answer:
        path = tmp_path / "answer.json"
        path.unlink(missing_ok=True)
        extra = ["--json", str(path)] if json_file else []
        result = CliRunner().invoke(vitq.cli.app, [*map(str, words), *extra])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return Answer(result.exit_code, result.stdout, result.stderr, found)

    return run_command


@pytest.fixture(scope="session")
def artifact(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zoo:seeded_vit from a checkpoint, w4a4, calibrated on 8 images of calib/."""
    out = tmp_path_factory.mktemp("artifact") / "vit"
    words = ["quantize", "zoo:seeded_vit", "--checkpoint", weights, "--calib", photos / "calib", "--calib-size", "8"]
    result = CliRunner().invoke(vitq.cli.app, [*map(str, words), "--out", str(out), "--quiet"])
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work is not begun: a call of quantize fails the test."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("quantize was reached")

    monkeypatch.setattr(vitq.cli.quantize, "quantize", reached)
    monkeypatch.setattr(vitq.cli.diagnose, "quantize", reached)


@pytest.fixture
def quantize(run: Run, photos: Path, tmp_path: Path, not_reached: None) -> Quantize:
    """vitq quantize with one thing wrong; quantizing must not begin, and nothing may be written."""

    def ask(*words: str | Path, model: str = "zoo:seeded_vit", calib: Path | None = None) -> Answer:
        out = tmp_path / "out"
        answer = run("quantize", model, "--calib", calib or photos / "calib", "--calib-size", "8", "--out", out, *words)
        assert not out.exists()
        return answer

    return ask
