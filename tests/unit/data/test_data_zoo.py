"""The zoo: seeded models with the outliers that make quantization hard, and trained models with their images."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

from vitq.core.errors import UnknownNameError
from vitq.data.coco import open_coco
from vitq.data.images import open_images, without_overlap
from vitq.data.native import photo_input
from vitq.data.semantic import open_semantic
from vitq.data.source import build_model, load_model
from vitq.data.zoo import (
    build_zoo,
    image_set_names,
    seeded_images,
    zoo_images,
    zoo_names,
    zoo_preprocess,
    zoo_store,
)
from vitq.data.zoo.scenes import SETS as SCENE_SETS
from vitq.data.zoo.scenes import SIZE, scene_set, write_scenes
from vitq.evaluate.detect import evaluate_detectors
from vitq.evaluate.finders import Finder, Segmenter, category_ids
from vitq.evaluate.segment import evaluate_segmenters

NAMES = zoo_names()
SEEDED = [name for name in NAMES if name.startswith("seeded")]
TRAINED = [name for name in NAMES if name.startswith("fashion")]
SCENES = [name for name in NAMES if name.startswith("scenes")]
SETS = {"fashion_calib": 300, "fashion_test": 2000}


@pytest.mark.parametrize("name", NAMES)
def test_a_zoo_model_is_the_same_whatever_the_random_state(name: str) -> None:
    first = build_zoo(name)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = build_zoo(name)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", SEEDED)
def test_a_zoo_model_tells_its_images_apart(name: str) -> None:
    model = build_zoo(name)
    with torch.no_grad():
        logits = model(seeded_images(32))
    assert not model.training
    assert logits.shape == (32, 10)
    assert logits.std(0).min() > 0.1
    assert logits.argmax(1).unique().numel() >= 3


@pytest.mark.parametrize("name", SEEDED)
def test_norms_have_outlier_channels(name: str) -> None:
    gammas = [m.weight for m in build_zoo(name).modules() if isinstance(m, nn.LayerNorm)]
    assert all(gamma.max() > 2.5 * gamma.median() for gamma in gammas)


@pytest.mark.parametrize("name", ["fashion_swin", "seeded_swin"])
def test_the_swin_shifts_its_windows_and_merges_once(name: str) -> None:
    modules = dict(build_zoo(name).named_modules())
    assert any(getattr(m, "shift_size", (0, 0)) != (0, 0) for m in modules.values())
    assert sum(type(m).__name__ == "PatchMerging" for m in modules.values()) == 1


def test_images_are_smooth_in_range_and_do_not_depend_on_how_many_are_asked() -> None:
    images = seeded_images(16)
    assert images.shape == (16, 3, 32, 32)
    assert images.abs().max() <= 1
    assert torch.equal(images[:4], seeded_images(4))
    assert not torch.equal(images, seeded_images(16, seed=1))
    steps = (images[..., 1:] - images[..., :-1]).std()
    assert steps < images.std() / 2, "neighbouring pixels of white noise differ by 1.4 deviations"


def test_unknown_zoo_names_are_refused() -> None:
    for function in (build_zoo, zoo_preprocess):
        with pytest.raises(UnknownNameError, match="seeded_vit"):
            function("seeded_vitt")
    small = zoo_preprocess("seeded_vit")
    assert small is not None
    assert small.input_size == (3, 32, 32)
    assert zoo_preprocess("scenes_maskrcnn") is None
    for function in (zoo_images, zoo_store, lambda name: open_images(f"zoo:{name}")):
        with pytest.raises(UnknownNameError, match="fashion_test"):
            function("fashion_tset")


@pytest.mark.parametrize(("name", "least"), [("fashion_vit", 90), ("fashion_swin", 90)])
def test_a_trained_model_is_as_accurate_as_docs_zoo_says(name: str, least: float) -> None:
    model = build_zoo(name)
    images, labels = zoo_images("fashion_test")
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(100)])
    assert 100 * (predicted == labels).double().mean() >= least


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_loads_by_name_and_from_its_record(name: str) -> None:
    loaded = load_model(f"zoo:{name}")
    assert (loaded.num_classes, loaded.preprocess) == (10, zoo_preprocess(name))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    rounded = all(torch.equal(p, p.half().float()) for p in loaded.model.parameters())
    assert rounded, "accuracy is that of the stored float16 weights"
    images = zoo_images("fashion_calib")[0][:4]
    with torch.no_grad():
        assert torch.equal(build_model(loaded.source)(images), loaded.model(images))


def test_what_is_embedded_is_small_and_comes_with_its_licence() -> None:
    folder = files("vitq.data.zoo").joinpath("files")
    sizes = {item.name: len(item.read_bytes()) for item in folder.iterdir()}
    assert sum(size for name, size in sizes.items() if not name.startswith("scenes")) < 6_000_000
    assert sum(size for name, size in sizes.items() if name.startswith("scenes")) < 8_000_000
    assert {f"{name}.npz" for name in SETS} | {f"{name}.safetensors" for name in TRAINED + SCENES} <= sizes.keys()
    assert "Zalando" in folder.joinpath("LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "count"), SETS.items())
def test_an_image_set_is_balanced_and_read_alike_in_both_ways(name: str, count: int) -> None:
    opened = open_images(f"zoo:{name}", num_classes=10)
    assert name in image_set_names()
    assert len(opened) == len(set(opened.ids)) == count
    assert opened.labels is not None
    assert opened.labels.bincount().tolist() == [count // 10] * 10
    images, labels = zoo_images(name)
    assert torch.equal(labels, opened.labels)
    few = list(range(0, count, 30))
    assert torch.equal(images[few], opened.subset(few).tensor(zoo_preprocess("fashion_vit")))
    assert images.min() >= -1
    assert images.max() <= 1
    opened.check(sample=10)
    assert open_images(f"zoo:{name}", labels="none").labels is None


def test_no_image_is_both_calibrated_on_and_tested_on() -> None:
    calib, test = open_images("zoo:fashion_calib"), open_images("zoo:fashion_test")
    assert not set(calib.digests()) & set(test.digests())
    kept, left_out = without_overlap(calib, test)
    assert (len(kept), left_out) == (2000, [])


def test_the_detector_of_scenes_is_as_good_as_docs_zoo_says(tmp_path: Path) -> None:
    loaded = load_model("zoo:scenes_maskrcnn")
    assert loaded.preprocess is None
    assert all(torch.equal(p, p.half().float()) for p in loaded.model.parameters())
    write_scenes(tmp_path, scene_set("scenes_test")[0], 60)
    data = open_coco(tmp_path / "truth.json", tmp_path / "photos", masks=True)
    inputs = photo_input(loaded.model)
    assert inputs is not None
    finder = Finder(loaded.model, inputs, torch.device("cpu"), category_ids(loaded.model, data.categories), masks=True)
    found = evaluate_detectors({"float": finder}, data, masks=True)["float"].to_json()
    stored = json.loads(files("vitq.data.zoo").joinpath("files", "scenes_maskrcnn.json").read_text(encoding="utf-8"))
    for key in ("box_ap", "mask_ap"):  # of a part of the test scenes, which is why they differ
        assert abs(found[key] - stored[f"test_{key}"]) < 3
    assert stored["test_box_ap"] >= 60


def test_the_segmenter_of_scenes_is_as_good_as_docs_zoo_says(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    loaded = load_model("zoo:scenes_segformer")
    assert loaded.preprocess is None
    assert all(torch.equal(p, p.half().float()) for p in loaded.model.parameters())
    write_scenes(tmp_path, scene_set("scenes_test")[0], 60)
    inputs = photo_input(loaded.model)
    assert inputs is not None
    assert inputs.square == SIZE
    segmenter = Segmenter(loaded.model, inputs, torch.device("cpu"))
    pairs = open_semantic(tmp_path / "masks", tmp_path / "photos")
    found = evaluate_segmenters({"float": segmenter}, pairs, 11)["float"].to_json()
    stored = json.loads(files("vitq.data.zoo").joinpath("files", "scenes_segformer.json").read_text(encoding="utf-8"))
    assert abs(found["miou"] - stored["test_miou"]) < 4  # of a part of the test scenes, which is why they differ
    assert stored["test_miou"] >= 70


def test_sets_of_scenes_are_photos_without_labels_and_share_no_item() -> None:
    calib, test = (open_images(f"zoo:{name}") for name in ("scenes_calib", "scenes_test"))
    assert (len(calib), len(test)) == (300, 200)
    assert calib.labels is None
    assert calib.photo(3).size == (128, 128)
    assert not set(calib.digests()) & set(test.digests())
    assert {SCENE_SETS[name][0] for name in SCENE_SETS} == set(SETS)
    with pytest.raises(UnknownNameError, match="scenes_test"):
        scene_set("scenes_tset")
