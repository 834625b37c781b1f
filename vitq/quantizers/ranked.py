"""Steps of the same values, again and again: sorted once, each step is one stretch of them.

Shapes:  x any; edges (n) ascending places in the sorted values; levels (n + 1)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Ranked:
    """Values on the CPU, none of them NaN, and where each lies among them.

    Args:
        x: the values.

    Attributes:
        ordered: (N) the values, ascending.
    """

    def __init__(self, x: Tensor) -> None:
        flat = x.reshape(-1)
        order = torch.from_numpy(np.argsort(flat.numpy()))  # see in_order
        self.ordered = flat[order]
        self._rank = torch.empty_like(order, dtype=torch.int32)
        self._rank[order] = torch.arange(len(order), dtype=torch.int32)
        self._made = torch.empty_like(self.ordered)

    def stepped(self, edges: list[int], levels: list[float], to: Tensor) -> None:
        """Write into `to` (N) the level of each value: levels[i] for those from edges[i - 1] to edges[i]."""
        made = self._made.numpy()
        for start, end, level in zip([0, *edges], [*edges, len(made)], levels, strict=True):
            made[start:end] = level
        torch.index_select(self._made, 0, self._rank, out=to)


def in_order(x: Tensor) -> Tensor:
    """Rows (G, n), each ascending. On the CPU by numpy, which takes a fraction of what torch takes."""
    return x.sort(dim=1).values if x.device.type != "cpu" else torch.from_numpy(np.sort(x.contiguous().numpy(), axis=1))
