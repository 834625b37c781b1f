"""vitq train: from images to an artifact, interrupted or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vitq

from .conftest import Run, write_images

RATES = ("--option", "rate=1e-3", "--option", "scale_rate=1e-2")


def words(photos: Path, out: Path, *more: object) -> list[str]:
    given = [
        "train",
        "zoo:seeded_vit",
        "--train",
        photos / "calib",
        "--out",
        out,
        "--train-batch",
        8,
        "--calib-size",
        8,
    ]
    return [str(word) for word in (*given, *RATES, *more)]


def outputs(out: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vitq.load(out)(vitq.data.zoo.seeded_images(8))
    return found


def test_train_makes_an_artifact_that_tells_how_it_went(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = run(*words(photos, out, "--epochs", 2, "--eval", photos / "eval"), json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["training_images"] == 20
    assert answer.json["labels"] == "used"
    assert answer.json["top1"] is not None
    assert "steps of 8 of 20 images, with labels" in answer.err
    log = vitq.artifact.schema.read(out / "config.json").log["train"][0]
    assert log["steps"] == 6
    assert [step for step, _ in log["curve"]] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("out.training*"))
    assert torch.isfinite(outputs(out)).all()


def test_without_labels(run: Run, photos: Path, tmp_path: Path) -> None:
    answer = run(*words(photos, tmp_path / "out", "--labels", "none"), json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["labels"] == "none"
    answer = run("train", "zoo:seeded_vit", "--train", photos / "flat", "--out", tmp_path / "flat", json_file=True)
    assert answer.json["labels"] == "none"


def test_a_killed_run_goes_on_to_the_same_bits(photos: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a state is there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = "from vitq.cli import train; train.EVERY = 0.0; from vitq.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out: Path, *more: object) -> subprocess.Popen[Any]:
        command = [sys.executable, "-c", script, *words(photos, out, "--epochs", 8, *more)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process = start(killed)
    state = tmp_path / "killed.training.0"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    assert not killed.exists()
    for out, more in ((killed, ["--resume"]), (whole, [])):
        process = start(out, *more)
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert torch.equal(outputs(killed), outputs(whole))
    assert not state.exists()


@pytest.fixture
def interrupted(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for which a run was begun, and stopped by Ctrl-C."""
    monkeypatch.setattr("vitq.cli.train.EVERY", 0.0)
    steps: list[int] = []
    from vitq.passes.train.loop import Loop

    original = Loop._step

    def step(self: Loop, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", step)
        assert run(*words(photos, tmp_path / "out")).code == 130
    return tmp_path / "out"


def test_an_interrupted_run_is_neither_forgotten_nor_mixed_up(run: Run, photos: Path, interrupted: Path) -> None:
    assert "--resume" in run(*words(photos, interrupted)).error
    assert "another settings" in run(*words(photos, interrupted, "--resume", "--epochs", 2)).error
    assert (
        "another model or calibration, recipe" in run(*words(photos, interrupted, "--resume", "--bits", "w3a3")).error
    )
    state = interrupted.with_name("out.training.0")
    assert "crop" in run(*words(photos, interrupted, "--force", "--augment", "crops")).error
    assert state.exists(), "what is refused forgets nothing"
    assert "another data" in run(*words(photos, interrupted, "--resume", "--augment", "crop")).error
    notes = interrupted.with_name("out.training.log")
    notes.write_text("my own")
    assert run(*words(photos, interrupted, "--force")).code == 0
    assert not state.exists()
    assert notes.read_text() == "my own"


def test_later_evaluation_leaves_out_what_was_trained_on(run: Run, photos: Path, tmp_path: Path) -> None:
    assert run(*words(photos, tmp_path / "out")).code == 0
    assert "every image was calibrated on" in run("evaluate", tmp_path / "out", "--data", photos / "calib").error


def test_resume_begins_where_nothing_was_interrupted(run: Run, photos: Path, tmp_path: Path) -> None:
    answer = run(*words(photos, tmp_path / "out", "--resume"))
    assert answer.code == 0, answer.err
    assert "no run was interrupted" in answer.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--train-batch", 21], "larger than the 20 examples"),
        (["--augment", "crops"], "crop"),
        (["--labels", "some"], "auto or none"),
        (["--precision", "fp8"], "bf16"),
        (["--recipe", "repq_vit"], "no option"),
    ],
)
def test_bad_input_is_refused_before_long_work(
    run: Run, photos: Path, tmp_path: Path, more: list[Any], told: str
) -> None:
    answer = run(*words(photos, tmp_path / "out", *more))
    assert answer.code == 2
    assert told in answer.error or "unexpected keyword" in answer.error
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_trains_nothing_is_refused(run: Run, photos: Path, tmp_path: Path) -> None:
    answer = run(
        "train", "zoo:seeded_vit", "--train", photos / "calib", "--out", tmp_path / "o", "--recipe", "repq_vit"
    )
    assert "trains nothing" in answer.error


