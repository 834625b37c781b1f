"""Accuracy with its uncertainty: bootstrap intervals, paired comparisons, means over seeds.

Shapes:  correct, a, b  (N,) bool, one entry per image      logits  (N, C)      labels  (N,)
Units:   every accuracy, difference and interval end is in percent (differences: percentage points)
Source:  percentile bootstrap, Efron & Tibshirani 1993, chapter 13; exact McNemar test, McNemar 1947
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import DataError, InputError


def rounded(value: float | None) -> float | None:
    """A number for JSON, 4 decimals; None for what is undefined or not finite."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def rounded_small(value: float | None) -> float | None:
    """A number for JSON, 4 significant digits: a p-value of 1e-9 must not be printed as 0."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same images, in percentage points.

    Attributes:
        mean, low, high: the difference and the ends of its bootstrap interval.
        a_only, b_only: images that only a, or only b, gets right.
        n: images compared.
        p_value: exact two-sided McNemar test of "a and b are equally often right".
    """

    mean: float
    low: float
    high: float
    a_only: int
    b_only: int
    n: int
    p_value: float

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "mean": rounded(self.mean),
            "low": rounded(self.low),
            "high": rounded(self.high),
            "a_only": self.a_only,
            "b_only": self.b_only,
            "images": self.n,
            "p_value": rounded_small(self.p_value),
        }


def bootstrap_interval(
    correct: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of `correct`, in percent.

    Resampling N images with replacement and counting the correct ones is a draw from
    Binomial(N, mean). That draw is used directly; it is the same distribution, not an
    approximation. When all images are right, or all wrong, the interval has zero width.

    Args:
        correct: bool, shape (N,).
        level: share of the resampled means that lies inside, between 0 and 1.

    Returns:
        (low, high) in percent.

    Raises:
        DataError: there is no image.
        InputError: not a bool vector, or a level or resamples that cannot be used.
    """
    n = _checked_length(correct, "correct")
    _check_sampling(level, resamples)
    share = int(correct.sum()) / n
    means = np.random.default_rng(seed).binomial(n, share, size=resamples) / n
    return _percentiles(means, level)


def paired_difference(
    a: Tensor, b: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Accuracy of a minus that of b over the same images, in percentage points.

    The difference per image is +1 (only a right), -1 (only b right) or 0, so resampling images is
    a multinomial draw over these three counts; it is used directly and is exact. Swapping a
    and b negates mean and interval exactly, with the same seed.

    Args:
        a, b: bool, shape (N,); entry i of both is about the same image.

    Raises:
        DataError: there is no image.
        InputError: not bool vectors of one length, or a level or resamples that cannot be used.
    """
    n = _checked_length(a, "a")
    if _checked_length(b, "b") != n:
        raise InputError(f"a has {n} images and b has {len(b)}; align them by image first.")
    _check_sampling(level, resamples)
    a_only, b_only = int((a & ~b).sum()), int((b & ~a).sum())
    more, less = max(a_only, b_only), min(a_only, b_only)
    shares = [more / n, less / n, (n - more - less) / n]
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = _percentiles((counts[:, 0] - counts[:, 1]) / n, level)
    if more == less:
        # The distribution is symmetric; only the finite number of draws makes its ends differ.
        low, high = (low - high) / 2, (high - low) / 2
    elif a_only < b_only:
        low, high = -high, -low
    return PairedDifference(
        mean=100 * (a_only - b_only) / n,
        low=low,
        high=high,
        a_only=a_only,
        b_only=b_only,
        n=n,
        p_value=_mcnemar(a_only, b_only),
    )


def mean_over_seeds(
    values: Tensor, *, draw_seeds: bool = True, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of what several seeds give on the same images, with its percentile-bootstrap interval, in percent.

    Images are resampled, and seeds on their own: S - 1 of S draws, which gives the mean over few seeds its variance
    without bias. What changes from image to image and seed to seed is counted in both, so that the interval is rather
    too wide than too narrow. Images on which all seeds say the same are alike, and resampling them is a multinomial
    draw over such patterns; it is used directly and is exact.

    Args:
        values: (seeds, images): correct or not, or differences of that.
        draw_seeds: False takes the seeds as given, and speaks about these alone; so does a single seed.

    Returns:
        (mean, low, high).

    Raises:
        DataError: no seed or no image.
        InputError: not a matrix, or a level or resamples that cannot be used.

    Source: Owen, Annals of Applied Statistics 2007 (resampling rows and columns); Rao & Wu 1988 (S - 1 draws)
    """
    if values.ndim != 2:
        raise InputError(f"values must be (seeds, images), not of shape {tuple(values.shape)}.")
    seeds, images = values.shape
    if not values.numel():
        raise DataError("there is no image to compute an accuracy from.")
    _check_sampling(level, resamples)
    patterns, counts = torch.unique(values.double(), dim=1, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(images, (counts.double() / images).numpy(), size=resamples) @ patterns.T.numpy() / images
    draws = seeds - 1 if draw_seeds and seeds > 1 else 0
    weights = rng.multinomial(draws, [1 / seeds] * seeds, size=resamples) / draws if draws else 1 / seeds
    low, high = _percentiles((drawn * weights).sum(axis=1), level)
    return 100 * float(values.double().mean()), low, high


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest logits; bool, shape (N,).

    Among equal logits the lower class index comes first, as in argmax: low-bit models do return
    ties, and the top-1 of this function must be the argmax on every device.

    Args:
        logits: shape (N, C).
        labels: int64, shape (N,), between 0 and C - 1.
        k: how many of the C classes count; k above C counts all of them.

    Raises:
        InputError: shapes that do not fit, k below 1, NaN logits.
        DataError: a label that is not a class.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(f"logits must be (N, C) and labels (N,), not {tuple(logits.shape)} and {tuple(labels.shape)}.")
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}.")
    if bool(logits.isnan().any()):
        raise InputError("logits contain NaN, which has no rank.")
    classes = logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.numel():
        raise DataError(f"label {int(wrong[0])} is not one of the {classes} classes, 0 to {classes - 1}.")
    label = labels.unsqueeze(1)
    own = logits.gather(1, label)
    earlier = torch.arange(classes, device=logits.device) < label
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return rank < k


def logit_kl(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(expected) || softmax(logits)) of each image in nats, float64 (N,).

    Args:
        expected, logits: shape (N, C); -Inf rules a class out.
    """
    log_p, log_q = expected.double().log_softmax(dim=1), logits.double().log_softmax(dim=1)
    p = log_p.exp()
    # A class of probability 0 adds nothing, whatever the other model says: 0 * log 0 = 0.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    # Rounding can leave equal distributions a little below zero.
    return terms.sum(dim=1).clamp(min=0)


def _mcnemar(a_only: int, b_only: int) -> float:
    if a_only + b_only == 0:
        return 1.0
    # scipy.stats takes longer to import than all of vitq.
    from scipy.stats import binomtest

    return float(binomtest(a_only, a_only + b_only, 0.5).pvalue)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = 100 * np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked_length(correct: Tensor, name: str) -> int:
    if correct.dtype != torch.bool or correct.ndim != 1:
        raise InputError(
            f"{name} must be a bool vector, one entry per image, not {correct.dtype} of shape {tuple(correct.shape)}."
        )
    if not len(correct):
        raise DataError("there is no image to compute an accuracy from.")
    return len(correct)


def _check_sampling(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, for example 0.95, not {level}.")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}.")
