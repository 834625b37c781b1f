"""Ratios with intervals: known ratios are found, and nothing is claimed that the rounds do not say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from vitq.bench.verdict import FASTER, LEAST_ROUNDS, SAME, SLOWER, UNCLEAR, speedup
from vitq.core.errors import InputError


def rounds(ratio: float, noise: float, count: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of float and of one that is so many times as fast; load moves both, noise each."""
    draw = np.random.default_rng(seed)
    load = np.exp(draw.normal(0, 0.5, count))
    base = load * np.exp(draw.normal(0, noise, count))
    own = load / ratio * np.exp(draw.normal(0, noise, count))
    return base.tolist(), own.tolist()


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.6, FASTER), (1.15, FASTER), (1.0, SAME), (1.01, SAME), (0.87, SLOWER), (0.3, SLOWER)]
)
def test_a_known_ratio_gets_its_verdict(ratio: float, verdict: str) -> None:
    found = speedup(*rounds(ratio, 0.02, 25, seed=3))
    assert found.verdict == verdict
    assert found.low <= ratio <= found.high
    assert str(found).startswith(verdict)
    assert found.to_json()["verdict"] == verdict


def test_noise_and_few_rounds_are_unclear() -> None:
    assert speedup(*rounds(1.0, 0.4, 9, seed=1)).verdict == UNCLEAR
    base, own = rounds(2.0, 0.0, LEAST_ROUNDS, seed=0)
    assert speedup(base, own).verdict == FASTER
    assert speedup(base[:-1], own[:-1]).verdict == UNCLEAR


def test_equal_ones_are_hardly_ever_called_faster_or_slower() -> None:
    goes = 400
    wrong = sum(speedup(*rounds(1.0, 0.1, 15, seed)).verdict in (FASTER, SLOWER) for seed in range(goes))
    assert wrong <= binom.ppf(0.999, goes, 0.08)  # the bootstrap of a median of 15 errs a little more often than 5 %


def test_swapping_the_two_turns_the_ratio_over() -> None:
    base, own = rounds(1.4, 0.05, 15, seed=2)
    there, back = speedup(base, own), speedup(own, base)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert (there.verdict, back.verdict) == (FASTER, SLOWER)


@pytest.mark.parametrize(("base", "own"), [([], []), ([1.0], [1.0, 2.0])])
def test_other_rounds_are_not_compared(base: list[float], own: list[float]) -> None:
    with pytest.raises(InputError, match="one by one"):
        speedup(base, own)
