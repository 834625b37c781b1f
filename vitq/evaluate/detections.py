"""What a detector found in images, as COCO's results and compared with what is there.

Shapes:  boxes (n, 4) left, top, right, bottom in pixels of the original image; scores, labels (n,); masks n of them
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import MissingExtraError, VitqError
from vitq.evaluate.matches import Array, CategoryMatches

KEPT = 100  # detections of an image and category that count


@dataclass(frozen=True)
class Detections:
    """What was found in one image.

    Attributes:
        labels: category ids of the data.
        masks: run-length codes, None where only boxes were asked for.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[dict[str, Any]] | None = None

    def results(self, image: int, first: int, masks: bool = False) -> list[dict[str, Any]]:
        """Entries of COCO's results, numbered from `first`; with masks, how large one is is the area of its mask."""
        areas = mask_areas(self.masks) if masks and self.masks is not None else None
        corners = self.boxes.double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        rows = zip(boxes, self.scores.double().tolist(), self.labels.tolist(), strict=True)
        return [
            {
                "id": first + n,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "score": score,
                "area": box[2] * box[3] if areas is None else areas[n],
                "iscrowd": 0,
                **({} if not masks or self.masks is None else {"segmentation": self.masks[n]}),
            }
            for n, (box, score, label) in enumerate(rows)
        ]


def library() -> Any:
    """faster_coco_eval.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingExtraError("faster-coco-eval", "coco", "evaluation of detections") from error
    return faster_coco_eval


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Run-length codes of (n, H, W) bool."""
    if not len(masks):
        return []
    from faster_coco_eval.core import mask

    codes: list[dict[str, Any]] = mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
    return codes


def mask_areas(masks: list[dict[str, Any]]) -> list[float]:
    """Pixels of run-length codes."""
    from faster_coco_eval.core import mask

    return [float(area) for area in mask.area(masks)] if masks else []


def compare(
    truth: dict[str, Any], found: Sequence[Detections], masks: bool
) -> tuple[Array, dict[int, CategoryMatches]]:
    """COCO's twelve numbers, and the matches that they follow from.

    Args:
        truth: COCO's JSON, whose images are those of `found`, in order.
        masks: overlap is that of masks, not of boxes.

    Returns:
        (numbers (12,) in [0, 1], -1 where undefined; category id -> matches).
    """
    coco = library()
    kind = "segm" if masks else "bbox"
    results: list[dict[str, Any]] = []
    for image, each in zip(truth["images"], found, strict=True):
        results += each.results(image["id"], len(results) + 1, masks)
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO(truth)
        guessed = coco.COCO({**truth, "annotations": results})
        evaluation = coco.COCOeval_faster(known, guessed, kind, print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = np.asarray(evaluation.stats, np.float64)[:12]
    matches = _matches(known, guessed, truth, kind)
    return numbers, matches


def _matches(known: Any, guessed: Any, truth: dict[str, Any], kind: str) -> dict[int, CategoryMatches]:
    from faster_coco_eval.core import mask

    count = len(truth["images"])
    found = {c["id"]: CategoryMatches(np.zeros(count, np.int64)) for c in truth["categories"]}
    for number, image in enumerate(truth["images"]):
        objects, detections = _by_category(known, image["id"]), _by_category(guessed, image["id"])
        for category in objects.keys() | detections.keys():
            there = objects.get(category, [])
            here = detections.get(category, [])
            order = np.argsort([-d["score"] for d in here], kind="mergesort")[:KEPT]
            here = [here[i] for i in order]
            crowd = np.array([bool(o["iscrowd"]) for o in there], bool)
            overlaps: Array = np.zeros((len(here), len(there)))
            if there and here:
                shapes = [[_shape(c, o, kind) for o in each] for c, each in ((guessed, here), (known, there))]
                overlaps = np.asarray(mask.iou(*shapes, crowd.astype(int).tolist())).reshape(len(here), len(there))
            scores = np.array([d["score"] for d in here], np.float64)
            found[category].add(number, scores, overlaps, crowd)
    return found


def _by_category(data: Any, image: int) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for each in data.loadAnns(data.getAnnIds(imgIds=[image])):
        found.setdefault(each["category_id"], []).append(each)
    return found


def _shape(data: Any, entry: dict[str, Any], kind: str) -> Any:
    return data.annToRLE(entry) if kind == "segm" else entry["bbox"]


def check_finite(found: Detections, name: str, photo: str) -> None:
    """Raise VitqError where boxes or scores are no numbers."""
    if not bool(torch.isfinite(found.boxes).all() and torch.isfinite(found.scores).all()):
        raise VitqError(f"{name} gives NaN or Inf for {photo!r}. Check its weights, scales and this image.")
