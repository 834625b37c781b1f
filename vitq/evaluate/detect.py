"""Box and mask AP of a detector, or of a float one and its quantized copy in one run, with intervals over images.

Units:  AP, its interval and differences in percent, as papers print them (percentage points for differences)
Formula: AP is COCO's, by faster-coco-eval: the mean over overlaps 0.5, 0.55 … 0.95, categories and recalls.
         interval: 1,000 resamples of the images with replacement, AP of each computed anew (evaluate/matches.py),
         percentiles. A category that a resample has no object of is left out of its mean, as COCO does it, which moves
         resamples of few images up: the interval need not be symmetric. Differences use the same resamples for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitq.core.errors import DataError
from vitq.evaluate.detections import Detections, check_finite, compare, library
from vitq.evaluate.matches import Array, CategoryMatches
from vitq.evaluate.metrics import rounded

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitq.data.coco import CocoSet

RESAMPLES = 1000
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first of COCO's twelve numbers, in order
Finder = Callable[["Image"], Detections]


@dataclass(frozen=True)
class Ap:
    """AP of one kind of overlap.

    Attributes:
        values: by NAMES, percent; None where the data have no such objects.
        interval: 95 %, of ap.
        resampled: (RESAMPLES,) ap in fractions of one.
    """

    values: dict[str, float | None]
    interval: tuple[float, float]
    resampled: Array

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """Plain data."""
        numbers = {f"{prefix}{name}": rounded(value) for name, value in self.values.items()}
        return numbers | {f"{prefix}ap_interval": [rounded(end) for end in self.interval]}


@dataclass(frozen=True)
class DetectResult:
    """How one model detects.

    Attributes:
        images: how many.
        found: image by image.
        box, mask: AP; mask is None where only boxes were asked for.
    """

    images: int
    found: list[Detections]
    box: Ap
    mask: Ap | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "images": self.images,
            "detections": sum(len(each.scores) for each in self.found),
            **self.box.to_json("box_"),
            **(self.mask.to_json("mask_") if self.mask else {}),
        }


def evaluate_detectors(
    finders: Mapping[str, Finder], data: CocoSet, *, masks: bool = False, on_image: Callable[[int], None] | None = None
) -> dict[str, DetectResult]:
    """Run all models over all images, so that data cannot differ.

    Args:
        finders: model name -> what gives an upright image's detections; with run-length masks where `masks` is set.
        masks: also AP of masks.
        on_image: called with the number of images done so far.

    Raises:
        DataError: no images, or one that cannot be read.
        VitqError: NaN or Inf in a detection.
        MissingExtraError: faster-coco-eval is not installed.
    """
    library()
    if not len(data):
        raise DataError(f"{data.where}: there are no images to evaluate on.")
    found: dict[str, list[Detections]] = {name: [] for name in finders}
    for position, photo in enumerate(data.photos):
        image = data.image(position)
        for name, finder in finders.items():
            each = finder(image)
            check_finite(each, name, photo.file)
            found[name].append(each)
        if on_image is not None:
            on_image(position + 1)
    return {name: score(data, each, masks=masks) for name, each in found.items()}


def score(data: CocoSet, found: list[Detections], *, masks: bool = False) -> DetectResult:
    """AP of what was found, aligned with the photos of the data."""
    truth = data.truth()
    box = _ap(*compare(truth, found, masks=False), len(data))
    return DetectResult(len(data), found, box, _ap(*compare(truth, found, masks=True), len(data)) if masks else None)


def difference(a: Ap, b: Ap) -> dict[str, float | None]:
    """AP of a minus that of b on the same images, percentage points, with its 95 % interval."""
    low, high = _ends(a.resampled - b.resampled)
    return {"mean": rounded(_minus(a, b)), "low": rounded(low), "high": rounded(high)}


def pair_json(quantized: DetectResult, reference: DetectResult) -> dict[str, Any]:
    """The quantized model's numbers, the float one's beside them, and the paired differences."""
    merged = quantized.to_json()
    merged |= {f"{k}_float": v for k, v in reference.to_json().items() if k != "images"}
    kinds = {"box": (quantized.box, reference.box), "mask": (quantized.mask, reference.mask)}
    for kind, (a, b) in kinds.items():
        if a is not None and b is not None:
            whole, part = b.values["ap"], a.values["ap"]
            merged[f"{kind}_difference"] = difference(a, b)
            merged[f"{kind}_recovery"] = rounded(part / whole) if whole and part is not None else None
    return merged


def _minus(a: Ap, b: Ap) -> float | None:
    x, y = a.values["ap"], b.values["ap"]
    return None if x is None or y is None else x - y


def _ap(numbers: Array, matches: dict[int, CategoryMatches], images: int) -> Ap:
    values = {name: None if n < 0 else 100 * float(n) for name, n in zip(NAMES, numbers[: len(NAMES)], strict=True)}
    draws = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=RESAMPLES)
    total, known = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for each in matches.values():
        precision = each.precision(draws).mean(1)
        total += np.nan_to_num(precision)
        known += ~np.isnan(precision)
    # A resample may have drawn images without objects alone.
    resampled = np.where(known > 0, total / np.maximum(known, 1), np.nan)
    return Ap(values, _ends(resampled), resampled)


def _ends(values: Array) -> tuple[float, float]:
    low, high = 100 * np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
