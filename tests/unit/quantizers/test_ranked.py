"""Steps of values in order, against looking each value up."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitq.quantizers.ranked import Ranked


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.lists(st.integers(-6, 6), max_size=6))
def test_each_value_gets_the_level_of_its_step(values: list[int], bounds: list[int]) -> None:
    x, edges = torch.tensor(values, dtype=torch.float32), torch.tensor(sorted(bounds), dtype=torch.float32)
    ranked, levels = Ranked(x), [float(n * n + 1) for n in range(len(bounds) + 1)]
    assert torch.equal(ranked.ordered, x.sort().values)
    found = torch.empty(len(x))
    ranked.stepped(torch.searchsorted(ranked.ordered, edges).tolist(), levels, found)
    assert found.tolist() == [levels[sum(v >= b for b in bounds)] for v in values]
