"""Which detections find an object, image by image, and AP of any choice of images from that.

Shapes:  T thresholds of overlap, D detections and G objects of one image and category, N images, R resamples
Formula: detections in the order of their score, each takes the object that it overlaps most among those that nobody
         took before and that it overlaps by the threshold; what takes a crowd region, which many may, is not counted.
         AP = mean over recalls 0, 0.01 … 1 of the highest precision at that recall or a higher one
Source:  COCO's evaluation of boxes and masks; tests compare with pycocotools

Matches belong to one image each, so a resample of images counts every detection and object as often as its image was
drawn. That is exact but for equal scores, whose order is arbitrary anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AT_ONCE = 2**23  # numbers of one chunk of resamples


@dataclass
class CategoryMatches:
    """All matches of one category.

    Attributes:
        score: of each detection; image: number of its image; hit, miss: (T, D) whether it is right or wrong, neither
            of both where it is not counted; objects: (N,) per image, crowd regions left out.
    """

    objects: Array
    score: list[Array] = field(default_factory=list)
    image: list[Array] = field(default_factory=list)
    hit: list[Array] = field(default_factory=list)
    miss: list[Array] = field(default_factory=list)

    def add(self, image: int, scores: Array, overlaps: Array, crowd: Array) -> None:
        """Take in one image: scores (D,) descending, overlaps (D, G), crowd (G,) bool."""
        self.objects[image] = int((~crowd).sum())
        if len(scores):
            hit, ignored = match(overlaps, crowd, len(scores))
            self.score.append(scores)
            self.image.append(np.full(len(scores), image))
            self.hit.append(hit)
            self.miss.append(~hit & ~ignored)

    def precision(self, weights: Array) -> Array:
        """(R, T) AP where images count so often (R, N); NaN without an object."""
        objects = weights @ self.objects
        if not self.score:
            return np.where(objects[:, None] > 0, np.zeros((1, len(THRESHOLDS))), np.nan)
        order = np.argsort(-np.concatenate(self.score), kind="mergesort")
        image = np.concatenate(self.image)[order]
        hit, miss = (np.concatenate(each, 1)[:, order] for each in (self.hit, self.miss))
        step = max(1, AT_ONCE // max(hit.size, len(THRESHOLDS) * len(RECALLS)))
        parts = [
            _average(weights[at : at + step, image], hit, miss, objects[at : at + step])
            for at in range(0, len(weights), step)
        ]
        return np.concatenate(parts)


def match(overlaps: Array, crowd: Array, count: int) -> tuple[Array, Array]:
    """Which detections take an object at each threshold, and which take a crowd region.

    Args:
        overlaps: (D, G) in the order of scores; crowd: (G,) bool; count: D.

    Returns:
        (hit, ignored): (T, D) bool.
    """
    hit, ignored = np.zeros((2, len(THRESHOLDS), count), bool)
    if not len(crowd):
        return hit, ignored
    free = np.ones((len(THRESHOLDS), len(crowd)), bool)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    rows = np.arange(len(THRESHOLDS))
    for number in range(count):
        enough = free & (overlaps[number] >= least)
        taken, found = _best(overlaps[number], enough & ~crowd)
        free[rows[found], taken[found]] = False
        hit[:, number] = found
        ignored[:, number] = ~found & (enough & crowd).any(1)
    return hit, ignored


def _best(overlap: Array, allowed: Array) -> tuple[Array, Array]:
    """(T,) the allowed object of the largest overlap, the last of equal ones, and whether there is any."""
    score = np.where(allowed, overlap, -1.0)
    last = score.shape[1] - 1 - score[:, ::-1].argmax(1)
    return last, np.asarray(allowed.any(1))


def _average(weights: Array, hit: Array, miss: Array, objects: Array) -> Array:
    """(R, T) AP of (R, D) weights of detections in the order of scores, objects (R,)."""
    right = (weights[:, None] * hit).cumsum(2)  # (R, T, D)
    wrong = (weights[:, None] * miss).cumsum(2)
    precision = right / np.maximum(right + wrong, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    known = np.maximum(objects, 1)[:, None]
    # The first place where so many are right that the recall is reached; compared as numbers of objects, which are
    # whole, and lined up row behind row so that one search serves all rows.
    needed = np.ceil(RECALLS * known - 1e-9)
    needed += needed / known < RECALLS  # as a quotient of floats compares
    resamples, thresholds, count = right.shape
    top = int(max(right.max(), needed.max())) + 1
    start = np.arange(resamples * thresholds)[:, None] * top
    flat = (right.reshape(-1, count) + start).ravel()
    wanted = np.repeat(needed, thresholds, axis=0) + start
    place = np.searchsorted(flat, wanted.ravel(), side="left").reshape(wanted.shape) - start // top * count
    reached = place < count
    values = np.take_along_axis(precision.reshape(-1, count), np.minimum(place, count - 1), axis=1)
    found = np.where(reached, values, 0.0).mean(1).reshape(resamples, thresholds)
    return np.where(objects[:, None] > 0, found, np.nan)
