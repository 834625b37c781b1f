"""Turns of rivals: who is timed when, what counts, and what happens to one that fails."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import numpy as np
import pytest

from vitq.bench.errors import DeploymentError
from vitq.bench.timing import MOST_CALLS, WARM, Call, take_turns


@dataclass
class Clock:
    """A machine that is slowed down by other work; every call moves time on."""

    now: float = 0.0
    log: list[tuple[str, int, int]] = field(default_factory=list)

    def slowdown(self) -> float:
        return 1.0 + 3.0 * (int(self.now) % 7) / 6  # one to four times as slow, changing every second


@dataclass
class Fake:
    """A rival of known seconds per image and call; ends at a given turn."""

    name: str
    clock: Clock
    per_call: float
    per_image: float = 0.0
    fails_at: int = 10**9
    first: float = 0.0  # of the first call ever, on top
    turns: int = 0

    def time(self, batch: int, calls: int) -> list[Call]:
        self.turns += 1
        if self.turns > self.fails_at:
            raise DeploymentError(f"{self.name} broke")
        self.clock.log.append((self.name, batch, calls))
        found = []
        for _ in range(calls):
            cpu = self.per_call + self.per_image * batch
            wall = cpu * self.clock.slowdown() + self.first
            self.first = 0.0
            self.clock.now += wall
            found.append((wall, cpu))
        return found


def test_ratios_of_the_same_round_survive_a_machine_that_others_use() -> None:
    clock = Clock()
    rivals = {"float": Fake("float", clock, 0.010), "quick": Fake("quick", clock, 0.004)}
    found = take_turns(rivals, [1], rounds=200, seconds=0.02)
    ratios = np.array(found.turns["float", 1]) / np.array(found.turns["quick", 1])
    assert statistics.median(ratios) == pytest.approx(2.5)
    # What a bench would say that times one after the other is another matter: the machine did change.
    assert max(found.turns["float", 1]) > 2 * min(found.turns["float", 1])
    assert found.cpu["quick", 1] == pytest.approx([0.004] * 200)


def test_every_round_has_one_turn_of_each_in_changing_order() -> None:
    clock = Clock()
    names = ["a", "b", "c", "d"]
    rivals = {name: Fake(name, clock, 0.01) for name in names}
    told = []
    found = take_turns(rivals, [1, 4], rounds=12, seconds=0.0, on_turn=lambda: told.append(1))
    warm, timed = clock.log[:8], clock.log[8:]
    assert sorted((name, batch) for name, batch, _ in warm) == sorted((n, b) for n in names for b in (1, 4))
    assert all(calls == 1 + WARM for *_, calls in warm)
    orders = []
    for start in range(0, len(timed), 4):
        turn = timed[start : start + 4]
        assert sorted(name for name, *_ in turn) == names
        assert len({batch for _, batch, _ in turn}) == 1
        orders.append(tuple(name for name, *_ in turn))
    assert len(orders) == 24
    assert len(set(orders)) > 8
    assert {len(turns) for turns in found.turns.values()} == {12}
    assert len(told) == 8 * 13
    again = Clock()
    take_turns({name: Fake(name, again, 0.01) for name in names}, [1, 4], rounds=12, seconds=0.0)
    assert again.log == clock.log


def test_calls_fill_a_turn_and_the_first_call_ever_counts_for_nothing() -> None:
    clock = Clock()
    rivals = {"slow": Fake("slow", clock, 0.3), "compiled": Fake("compiled", clock, 0.001, first=90.0)}
    found = take_turns(rivals, [1], rounds=3, seconds=0.1)
    assert found.calls["slow", 1] == 1
    assert 100 / 4 <= found.calls["compiled", 1] <= 100
    assert max(found.turns["compiled", 1]) <= 0.004 + 1e-9
    tiny = take_turns({"tiny": Fake("tiny", Clock(), 1e-9)}, [1], rounds=1, seconds=1.0)
    assert tiny.calls["tiny", 1] == MOST_CALLS


@pytest.mark.parametrize("at", [0, 1, 5])
def test_one_that_fails_is_told_and_does_not_stop_the_others(at: int) -> None:
    clock = Clock()
    rivals = {"good": Fake("good", clock, 0.01), "bad": Fake("bad", clock, 0.01, fails_at=at)}
    found = take_turns(rivals, [1, 2], rounds=6, seconds=0.0)
    assert found.failed == {"bad": "bad broke"}
    assert {name for name, _ in found.turns} == {"good"}
    assert len(found.turns["good", 1]) == len(found.turns["good", 2]) == 6
    assert rivals["bad"].turns == at + 1
