"""AP against pycocotools, also on the shared COCO annotations; intervals against resampling by brute force."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitq.core.errors import VitqError
from vitq.data.coco import CocoSet, Photo, open_coco
from vitq.data.images import ImageSet
from vitq.data.stores import ItemStore
from vitq.evaluate import detect
from vitq.evaluate.detect import difference, evaluate_detectors, pair_json, score
from vitq.evaluate.detections import Detections, compare, encode_masks

pytest.importorskip("faster_coco_eval")
reference = pytest.importorskip("pycocotools.coco")


def made_up(images: int, crowds: bool = True, seed: int = 0) -> CocoSet:
    """Random rectangles of three categories as boxes and polygons, some images empty."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    photos = []
    for number in range(images):
        objects = []
        for _ in range(draw.integers(0, 5)):
            x, y, w, h = (float(v) for v in (*draw.integers(0, 60, 2), *draw.integers(8, 60, 2)))
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            objects.append(
                {
                    "category_id": int(draw.integers(1, 4)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowds and draw.random() < 0.2),
                    "segmentation": [outline],
                }
            )
        photos.append(Photo(number + 1, f"{number}.png", 128, 128, tuple(objects)))
    names = [photo.file for photo in photos]
    store = ItemStore("made up", [Image.new("RGB", (128, 128))] * images, names, None)
    return CocoSet("made up", tuple(photos), {1: "a", 2: "b", 3: "c"}, ImageSet(store))


def perturbed(data: CocoSet, masks: bool, seed: int = 0, drop: float = 0.2) -> list[Detections]:
    """What is there with some objects missing, boxes moved, classes wrong, some found twice, scores in hundredths."""
    from faster_coco_eval.core import mask

    draw = np.random.default_rng(seed)
    categories = list(data.categories)
    found = []
    for photo in data.photos:
        boxes, scores, labels, planes = [], [], [], []
        for each in [*photo.objects, *photo.objects[:1]]:
            if draw.random() < drop:
                continue
            x, y, w, h = each["bbox"]
            dx, dy, dw, dh = draw.normal(0, 0.08, 4)
            left, top = x + dx * w, y + dy * h
            boxes.append([left, top, left + w * (1 + dw), top + h * (1 + dh)])
            scores.append(round(float(draw.random()), 2))
            labels.append(each["category_id"] if draw.random() < 0.9 else int(draw.choice(categories)))
            if masks:
                codes = mask.frPyObjects(each["segmentation"], photo.height, photo.width)
                plane = mask.decode(mask.merge(codes))
                planes.append(np.roll(plane, (int(dx * w), int(dy * h)), (1, 0)))
        kept = encode_masks(torch.from_numpy(np.stack(planes)).bool()) if planes else []
        corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
        found.append(
            Detections(
                corners, torch.tensor(scores, dtype=torch.float64), torch.tensor(labels), kept if masks else None
            )
        )
    return found


def by_pycocotools(truth: dict[str, Any], found: list[Detections], masks: bool) -> Any:
    from pycocotools.cocoeval import COCOeval

    results: list[dict[str, Any]] = []
    for image, each in zip(truth["images"], found, strict=True):
        results += each.results(image["id"], len(results) + 1, masks)
    for entry in results if masks else []:
        del entry["bbox"]  # else it would take the box's area for the mask's
    with contextlib.redirect_stdout(io.StringIO()):
        known = reference.COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(results), "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_ap_is_that_of_pycocotools_with_crowds_and_empty_images(masks: bool) -> None:
    data = made_up(24)
    assert any(o["iscrowd"] for p in data.photos for o in p.objects)
    found = perturbed(data, masks)
    numbers, matches = compare(data.truth(), found, masks)
    np.testing.assert_allclose(numbers, by_pycocotools(data.truth(), found, masks), atol=1e-9)
    once = np.stack([m.precision(np.ones((1, len(data)), int)) for m in matches.values()])
    assert float(np.nanmean(once)) == pytest.approx(numbers[0], abs=1e-9)
    assert 0.1 < numbers[0] < 0.95


@pytest.mark.real
@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("kind", ["boxes", "instances"])
def test_ap_is_that_of_pycocotools_on_coco(
    shared: Path, split: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "RESAMPLES", 100)
    root, masks = shared / "data" / "coco128", kind == "instances"
    path = root / f"{kind}_{split}.json"
    data = open_coco(path, root / split, masks=masks)
    found = perturbed(data, masks)
    result = score(data, found, masks=masks)
    original = json.loads(path.read_text())  # the file as it is, not what was made of it
    kinds = {"box": False, "mask": True} if masks else {"box": False}
    for name, by_mask in kinds.items():
        ours, wanted = getattr(result, name), by_pycocotools(original, found, by_mask)
        for value, expected in zip(ours.values.values(), wanted, strict=False):
            assert value == pytest.approx(100 * expected, abs=1e-6)
        assert ours.interval[0] < ours.values["ap"] < ours.interval[1]


def test_resampled_ap_is_that_of_data_with_the_images_repeated() -> None:
    data = made_up(10, seed=3)
    found = perturbed(data, masks=False, seed=4)
    # Distinct scores: copies of an image are then the only ones that are equal.
    for number, each in enumerate(found):
        each.scores.add_(1e-4 * number + 1e-6 * torch.arange(len(each.scores)))
    _, matches = compare(data.truth(), found, masks=False)
    draws = np.random.default_rng(1).multinomial(len(data), [1 / len(data)] * len(data), size=5)
    for draw in draws:
        chosen = [i for i, times in enumerate(draw) for _ in range(times)]
        photos = tuple(Photo(n, data.photos[i].file, 128, 128, data.photos[i].objects) for n, i in enumerate(chosen, 1))
        repeated = CocoSet("repeated", photos, data.categories, data.files.subset(chosen))
        expected = by_pycocotools(repeated.truth(), [found[i] for i in chosen], masks=False)[0]
        ours = np.nanmean([m.precision(draw[None]).mean() for m in matches.values()])
        assert ours == pytest.approx(expected, abs=1e-9)


def test_models_are_compared_on_the_same_images_and_resamples() -> None:
    data = made_up(16)
    good, bad = perturbed(data, False, drop=0.05), perturbed(data, False, drop=0.6)
    streams = {"float": iter(good), "quantized": iter(bad)}
    seen: list[int] = []
    both = evaluate_detectors(
        {name: lambda image, s=stream: next(s) for name, stream in streams.items()}, data, on_image=seen.append
    )
    assert seen == list(range(1, 17))
    told = pair_json(both["quantized"], both["float"])
    assert told["box_difference"]["mean"] == pytest.approx(told["box_ap"] - told["box_ap_float"], abs=1e-3)
    assert told["box_difference"]["low"] <= told["box_difference"]["mean"] <= told["box_difference"]["high"] < 0
    assert difference(both["float"].box, both["float"].box) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    json.dumps(told)


def test_nothing_found_is_an_ap_of_zero_and_nan_is_an_error() -> None:
    data = made_up(4)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    result = score(data, [nothing] * 4)
    assert result.box.values["ap"] == 0
    assert result.box.interval == (0, 0)
    broken = Detections(torch.zeros(1, 4), torch.tensor([torch.nan]), torch.ones(1, dtype=torch.long))
    with pytest.raises(VitqError, match=r"quantized gives NaN or Inf for '0\.png'"):
        evaluate_detectors({"quantized": lambda image: broken}, data)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(VitqError, match=r"vitq\[coco\]"):
        detect.evaluate_detectors({}, made_up(1))
