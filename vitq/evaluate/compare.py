"""Several models' predictions on the same images, each alone and every pair image by image.

Units: accuracies and interval ends in percent, differences in percentage points
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from vitq.core.errors import DataError, InputError
from vitq.evaluate.metrics import PairedDifference, bootstrap_interval, paired_difference, rounded
from vitq.evaluate.predictions import Predictions, align


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of one set of predictions on the shared images, percent, with its interval."""

    name: str
    top1: float
    low: float
    high: float
    left_out: int


@dataclass(frozen=True)
class Pair:
    """Top-1 of `first` minus that of `second`, image by image."""

    first: str
    second: str
    difference: PairedDifference


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        images: how many all predictions share; only these are counted, anywhere.
        level: of every interval, for example 0.95.
        accuracies: one per predictions, in the order given.
        pairs: one per pair. The p-values are not corrected for the number of pairs.
    """

    images: int
    level: float
    accuracies: list[Accuracy]
    pairs: list[Pair]

    def rows(self) -> list[dict[str, str]]:
        """One row per predictions; the keys are the headings."""
        return [
            {
                "predictions": each.name,
                "images": str(self.images),
                "left out": str(each.left_out),
                "top-1 %": f"{each.top1:.2f}",
                self._interval: f"{each.low:.2f} to {each.high:.2f}",
            }
            for each in self.accuracies
        ]

    def pair_rows(self) -> list[dict[str, str]]:
        """One row per pair; the keys are the headings."""
        return [
            {
                "first": pair.first,
                "second": pair.second,
                "first - second, points": f"{pair.difference.mean:+.2f}",
                self._interval: f"{pair.difference.low:+.2f} to {pair.difference.high:+.2f}",
                "only first right": str(pair.difference.a_only),
                "only second right": str(pair.difference.b_only),
                "p (McNemar)": f"{pair.difference.p_value:.2g}",
            }
            for pair in self.pairs
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "level": self.level,
            "predictions": [
                {
                    "name": each.name,
                    "top1": rounded(each.top1),
                    "top1_interval": [rounded(each.low), rounded(each.high)],
                    "left_out": each.left_out,
                }
                for each in self.accuracies
            ],
            "pairs": [{"first": pair.first, "second": pair.second, **pair.difference.to_json()} for pair in self.pairs],
        }

    @property
    def _interval(self) -> str:
        return f"{100 * self.level:g} % interval"


def compare(
    named: Mapping[str, Predictions], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Top-1 of every predictions, and the paired difference of every two, on the images all share.

    Args:
        named: predictions by the name they shall be printed under; matched by `align`.

    Raises:
        InputError: nothing to compare, or a level or resamples that cannot be used.
        DataError: no shared image, labels that disagree, or an image whose label nobody knows.
    """
    if not named:
        raise InputError("compare needs at least one set of predictions.")
    aligned = align(list(named.values()))
    unknown = (aligned.labels < 0).nonzero()
    if len(unknown):
        raise DataError(f"{aligned.ids[int(unknown[0])]} has no label in any of the predictions.")
    correct = {name: predicted == aligned.labels for name, predicted in zip(named, aligned.predicted, strict=True)}
    accuracies = []
    for (name, right), left_out in zip(correct.items(), aligned.left_out, strict=True):
        low, high = bootstrap_interval(right, level=level, resamples=resamples, seed=seed)
        accuracies.append(Accuracy(name, 100 * float(right.double().mean()), low, high, left_out))
    pairs = [
        Pair(a, b, paired_difference(correct[a], correct[b], level=level, resamples=resamples, seed=seed))
        for a, b in combinations(correct, 2)
    ]
    return Comparison(len(aligned.ids), level, accuracies, pairs)
