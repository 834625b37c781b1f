"""Latencies of rivals that take turns, so that whatever else the machine does meets all of them alike.

One round gives every rival one turn at every batch size, in an order drawn anew. A turn is as many calls as fill its
time, and counts as their median. Before the first round every rival is warmed up; those calls count for nothing.

Units:   seconds of one call, on the clock and of its threads on the CPU; with one thread the two are equal where
         nothing else wants the processor
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vitq.bench.errors import DeploymentError

Call = tuple[float, float]  # seconds on the clock, seconds on the CPU
MOST_CALLS = 1000
WARM = 2  # calls whose time says how many fill a turn, after a first one that is not looked at


class Rival(Protocol):
    """What can be timed."""

    def time(self, batch: int, calls: int) -> list[Call]:
        """Each call.

        Raises:
            DeploymentError: it cannot go on.
        """


@dataclass
class Timings:
    """What was measured.

    Attributes:
        turns: (name, batch) -> seconds of a call on the clock, one entry for each round.
        cpu: the same on the CPU.
        calls: (name, batch) -> calls of a turn.
        failed: name -> why it has no timings.
    """

    turns: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    cpu: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, why: str) -> None:
        """Forget a rival that failed."""
        self.failed[name] = why
        self.turns = {key: found for key, found in self.turns.items() if key[0] != name}


def take_turns(
    rivals: Mapping[str, Rival],
    batches: Sequence[int],
    rounds: int,
    seconds: float,
    *,
    seed: int = 0,
    on_turn: Callable[[], None] = lambda: None,
) -> Timings:
    """Warm all rivals up, then time them in rounds.

    Args:
        batches: images at a time.
        seconds: that a turn takes at least, if it is not of MOST_CALLS already.
        seed: of the order in every round.
        on_turn: called after each turn of each rival that is still there, warming up included.
    """
    found = Timings()

    def turn(name: str, batch: int, calls: int) -> list[Call]:
        try:
            return rivals[name].time(batch, calls)
        except DeploymentError as error:
            found.drop(name, str(error))
            return []
        finally:
            on_turn()

    for name in rivals:
        for batch in batches:
            if name not in found.failed and (warm := turn(name, batch, 1 + WARM)):
                one = max(statistics.median(wall for wall, _ in warm[1:]), 1e-9)
                found.calls[name, batch] = max(1, min(math.ceil(seconds / one), MOST_CALLS))
                found.turns[name, batch], found.cpu[name, batch] = [], []
    order = random.Random(seed)
    for _ in range(rounds):
        for batch in batches:
            left = [name for name in rivals if name not in found.failed]
            order.shuffle(left)
            for name in left:
                if times := turn(name, batch, found.calls[name, batch]):
                    found.turns[name, batch].append(statistics.median(wall for wall, _ in times))
                    found.cpu[name, batch].append(statistics.median(cpu for _, cpu in times))
    return found
