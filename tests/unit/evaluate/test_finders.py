"""Detections and classes from what models return, beside what their own libraries make of the same output."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vitq.core.errors import InputError
from vitq.data.native import PhotoInput, photo_input
from vitq.evaluate.detections import Detections
from vitq.evaluate.draw import draw_classes, draw_detections, save_beside
from vitq.evaluate.finders import Finder, Segmenter, category_ids, largest
from vitq.evaluate.output_fidelity import found_again, iou, tensors

CPU = torch.device("cpu")
LIST = PhotoInput("list")


def finder(ids: list[int], masks: bool = False) -> Finder:
    return Finder(nn.Identity(), LIST, CPU, ids, masks)


def boxes(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("background", [True, False], ids=["detr", "rt_detr"])
def test_queries_are_read_as_transformers_reads_them(background: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    out = SimpleNamespace(logits=torch.randn(1, 30, 4 + background), pred_boxes=torch.rand(1, 30, 4) * 0.5 + 0.2)
    name = "DetrImageProcessor" if background else "RTDetrImageProcessor"
    module = "detr" if background else "rt_detr"
    processor = getattr(getattr(transformers.models, module), name)()
    wanted = processor.post_process_object_detection(out, threshold=0.0, target_sizes=torch.tensor([[48, 80]]))[0]
    found = finder([10, 20, 30, 40]).read(out, (80, 48))
    order = [each.argsort(descending=True, stable=True) for each in (found.scores, wanted["scores"])]
    torch.testing.assert_close(found.scores[order[0]], wanted["scores"][order[1]])
    torch.testing.assert_close(found.boxes[order[0]], wanted["boxes"][order[1]], atol=1e-4, rtol=1e-5)
    assert torch.equal(found.labels[order[0]], 10 * (wanted["labels"][order[1]] + 1))


def test_torchvision_counts_classes_from_one_and_what_the_data_do_not_have_is_left_out() -> None:
    out = [
        {
            "boxes": boxes([0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 6, 6]),
            "labels": torch.tensor([1, 2, 3]),
            "scores": torch.tensor([0.9, 0.8, 0.7]),
            "masks": torch.rand(3, 1, 8, 8),
        }
    ]
    found = finder([7, -1, 9], masks=True).read(out, (8, 8))
    assert found.labels.tolist() == [7, 9]
    assert found.boxes.tolist() == [[0, 0, 4, 4], [2, 2, 6, 6]]
    assert found.masks is not None
    mask = pytest.importorskip("faster_coco_eval").core.mask
    for code, number in zip(found.masks, (0, 2), strict=True):
        assert np.array_equal(mask.decode(code).astype(bool), (out[0]["masks"][number, 0] >= 0.5).numpy())


def test_outputs_without_detections_or_masks_are_refused() -> None:
    with pytest.raises(InputError, match="returns Tensor, in which no detections were found"):
        finder([1]).read(torch.zeros(1, 3), (4, 4))
    out = [{"boxes": boxes([0, 0, 1, 1]), "labels": torch.tensor([1]), "scores": torch.tensor([1.0])}]
    with pytest.raises(InputError, match="no masks; evaluate boxes"):
        finder([1], masks=True).read(out, (4, 4))


def test_classes_of_pixels_are_the_largest_of_enlarged_logits_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(11, 6, 5)
    wanted = F.interpolate(logits[None], (23, 31), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(largest(logits, (23, 31)), wanted)
    monkeypatch.setattr("vitq.evaluate.finders.ENLARGED", 3 * 23 * 31)
    assert torch.equal(largest(logits, (23, 31)), wanted)
    with pytest.raises(InputError, match=r"a segmenter returns logits"):
        Segmenter.logits([1, 2])


def test_category_ids_follow_from_names_or_numbers() -> None:
    def model(names: dict[int, str]) -> nn.Module:
        made = nn.Identity()
        made.config = SimpleNamespace(id2label=names)  # type: ignore[assignment]
        return made

    categories = {1: "cat", 3: "dog"}
    assert category_ids(model({0: "dog", 1: "cat"}), categories) == [3, 1]
    assert category_ids(model({0: "LABEL_0", 1: "LABEL_1"}), categories) == [1, 3]
    assert category_ids(model({n: f"LABEL_{n}" for n in range(4)}), categories) == [-1, 1, -1, 3]
    with pytest.raises(InputError, match="how many classes Identity"):
        category_ids(nn.Identity(), categories)


def test_photos_become_inputs_as_the_library_prepares_them() -> None:
    transformers = pytest.importorskip("transformers")
    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 255, (40, 60, 3), dtype=np.uint8)).resize((120, 80))
    processor = transformers.models.detr.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 90})
    wanted = processor(photo, return_tensors="pt")["pixel_values"]
    found = PhotoInput("pixel_values", shortest=64, longest=90)(photo)["pixel_values"]
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().mean()) < 0.02  # its resizing of tensors differs by a few grey levels
    (plain,) = LIST(photo)
    assert torch.equal((plain * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(np.array(photo)))
    again = PhotoInput.from_dict(PhotoInput("pixel_values", square=64).to_dict())
    assert again == PhotoInput("pixel_values", square=64)
    for bad in ({}, LIST.to_dict() | {"form": "x"}, LIST.to_dict() | {"std": [0, 1, 1]}):
        with pytest.raises(InputError, match="photos"):
            PhotoInput.from_dict(bad)
    assert photo_input(nn.Identity()) is None


@pytest.mark.parametrize(("named", "square"), [(None, 512), (64, 64), ((64, 64), 64), ((64, 48), 512)])
def test_a_segmenter_gets_the_size_that_its_configuration_names(named: Any, square: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8}
    config = transformers.SegformerConfig(**sizes)
    if named is not None:
        config.image_size = named
    model = transformers.SegformerForSemanticSegmentation(config)
    assert photo_input(model) == PhotoInput("pixel_values", square=square)
    assert photo_input(model, 96) == PhotoInput("pixel_values", square=96)


def test_photos_go_together_where_nothing_is_padded_and_they_are_few() -> None:
    def photo(width: int, height: int) -> Image.Image:
        return Image.new("RGB", (width, height))

    small = replace(LIST, shortest=128, longest=128)
    scenes = [photo(128, 128)] * 10
    assert small.alike([*scenes, photo(64, 128), photo(128, 128)]) == [[*range(8)], [8, 9], [10], [11]]
    assert LIST.alike(scenes[:2]) == [[0], [1]]  # the model makes 800 x 800 pixels of each
    # One size for the model, of photos that differ: a list of them would be padded, resized tensors are not.
    mixed = [photo(100, 80), photo(50, 40), photo(50, 40)]
    assert replace(LIST, shortest=64).alike(mixed) == [[0], [1, 2]]
    resized = PhotoInput("pixel_values", shortest=64)
    assert resized.alike(mixed) == [[0, 1, 2]]
    assert resized.batch(mixed)["pixel_values"].shape == (3, 3, 64, 80)
    assert PhotoInput("pixel_values", square=512).alike(mixed) == [[0, 1], [2]]


def test_what_the_float_model_found_is_looked_for_again() -> None:
    def made(rows: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
        return Detections(boxes(*rows), torch.tensor(scores), torch.tensor(labels))

    reference = made(
        [[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [0, 0, 5, 5]], [0.9, 0.8, 0.7, 0.1], [1, 1, 2, 1]
    )
    # One moved a little; the second's class is wrong; the third is found twice, and counts once.
    other = made(
        [[1, 0, 11, 10], [20, 20, 30, 30], [40, 40, 50, 50], [41, 40, 51, 50]], [0.9, 0.9, 0.8, 0.6], [1, 2, 2, 2]
    )
    told = found_again([reference], [other])
    assert told == {"detections_float": 3, "detections": 4, "found_again": 66.6667, "also_in_float": 50.0}
    assert float(iou(reference.boxes[:1], other.boxes[:1])) == pytest.approx(90 / 110)
    assert found_again([other], [reference])["detections"] == 3
    assert [
        name for name, _ in tensors({"a": torch.zeros(1), "b": (torch.zeros(1), torch.ones(1).long()), "c": [1]})
    ] == [
        "a",
        "b.0",
    ]


def test_pictures_show_boxes_masks_and_classes(tmp_path: object) -> None:
    from pathlib import Path

    pytest.importorskip("faster_coco_eval")
    from vitq.evaluate.detections import encode_masks

    photo = Image.new("RGB", (40, 30), (50, 50, 50))
    plane = torch.zeros(2, 30, 40, dtype=torch.bool)
    plane[0, 12:20, 12:20] = True
    found = Detections(
        boxes([10, 10, 22, 22], [30, 5, 35, 9]), torch.tensor([0.9, 0.2]), torch.tensor([1, 2]), encode_masks(plane)
    )
    drawn = np.asarray(draw_detections(photo, found, {1: "cat"})).astype(int)
    changed = np.abs(drawn - 50).sum(2) > 0
    assert changed[10, 15]
    assert changed[19, 19]
    assert not changed[5:10, 30:36].any(), "a score below a half is not drawn"
    classes = draw_classes(photo, torch.arange(40).repeat(30, 1) // 20)
    assert np.unique(np.asarray(classes).reshape(-1, 3), axis=0).shape[0] == 2
    path = Path(str(tmp_path)) / "new" / "x.png"
    save_beside(path, {"float": photo, "quantized": classes})
    with Image.open(path) as sheet:
        assert sheet.size == (80, 44)
