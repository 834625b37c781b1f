"""Faster, the same or slower than float: a ratio of latencies, paired round by round, with its interval.

Units:   speed-ups are seconds of float / own seconds: 2 is twice as fast
Source:  percentile bootstrap of the median over rounds, Efron & Tibshirani 1993, chapter 13
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitq.core.errors import InputError

FASTER, SAME, SLOWER, UNCLEAR = "faster", "same", "slower", "unclear"
BAND = 1.05  # a speed-up between 1 / BAND and BAND is the same for whoever waits
LEAST_ROUNDS = 5  # of fewer, the interval of a median says nothing
RESAMPLES = 4000


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the other.

    Attributes:
        ratio: median over rounds.
        low, high: ends of its 95 % interval.
        verdict: "same" where the whole interval is within BAND, "faster" or "slower" where it is on one side of 1, else
            "unclear"; also of fewer rounds than LEAST_ROUNDS.
    """

    ratio: float
    low: float
    high: float
    verdict: str

    def to_json(self) -> dict[str, float | str]:
        """Plain data."""
        numbers = {name: round(getattr(self, name), 4) for name in ("ratio", "low", "high")}
        return {**numbers, "verdict": self.verdict}

    def __str__(self) -> str:
        times = f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.verdict}, {times}"


def speedup(base: Sequence[float], own: Sequence[float]) -> Speedup:
    """Compare seconds of calls, entry i of both from round i.

    Raises:
        InputError: no rounds, or not the same rounds.
    """
    if not base or len(base) != len(own):
        raise InputError(f"rounds are compared one by one; there are {len(base)} of float and {len(own)} of the other")
    ratios = np.asarray(base, dtype=np.float64) / np.asarray(own, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return Speedup(float(np.median(ratios)), float(low), float(high), _verdict(low, high, len(ratios)))


def _verdict(low: float, high: float, rounds: int) -> str:
    if rounds < LEAST_ROUNDS:
        return UNCLEAR
    if low >= 1 / BAND and high <= BAND:
        return SAME
    if low > 1:
        return FASTER
    return SLOWER if high < 1 else UNCLEAR
