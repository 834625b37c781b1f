"""vitq quantize and evaluate with detectors and segmenters on photos of several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import Run

pytest.importorskip("faster_coco_eval")

CONFORMANCE = Path(__file__).resolve().parents[2] / "conformance"
MODELS = f"""
import sys

import torch

sys.path.insert(0, {str(CONFORMANCE)!r})
from detectors import mask_rcnn, swin_backbone
from families import Family


def detector():
    return Family("detector", lambda: mask_rcnn(swin_backbone)).build()


def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)
    config = YolosConfig(**sizes, image_size=[32, 32], num_detection_tokens=8, num_labels=3)
    return Family("yolos", lambda: YolosForObjectDetection(config)).build()


def segmenter():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(SegformerConfig(
        depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    ))
"""
SIZES = [(60, 44), (48, 48), (40, 64), (64, 40), (52, 52), (44, 60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models.py; photos/ of several sizes; truth.json with boxes and outlines; masks/."""
    root = tmp_path_factory.mktemp("detection")
    (root / "models.py").write_text(MODELS)
    for name in ("photos", "masks", "others"):
        (root / name).mkdir()
    draw = np.random.default_rng(0)
    images, objects = [], []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.full((height, width, 3), 90, np.uint8)
        classes = np.zeros((height, width), np.uint8)
        x, y = int(draw.integers(0, width - 30)), int(draw.integers(0, height - 30))
        pixels[y : y + 25, x : x + 28] = draw.integers(0, 255, 3)
        classes[y : y + 25, x : x + 28] = 1 + number % 2
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        Image.fromarray(255 - pixels).save(root / "others" / f"{number}.png")
        Image.fromarray(classes).save(root / "masks" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        outline = [x, y, x + 28, y, x + 28, y + 25, x, y + 25]
        objects.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 3,
                "bbox": [x, y, 28, 25],
                "segmentation": [outline],
            }
        )
    categories = [{"id": n, "name": f"thing {n}"} for n in (1, 2, 3)]
    truth = {"images": images, "annotations": objects, "categories": categories}
    (root / "truth.json").write_text(json.dumps(truth))
    return root


