"""Annotated photos as training examples, and the losses that detectors and segmenters bring."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitq
from vitq.core.errors import CompositionError, DataError, InputError
from vitq.data.coco import CocoSet, open_coco
from vitq.data.native import PhotoInput
from vitq.data.objects import DetectionLoss, ObjectExamples, PixelExamples, TransformersLoss, own_loss
from vitq.data.semantic import open_semantic

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conformance"))
from detectors import TORCHVISION

mask = pytest.importorskip("faster_coco_eval").core.mask
LIST = PhotoInput("list")
SIZES = [(60, 44), (48, 48), (40, 64)]
FAST = {"rate": 1e-3, "scale_rate": 1e-2}
every = pytest.mark.parametrize("family", TORCHVISION, ids=str)


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, Any]:
    """Three photos: two objects, one as an outline and one as run lengths; one and a crowd; none."""
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    inside = np.zeros((44, 60), np.uint8)
    inside[20:40, 30:50] = 1
    packed = mask.encode(np.asfortranarray(inside))
    outline = [5, 6, 25, 6, 25, 30, 5, 30]
    crowd = {"size": [48, 48], "counts": [0, 48 * 48]}
    objects = [
        {"image_id": 0, "category_id": 7, "bbox": [5, 6, 20, 24], "segmentation": [outline]},
        {"image_id": 0, "category_id": 3, "bbox": [30, 20, 20, 20],
         "segmentation": {"size": [44, 60], "counts": packed["counts"].decode()}},
        {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]},
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 48, 48], "segmentation": crowd, "iscrowd": 1},
    ]  # fmt: skip
    images = [{"id": n, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(SIZES)]
    numbered = [each | {"id": n, "area": 400} for n, each in enumerate(objects)]
    return {"images": images, "annotations": numbered, "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]}


@pytest.fixture
def photos(truth: dict[str, Any], tmp_path: Path) -> CocoSet:
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return open_coco(tmp_path / "truth.json", tmp_path / "photos", masks=True)


def taken(examples: Any, *numbers: int) -> tuple[Any, Any]:
    found: tuple[Any, Any] = next(examples.stream([[(0, number) for number in numbers]]))
    return found


def test_targets_of_torchvision_are_corners_classes_and_masks(photos: CocoSet) -> None:
    images, (first, second, third) = taken(ObjectExamples(photos, LIST, [3, -1, 7], masks=True), 0, 1, 2)
    assert [tuple(image.shape[1:]) for image in images] == [(height, width) for width, height in SIZES]
    assert first["boxes"].tolist() == [[5, 6, 25, 30], [30, 20, 50, 40]]
    assert first["labels"].tolist() == [3, 1]
    assert first["masks"].shape == (2, 44, 60)
    outline, runs = first["masks"]
    assert int(outline.sum()) == 20 * 24
    assert bool(outline[6:30, 5:25].all())
    assert int(runs.sum()) == 400
    assert bool(runs[20:40, 30:50].all())
    assert second["labels"].tolist() == [1], "of a crowd nothing is known"
    assert third["boxes"].shape == (0, 4)
    assert third["masks"].shape == (0, 64, 40)


def test_targets_of_transformers_are_centres_and_sizes_in_parts_of_the_photo(photos: CocoSet) -> None:
    inputs = PhotoInput("pixel_values", shortest=32, longest=64)
    batch, (target,) = taken(ObjectExamples(photos, inputs, [3, 7]), 0)
    assert tuple(batch["pixel_values"].shape) == (1, 3, 32, 44)
    assert target["class_labels"].tolist() == [1, 0]
    wanted = torch.tensor([[15 / 60, 18 / 44, 20 / 60, 24 / 44], [40 / 60, 30 / 44, 20 / 60, 20 / 44]])
    torch.testing.assert_close(target["boxes"], wanted)
    with pytest.raises(DataError, match="micro_batch=1"):
        taken(ObjectExamples(photos, inputs, [3, 7]), 0, 1)


def test_a_digest_follows_annotations_and_classes(photos: CocoSet, truth: dict[str, Any], tmp_path: Path) -> None:
    known = ObjectExamples(photos, LIST, [3, 7]).digest()
    assert known == ObjectExamples(photos, LIST, [3, 7]).digest()
    assert known != ObjectExamples(photos, LIST, [7, 3]).digest()
    truth["annotations"][0]["bbox"][2] -= 1
    (tmp_path / "other.json").write_text(json.dumps(truth))
    assert known != ObjectExamples(open_coco(tmp_path / "other.json", tmp_path / "photos"), LIST, [3, 7]).digest()


@every
def test_the_loss_of_a_detector_is_what_it_has_in_training(family: Any, photos: CocoSet) -> None:
    """None of these drops anything, so that training mode computes the same."""
    model = family.build()
    examples = ObjectExamples(photos, LIST, [3, 7], masks=True)
    loss = DetectionLoss(model, examples)
    images, targets = taken(examples, 0, 1)
    torch.manual_seed(0)
    found = loss(model, images, targets)
    assert not any(module.training for module in model.modules())
    torch.manual_seed(0)
    wanted = model.train()(images, targets)
    assert loss.parts == tuple(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], 2 * value, rtol=1e-5, atol=1e-6)


def test_below_the_detector_nothing_is_dropped(photos: CocoSet) -> None:
    model = TORCHVISION[0].build()
    seen: list[bool] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.extend(m.training for m in module.modules()))
    model.roi_heads.box_head.fc6 = nn.Sequential(model.roi_heads.box_head.fc6, nn.Dropout(0.9))
    examples = ObjectExamples(photos, LIST, [3, 7], masks=True)
    loss = DetectionLoss(model, examples)
    images, targets = taken(examples, 0)
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        values.append(float(loss(model, images, targets)["loss_classifier"]))
        torch.rand(7)
    assert values[0] == values[1]
    assert seen
    assert not any(seen)


def trained(model: nn.Module, examples: Any, recipe: str = "lsq", **more: Any) -> Any:
    training = vitq.Training(examples, batch_size=2, micro_batch=1, loss=own_loss(model, examples), **more)
    calib = [taken(examples, number)[0] for number in range(2)]
    return vitq.quantize(model, recipe, "w8a8", calib, training=training, options=FAST)


@pytest.mark.parametrize("recipe", ["lsq", "gplq"])
def test_a_detector_learns_by_its_own_loss(recipe: str, photos: CocoSet) -> None:
    examples = ObjectExamples(photos, LIST, [3, 7], masks=True)
    qmodel = trained(TORCHVISION[0].build(), examples, recipe, epochs=6)
    (told,) = qmodel.log["train"]
    assert told["steps"] == 12
    assert told["loss"] == "of the model's own"
    assert set(told["parts"]) == set(told["curve"][0][1])
    first, last = (sum(told["curve"][at][1].values()) for at in (0, -1))
    assert last < 0.9 * first
    assert not any(module.training for module in qmodel.model.modules())


def test_an_interrupted_training_draws_the_same_regions(
    photos: CocoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitq.passes.train.loop import Loop

    model = TORCHVISION[0].build()
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 4  # of many more: which ones is drawn
    examples = ObjectExamples(photos, LIST, [3, 7], masks=True)
    whole = trained(model, examples, epochs=2)
    kept = Loop._step

    def stops(loop: Any, *args: Any) -> Any:
        stops.steps += 1  # type: ignore[attr-defined]
        if stops.steps == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return kept(loop, *args)

    stops.steps = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Loop, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(model, examples, epochs=2, file=tmp_path / "state", every=0.0)
    monkeypatch.setattr(Loop, "_step", kept)
    torch.rand(5)  # what else has drawn since does not matter
    again = trained(model, examples, epochs=2, file=tmp_path / "state", every=0.0, resume=True)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_segmenter_of_transformers_learns_by_its_own_loss(tmp_path: Path, truth: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )).eval()  # fmt: skip
    (tmp_path / "masks").mkdir()
    for number, (width, height) in enumerate(SIZES):
        classes = np.zeros((height, width), np.uint8)
        classes[:, width // 2 :] = 1 + number % 2
        classes[:4] = 255
        Image.fromarray(classes).save(tmp_path / "masks" / f"{number}.png")
    examples = PixelExamples(
        open_semantic(tmp_path / "masks", tmp_path / "photos"), PhotoInput("pixel_values", square=32)
    )
    batch, labels = taken(examples, 0)
    assert labels.shape == (1, 44, 60)
    with torch.no_grad():
        found = TransformersLoss()(model, batch, labels)["loss"]
        logits = nn.functional.interpolate(model(**batch).logits, (44, 60), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, labels, ignore_index=255))
    known = examples.digest()
    Image.fromarray(np.zeros((44, 60), np.uint8)).save(tmp_path / "masks" / "0.png")
    assert examples.digest() != known
    (told,) = trained(model, examples, epochs=6).log["train"]
    assert told["curve"][-1][1]["loss"] < told["curve"][0][1]["loss"]


def test_a_detector_of_transformers_learns_by_its_own_loss(photos: CocoSet) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.YolosConfig(
        **sizes, patch_size=8, image_size=[32, 32], num_detection_tokens=8, num_labels=2, hidden_dropout_prob=0.5
    )
    model = transformers.YolosForObjectDetection(config).eval()
    examples = ObjectExamples(photos, PhotoInput("pixel_values", shortest=32, longest=64), [3, 7])
    state = torch.get_rng_state()
    losses = [own_loss(model, examples)(model, *taken(examples, 0))["loss"] for _ in range(2)]
    assert torch.equal(*losses), "nothing is dropped"
    (told,) = trained(model, examples, epochs=6).log["train"]
    assert told["parts"] == ["loss"]
    assert told["curve"][-1][1]["loss"] < told["curve"][0][1]["loss"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_is_no_detector_is_refused(photos: CocoSet) -> None:
    with pytest.raises(InputError, match=r"none of torchvision's detectors"):
        DetectionLoss(nn.Linear(2, 2), ObjectExamples(photos, LIST, [3, 7]))


class Wrong:
    """Says one part and gives another, or numbers of every example."""

    parts: tuple[str, ...] = ("one",)

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found = found

    def __call__(self, model: nn.Module, inputs: Any, labels: Any) -> dict[str, Tensor]:
        return self.found


@pytest.mark.parametrize("found", [{}, {"two": torch.zeros(())}, {"one": torch.zeros(2)}])
def test_a_loss_that_gives_something_else_is_refused_before_any_work(found: dict[str, Tensor], photos: CocoSet) -> None:
    examples, model = ObjectExamples(photos, LIST, [3, 7], masks=True), TORCHVISION[0].build()
    training = vitq.Training(examples, batch_size=2, micro_batch=1, loss=Wrong(found))
    with pytest.raises(CompositionError, match="one number for each of one"):
        vitq.quantize(model, "lsq", "w8a8", [taken(examples, 0)[0]], training=training)
