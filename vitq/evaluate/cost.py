"""What quantizing costs, in forwards of the float model over the same calibration images.

Units:   seconds of wall time; multiply-accumulates of matrix products, convolutions and attention, backward ones too.
         Products with a vector, linear solves and element-wise work are not counted: a search that scores candidates
         value by value costs time and no multiply-accumulates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitq.core.batches import MICRO_BATCH, Batches, leading_size

TIMED = 512  # images; of more, these are timed and the rest is taken to be alike


def float_forward_seconds(model: nn.Module, data: Batches, repeats: int = 5) -> float:
    """Median seconds of a forward of the stock model over the calibration images."""
    kept = [batch for _, batch in zip(range(TIMED // MICRO_BATCH), data, strict=False)]
    share = sum(map(leading_size, kept)) / data.count
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = []
    with torch.inference_mode():
        data.forward(model, kept[0])
        for _ in range(repeats):
            start = time.perf_counter()
            for batch in kept:
                data.forward(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times) / share


def count_macs(work: Callable[[], object]) -> int:
    """Multiply-accumulates of a call; it takes up to a few times as long as without counting."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        work()
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """As torch's FlopCounterMode, which also attributes them to modules and takes twice as long."""

    flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out
