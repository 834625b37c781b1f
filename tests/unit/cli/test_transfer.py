"""vitq transfer: frozen features, float and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Run, write_images


@pytest.fixture
def artifact(run: Run, photos: Path, tmp_path: Path) -> Path:
    words = ["--recipe", "minmax", "--bits", "w8a8", "--calib", photos / "calib", "--calib-size", 8]
    assert run("quantize", "zoo:seeded_vit", *words, "--out", tmp_path / "out").code == 0
    return tmp_path / "out"


def test_both_readers_are_told(run: Run, photos: Path, artifact: Path, tmp_path: Path) -> None:
    learn = write_images(tmp_path / "learn", 40, 5, classes=2)
    test = write_images(tmp_path / "test", 16, 6, classes=2)
    words = ["transfer", artifact, "--data", learn, "--test", test, "--neighbours", 5]
    answer = run(*words, json_file=True)
    assert answer.code == 0, answer.err
    assert [read["reader"] for read in answer.json["readers"]] == ["probe", "neighbours"]
    assert (answer.json["training_images"], answer.json["test_images"]) == (40, 16)
    for read in answer.json["readers"]:
        assert read["difference"]["images"] == 16
        assert f"{read['reader']}: top-1 {read['top1']:.2f} %, float {read['top1_float']:.2f} %" in answer.out
    assert run(*words, json_file=True).json == answer.json, "nothing is left to chance"


def test_a_fifth_is_kept_for_the_test_and_nothing_that_was_calibrated_on(run: Run, tmp_path: Path) -> None:
    photos, out = write_images(tmp_path / "two", 20, 5, classes=2), tmp_path / "out"
    words = ["--recipe", "minmax", "--bits", "w8a8", "--calib", photos, "--calib-size", 8]
    assert run("quantize", "zoo:seeded_vit", *words, "--out", out).code == 0
    answer = run("transfer", out, "--data", photos, "--neighbours", 3, json_file=True)
    assert answer.code == 0, answer.err
    assert (answer.json["training_images"], answer.json["test_images"]) == (10, 2)
    assert "8 images" in answer.err
    assert "calibrated on" in answer.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--neighbours", 0], "cannot vote"),
        (["--neighbours", 40], "fewer than 40"),
        (["--test", "many"], "other class folders"),
        (["--test", "listed"], "classes that"),
        (["--test", "two"], "calibration images too"),
        (["--data", "flat"], "no labels"),
        (["--data", "one"], "one class"),
    ],
)
def test_bad_input_is_refused_before_long_work(
    run: Run, artifact: Path, tmp_path: Path, more: list[Any], told: str
) -> None:
    write_images(tmp_path / "two", 20, 5, classes=2)
    write_images(tmp_path / "many", 10, 6, classes=5)
    write_images(tmp_path / "flat", 10, 6, classes=0)
    write_images(tmp_path / "listed", 4, 8, classes=0)
    (tmp_path / "listed" / "labels.csv").write_text("file,label\n" + "".join(f"{n:03}.png,{n}\n" for n in range(4)))
    write_images(tmp_path / "one", 20, 7, classes=1)
    given = [tmp_path / word if isinstance(word, str) and not word.startswith("--") else word for word in more]
    data = [] if "--data" in given else ["--data", tmp_path / "two"]
    assert told in run("transfer", artifact, *data, "--neighbours", 3, *given).error


def test_a_model_is_no_artifact(run: Run, photos: Path) -> None:
    assert "no artifact" in run("transfer", "zoo:seeded_vit", "--data", photos / "eval").error


def test_images_that_were_learned_from_are_no_test(run: Run, artifact: Path, tmp_path: Path) -> None:
    learn, test = write_images(tmp_path / "learn", 20, 5, classes=2), write_images(tmp_path / "test", 10, 6, classes=2)
    (test / "class0" / "again.png").write_bytes((learn / "class0" / "000.png").read_bytes())
    answer = run("transfer", artifact, "--data", learn, "--test", test, "--neighbours", 3, json_file=True)
    assert answer.json["test_images"] == 10
    assert "1 images" in answer.err


def test_unreadable_images_are_left_out_where_that_is_asked_for(run: Run, artifact: Path, tmp_path: Path) -> None:
    learn = write_images(tmp_path / "learn", 20, 5, classes=2)
    bad = learn / "class1" / "003.png"
    bad.write_bytes(bad.read_bytes()[:300])
    words = ("transfer", artifact, "--data", learn, "--neighbours", 3)
    assert "003.png" in run(*words).error
    answer = run(*words, "--skip-bad", json_file=True)
    assert answer.json["training_images"] + answer.json["test_images"] == 19