def test_a_missing_accelerate_is_told(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    answer = run(*words(photos, tmp_path / "out"))
    assert "vitq[train]" in answer.error


def test_accuracy_is_measured_along_the_way_and_without_quantizers(run: Run, photos: Path, tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    more = ["--epochs", 2, "--eval", photos / "eval"]
    assert run(*words(photos, plain, *more, "--looks", 0)).code == 0
    answer = run(*words(photos, watched, *more, "--looks", 3, "--basin"))
    assert answer.code == 0, answer.err
    log = vitq.artifact.schema.read(watched / "config.json").log["train"][0]
    assert [step for step, _ in log["measured"]] == [0, 2, 4, 6]
    assert {told["images"] for _, told in log["measured"]} == {20}
    assert f"top-1 {log['measured'][-1][1]['top1']:.2f} % on 20 images" in answer.err
    latent = log["latent"]
    assert "without quantizers the trained weights reach" in answer.out
    assert latent["low"] <= latent["top1"] - latent["top1_float"] <= latent["high"]
    assert vitq.artifact.schema.read(plain / "config.json").log["train"][0]["measured"] == []
    assert torch.equal(outputs(plain), outputs(watched)), "to look changes nothing"


def test_nothing_is_told_of_weights_without_quantizers_where_there_are_no_images(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    assert "--eval" in run(*words(photos, tmp_path / "out", "--basin")).error


def test_unreadable_images_are_left_out_where_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 20, 0)
    bad = sorted(folder.rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:300])  # its header can be read
    out = tmp_path / "out"
    given = ["train", "zoo:seeded_vit", "--train", folder, "--out", out, "--train-batch", 4, "--calib-size", 8, *RATES]
    assert bad.name in run(*given).error
    answer = run(*given, "--force", "--skip-bad", json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["training_images"] == 19
    assert f"skipped 1 unreadable images of {folder}" in answer.err


@pytest.mark.parametrize("task", ["instances", "segment"])
def test_scenes_train_a_detector_and_a_segmenter_by_their_own_loss(
    run: Run, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vitq.data.zoo.scenes.SETS, "scenes_calib", ("fashion_calib", 0, 6))
    pytest.importorskip("faster_coco_eval")
    pytest.importorskip("transformers")
    (tmp_path / "models.py").write_text(
        "from vitq.data.zoo.scene_models import scene_maskrcnn as instances, scene_segformer as segment\n"
    )
    scenes = [task, "--train", "zoo:scenes_calib", "--train-batch", "3", "--calib-size", "2"]
    model = f"{tmp_path / 'models.py'}:{task}"
    answer = run("train", model, "--task", *scenes, "--recipe", "lsq", "--out", tmp_path / "out", json_file=True)
    assert answer.code == 0, answer.err
    assert "2 steps of 3 of 6 images, by the model's own loss" in answer.err
    log = vitq.artifact.schema.read(tmp_path / "out" / "config.json").log["train"][0]
    assert log["parts"] == (["loss"] if task == "segment" else log["parts"])
    assert len(log["parts"]) == (1 if task == "segment" else 5)
    assert all(value > 0 for value in log["curve"][0][1].values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--task", "find"), "use classify, detect, instances or segment"),
        (("--task", "detect"), "none of torchvision's detectors"),
        (("--size", "64"), "are for --task"),
        (("--images", "photos"), "are for --task"),
    ],
)
def test_what_cannot_be_trained_so(run: Run, photos: Path, tmp_path: Path, more: Any, said: str) -> None:
    assert said in run(*words(photos, tmp_path / "out", *more)).error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--labels", "none"), "leave out --labels"),
        (("--augment", "crop"), "leave out --labels"),
        (("--skip-bad",), "leave out --labels"),
        (("--images", "photos"), "brings its photos"),
        (("--eval", "zoo:scenes_test"), "vitq evaluate"),
    ],
)
def test_what_detectors_are_not_trained_with(run: Run, tmp_path: Path, more: Any, said: str) -> None:
    pytest.importorskip("faster_coco_eval")
    given = ("train", "zoo:scenes_maskrcnn", "--task", "instances", "--train", "zoo:scenes_calib")
    assert said in run(*given, "--out", tmp_path / "out", *more).error