def evaluated(run: Run, world: Path, target: str, task: str, *more: str) -> Any:
    data = world / ("masks" if task == "segment" else "truth.json")
    answer = run(
        "evaluate", target, "--task", task, "--data", str(data), "--images", str(world / "photos"), "--trust-code",
        *more, json_file=True,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return answer


def quantized(run: Run, world: Path, model: str, out: Path, *more: str) -> Any:
    source = f"{world / 'models.py'}:{model}"
    answer = run(
        "quantize", source, "--calib", str(world / "others"), "--calib-size", "4", "--recipe", "minmax", "--bits",
        "w8a8", "--out", str(out), *more, json_file=True,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return answer


def test_a_detector_from_photos_to_numbers_and_pictures(run: Run, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = quantized(run, world, "detector", out, "--scope", "backbone")
    assert made.json["calibration_images"] == 4
    stored = json.loads((out / "config.json").read_text())
    assert stored["preprocess"]["form"] == "list"
    assert stored["plan"]["scope"] == ["backbone"]
    answer = evaluated(run, world, str(out), "instances", "--fidelity", "--draw", str(tmp_path / "drawn"))
    told = answer.json
    assert told["images"] == 6
    assert told["kind"] == "simulated"
    for key in ("box_ap", "mask_ap", "box_ap_float", "mask_ap_float"):
        assert 0 <= told[key] <= 100
    assert all(len(told[f"{kind}_ap_interval{which}"]) == 2 for kind in ("box", "mask") for which in ("", "_float"))
    assert told["detections_float"] == told["detections"] == 48
    assert {"mean", "low", "high"} == set(told["mask_difference"])
    levels = {each["output"]: each["sqnr"] for each in told["fidelity"]["outputs"]}
    assert set(levels) == {"backbone.0", "backbone.1"}
    assert all(20 < value < 60 for value in levels.values())
    assert "box AP" in answer.out
    assert "mask AP" in answer.out
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == [f"{n}.png" for n in range(6)]
    with Image.open(drawn[0]) as picture:
        assert picture.size == (120, 58)
    # A model by its own name: the float numbers alone, and the same ones.
    alone = evaluated(run, world, f"{world / 'models.py'}:detector", "instances").json
    assert alone["box_ap"] == told["box_ap_float"]
    assert alone["kind"] == "float"


def test_a_detector_of_transformers_keeps_its_size_in_the_artifact(run: Run, world: Path, tmp_path: Path) -> None:
    quantized(run, world, "yolos", tmp_path / "out", "--size", "48")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["preprocess"]
    assert (stored["form"], stored["shortest"], stored["longest"]) == ("pixel_values", 48, 80)
    told = evaluated(run, world, str(tmp_path / "out"), "detect", "--fidelity", "--limit", "4").json
    assert told["images"] == 4
    assert {"logits", "pred_boxes"} <= {each["output"] for each in told["fidelity"]["outputs"]}
    assert all(each["sqnr"] > 15 for each in told["fidelity"]["outputs"])


def test_a_segmenter_has_an_miou_beside_its_float_model(run: Run, world: Path, tmp_path: Path) -> None:
    quantized(run, world, "segmenter", tmp_path / "out", "--size", "64")
    more = ("--fidelity", "--draw", str(tmp_path / "drawn"))
    told = evaluated(run, world, str(tmp_path / "out"), "segment", *more).json
    assert told["images"] == 6
    assert abs(told["miou"] - told["miou_float"]) < 20
    assert told["difference"]["low"] <= told["difference"]["mean"] <= told["difference"]["high"]
    assert [each["output"] for each in told["fidelity"]["outputs"]] == ["logits"]
    assert len(list((tmp_path / "drawn").iterdir())) == 6


def test_photos_that_were_calibrated_on_are_left_out(run: Run, world: Path, tmp_path: Path) -> None:
    source = f"{world / 'models.py'}:yolos"
    made = run(
        "quantize", source, "--calib", str(world / "photos"), "--calib-size", "2", "--recipe", "minmax", "--bits",
        "w8a8", "--out", str(tmp_path / "out"), "--size", "32",
    )  # fmt: skip
    assert made.code == 0, made.err
    answer = evaluated(run, world, str(tmp_path / "out"), "detect")
    assert answer.json["images"] == 4
    assert "2 images" in answer.err


def test_photos_that_cannot_be_read_are_named_or_skipped(run: Run, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        Image.open(world / "photos" / f"{number}.png").convert("L").save(folder / f"{number}.png")
    whole = (world / "photos" / "2.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    words = ("--calib", str(folder), "--calib-size", "3", "--recipe", "minmax", "--bits", "w8a8", "--size", "32")
    source = f"{world / 'models.py'}:yolos"
    assert "broken.png" in run("quantize", source, *words, "--out", str(tmp_path / "out")).error
    answer = run("quantize", source, *words, "--out", str(tmp_path / "out"), "--skip-bad", json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["calibration_images"] == 2
    assert "skipped 1 unreadable images" in answer.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "detects"], "unknown task 'detects'. Did you mean 'detect'"),
        (["--task", "detect"], "needs --images"),
        (["--task", "segment", "--images", "{photos}"], "no folder"),
        (["--task", "detect", "--images", "{masks}/nowhere"], "no folder"),
        (["--limit", "3"], "--limit and --draw are for --task"),
        (
            ["--task", "detect", "--images", "{photos}", "--predictions", "x.csv"],
            "--predictions and --skip-bad are for",
        ),
        (["--task", "detect", "--images", "{photos}", "--size", "64"], "resize photos themselves"),
        (["--task", "detect", "--images", "{photos}", "--draw", "{photos}/0.png"], "is a file; name a folder"),
        (["--task", "detect", "--images", "{photos}", "--draw", "{photos}/0.png/drawn"], "cannot be written"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run: Run, world: Path, words: list[str], says: str) -> None:
    words = [word.format(photos=world / "photos", masks=world / "masks") for word in words]
    answer = run("evaluate", f"{world / 'models.py'}:detector", "--data", str(world / "truth.json"), *words)
    assert says in answer.error


@pytest.mark.parametrize("model", ["detector", "yolos", "segmenter"])
def test_diagnose_ranks_groups_by_what_is_kept(run: Run, world: Path, tmp_path: Path, model: str) -> None:
    size = [] if model == "detector" else ["--size", "48"]
    quantized(run, world, model, tmp_path / "out", *size)
    words = ("--data", str(world / "photos"), "--images", "6", "--by", "role")
    answer = run("diagnose", str(tmp_path / "out"), *words, "--trust-code", json_file=True)
    assert answer.code == 0, answer.err
    *groups, whole = answer.json["suspects"]
    assert whole["name"] == "(all)"
    assert sum(group["sites"] for group in groups) == whole["sites"]
    kept = [group["kept"] for group in groups if group["kept"] is not None]
    assert kept == sorted(kept)
    levels = {"detector": {"backbone.0", "backbone.1"}, "yolos": {"logits", "pred_boxes"}, "segmenter": {"logits"}}
    assert levels[model] <= set(whole["sqnr"])
    # All of it is what evaluate measures on the same photos.
    task = "segment" if model == "segmenter" else "detect"
    told = evaluated(run, world, str(tmp_path / "out"), task, "--fidelity").json["fidelity"]
    assert {each["output"]: each["sqnr"] for each in told["outputs"]} == whole["sqnr"]
    if model != "segmenter":
        assert told["found_again"] == whole["kept"]
    asked = run("diagnose", f"{world / 'models.py'}:{model}", *words, "--recipe", "minmax", "--bits", "w8a8", "--calib",
                str(world / "others"), "--calib-size", "4", *size, json_file=True)  # fmt: skip
    assert asked.json["suspects"] == answer.json["suspects"]


def test_a_list_of_images_cannot_be_exported(run: Run, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    quantized(run, world, "detector", tmp_path / "out")
    answer = run("export", str(tmp_path / "out"), "--trust-code", "--out", str(tmp_path / "m.onnx"))
    assert "takes a list of images" in answer.error


def test_classifiers_and_detectors_are_not_taken_for_one_another(run: Run, world: Path, tmp_path: Path) -> None:
    quantized(run, world, "yolos", tmp_path / "out", "--size", "32")
    answer = run("evaluate", str(tmp_path / "out"), "--data", str(world / "photos"), "--trust-code")
    assert "at their own sizes" in answer.error
    for command, *words in (
        ("transfer", "--data", world / "photos"),
        ("export", "--data", world / "photos", "--out", tmp_path / "m.onnx"),
        ("bench", "--eval", world / "photos"),
    ):
        assert "at their own sizes" in run(command, str(tmp_path / "out"), *map(str, words), "--trust-code").error
    words = ("--task", "detect", "--data", str(world / "truth.json"), "--images", str(world / "photos"))
    assert "takes photos is not known" in run("evaluate", "zoo:seeded_vit", *words).error
    answer = run(
        "quantize", f"{world / 'models.py'}:yolos", "--calib", str(world / "photos"), "--calib-size", "2", "--eval",
        str(world / "photos"), "--out", str(tmp_path / "new"),
    )  # fmt: skip
    assert "measure it with vitq evaluate" in answer.error


def test_scenes_that_come_with_vitq_need_no_files(run: Run, tmp_path: Path) -> None:
    words = ("zoo:scenes_maskrcnn", "--task", "instances")
    told = run("evaluate", *words, "--data", "zoo:scenes_test", "--limit", "6", json_file=True).json
    assert told["images"] == 6
    assert told["box_ap"] > 40
    assert "leave --images out" in run("evaluate", *words, "--data", "zoo:scenes_test", "--images", str(tmp_path)).error
    assert "scenes_test" in run("evaluate", *words, "--data", "zoo:scenes_tset").error
    assert "at their own sizes" in run("evaluate", "zoo:scenes_maskrcnn", "--data", "zoo:fashion_test").error


def test_one_photo_calibrates_a_detector_as_in_the_papers(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = ("--calib", "zoo:scenes_calib", "--calib-size", "1", "--bits", "w8a8", "--out", out)
    made = run("quantize", "zoo:scenes_maskrcnn", "--recipe", "repq_vit", *words, json_file=True)
    assert made.json["calibration_images"] == 1
    told = run("evaluate", out, "--task", "detect", "--data", "zoo:scenes_test", "--limit", "20", json_file=True).json
    assert abs(told["box_ap"] - told["box_ap_float"]) < 5


@pytest.mark.real
def test_photos_of_coco_at_their_own_sizes(run: Run, world: Path, shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "coco128"
    source = f"{world / 'models.py'}:detector"
    made = run(
        "quantize", source, "--calib", str(root / "train2017"), "--calib-size", "8", "--recipe", "repq_vit", "--out",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert made.code == 0, made.err
    answer = run(
        "evaluate", str(tmp_path / "out"), "--task", "detect", "--data", str(root / "boxes_val2017.json"), "--images",
        str(root / "val2017"), "--trust-code", "--limit", "24",
        json_file=True,
    )  # fmt: skip
    # Its 3 classes are none of COCO's 80: refused, with what the data have and what the model tells apart.
    assert "80 categories with ids up to 80" in answer.error
    truth = json.loads((root / "boxes_val2017.json").read_text())
    truth["categories"] = truth["categories"][:3]
    (tmp_path / "three.json").write_text(json.dumps(truth))
    answer = run(
        "evaluate", str(tmp_path / "out"), "--task", "detect", "--data", str(tmp_path / "three.json"), "--images",
        str(root / "val2017"), "--trust-code", "--limit", "24",
        json_file=True,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.json["images"] == 24
    assert torch.isfinite(torch.tensor(answer.json["box_ap"]))
