"""Mean intersection over union of a semantic segmenter, or of a float one and its quantized copy in one run.

Shapes:  labels, predicted  (H, W) whole numbers of classes      counts  (C,) pixels
Units:   mIoU, pixel accuracy and interval ends in percent, differences in percentage points
Formula: IoU of a class = pixels of both / pixels of either, summed over all images; mIoU = mean over the classes that
         labels or predictions have; pixels of IGNORED count nowhere.
         interval: 1,000 resamples of the images with replacement, percentiles; differences use the same for both.

Pixels of a class in labels, predictions and both are all that mIoU takes, so per image 3 C numbers are kept, and one
confusion matrix in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import DataError, InputError
from vitq.evaluate.matches import Array
from vitq.evaluate.metrics import rounded

IGNORED = 255
RESAMPLES = 1000


class Confusion:
    """Pixels by label and prediction, gathered image by image.

    Args:
        classes: C.

    Attributes:
        matrix: (C, C) int64, rows are labels.
        images: per image (3, C) int64: pixels of both, in labels, in predictions.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)
        self.images: list[Tensor] = []

    def add(self, labels: Tensor, predicted: Tensor, name: str) -> None:
        """Take in one image.

        Raises:
            DataError: a label that is no class.
            InputError: sizes that differ, or a prediction that is no class.
        """
        if labels.shape != predicted.shape:
            raise InputError(f"{name}: labels are {tuple(labels.shape)} and predictions {tuple(predicted.shape)}.")
        counted = labels != IGNORED
        rows, columns = labels[counted].long(), predicted[counted].long()
        for values, what in ((rows, "label"), (columns, "prediction")):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
                wrong = int(values.max()) if int(values.max()) >= self.classes else int(values.min())
                raise DataError(
                    f"{name}: {what} {wrong} is none of the {self.classes} classes, 0 to {self.classes - 1} "
                    f"({IGNORED} is left out). Give masks of the classes that the model was trained on."
                )
        cells = torch.bincount(rows * self.classes + columns, minlength=self.classes**2)
        matrix = cells.reshape(self.classes, self.classes).cpu()
        self.matrix += matrix
        self.images.append(torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))


@dataclass(frozen=True)
class SegmentResult:
    """How one model segments.

    Attributes:
        images: how many.
        miou, accuracy: percent.
        interval: 95 %, of miou.
        iou: (C,) percent, NaN for a class that nothing was labelled or predicted as.
        confusion: (C, C) pixels, rows are labels.
        resampled: (RESAMPLES,) miou in fractions of one.
    """

    images: int
    miou: float
    accuracy: float
    interval: tuple[float, float]
    iou: Array
    confusion: Array = field(repr=False)
    resampled: Array = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "images": self.images,
            "miou": rounded(self.miou),
            "miou_interval": [rounded(end) for end in self.interval],
            "pixel_accuracy": rounded(self.accuracy),
            "iou": [rounded(float(value)) for value in self.iou],
        }


def evaluate_segmenters(
    segmenters: Mapping[str, Callable[[Any], Tensor]],
    pairs: Iterable[tuple[str, Any, Tensor]],
    classes: int,
    *,
    on_image: Callable[[int], None] | None = None,
) -> dict[str, SegmentResult]:
    """Run all models over all images, so that data cannot differ.

    Args:
        segmenters: model name -> what gives an image's classes (H, W) at the size of its labels.
        pairs: (name, image, labels (H, W)) one after the other.
        classes: of the models.
        on_image: called with the number of images done so far.

    Raises:
        DataError: no images, or labels that are no classes.
        InputError: predictions of another size than the labels.
    """
    tallies = {name: Confusion(classes) for name in segmenters}
    for done, (name, image, labels) in enumerate(pairs, 1):
        for key, segment in segmenters.items():
            tallies[key].add(labels, segment(image).cpu(), name)
        if on_image is not None:
            on_image(done)
    return {key: result(tally) for key, tally in tallies.items()}


def result(tally: Confusion) -> SegmentResult:
    """What the counts say.

    Raises:
        DataError: no image, or no labelled pixel.
    """
    if not tally.images or not int(tally.matrix.sum()):
        raise DataError("there is no labelled pixel to evaluate on.")
    counts = torch.stack(tally.images).numpy()  # (N, 3, C)
    images = len(counts)
    draws = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=RESAMPLES)
    # As floats, whose products are many times faster; pixels of all images are far below 2**53.
    drawn = draws.astype(np.float64) @ counts.reshape(images, -1).astype(np.float64)
    resampled = _miou(drawn.reshape(RESAMPLES, *counts.shape[1:]))
    total = counts.sum(0)
    low, high = 100 * np.nanquantile(resampled, [0.025, 0.975])
    return SegmentResult(
        images=images,
        miou=100 * float(_miou(total[None])[0]),
        accuracy=100 * float(total[0].sum() / total[1].sum()),
        interval=(float(low), float(high)),
        iou=100 * _iou(total),
        confusion=tally.matrix.numpy(),
        resampled=resampled,
    )


def pair_json(quantized: SegmentResult, reference: SegmentResult) -> dict[str, Any]:
    """The quantized model's numbers, the float one's beside them, and the paired difference."""
    low, high = 100 * np.nanquantile(quantized.resampled - reference.resampled, [0.025, 0.975])
    return {
        **quantized.to_json(),
        **{f"{key}_float": value for key, value in reference.to_json().items() if key != "images"},
        "difference": {
            "mean": rounded(quantized.miou - reference.miou),
            "low": rounded(float(low)),
            "high": rounded(float(high)),
        },
        "recovery": rounded(quantized.miou / reference.miou) if reference.miou else None,
    }


def _iou(counts: Array) -> Array:
    """(…, C) of (…, 3, C); NaN for a class that is nowhere."""
    both, labels, predicted = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    either = labels + predicted - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def _miou(counts: Array) -> Array:
    """(R,) of (R, 3, C)."""
    found = _iou(counts)
    known = (~np.isnan(found)).sum(1)
    return np.where(known > 0, np.nan_to_num(found).sum(1) / np.maximum(known, 1), np.nan)
