"""What is told about every deployment: latencies with their spread, ratios to float, and a plain verdict.

On the CPU with one thread, latencies are seconds that the call had the processor: on a machine that does other things,
too, a call that is shorter than a turn of the scheduler would look quicker beside a longer one than it is. With more
threads, and on a GPU, they are seconds on the clock. Where nothing else runs the two are equal for one thread.

Units:   seconds of one call; images a second; MiB of memory; bytes on disk; shares of the roofline between 0 and 1
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitq.bench.deployments import BASE, FLOAT, SIMULATED, Deployment
from vitq.bench.timing import Timings
from vitq.bench.verdict import Speedup, speedup

FLOAT32 = "float32"
CPU, WALL = "CPU", "wall"
NOT_A_DEPLOYMENT = "simulated: not a deployment"


@dataclass(frozen=True)
class Latency:
    """One deployment at one batch size.

    Attributes:
        batch: images of a call.
        clock: what seconds are of: CPU or WALL.
        seconds, low, high: of a call: median over rounds, and the quartiles.
        wall, cpu: medians of both clocks.
        rounds, calls: turns, and calls in each.
        speedup: beside torch's eager float model; None for itself, or without it.
        quickest: name of the quickest other float32 deployment, "" without one.
        speedup_quickest: beside that.
        of_roofline: operations of its matrix products a second, over what this machine reaches with such numbers.
    """

    batch: int
    clock: str
    seconds: float
    low: float
    high: float
    wall: float
    cpu: float
    rounds: int
    calls: int
    speedup: Speedup | None = None
    quickest: str = ""
    speedup_quickest: Speedup | None = None
    of_roofline: float | None = None

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.batch / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain data; latencies in milliseconds."""
        return {
            "batch": self.batch,
            "clock": self.clock,
            "median_ms": round(1000 * self.seconds, 4),
            "quartiles_ms": [round(1000 * self.low, 4), round(1000 * self.high, 4)],
            "wall_ms": round(1000 * self.wall, 4),
            "cpu_ms": round(1000 * self.cpu, 4),
            "images_per_second": round(self.images_per_second, 2),
            "rounds": self.rounds,
            "calls": self.calls,
            "speedup": self.speedup and self.speedup.to_json(),
            "quickest_float": self.quickest,
            "speedup_over_quickest_float": self.speedup_quickest and self.speedup_quickest.to_json(),
            "of_roofline": None if self.of_roofline is None else round(self.of_roofline, 4),
        }


@dataclass(frozen=True)
class Measured:
    """One deployment.

    Attributes:
        kind, numbers: as they turned out to be (deployments.Deployment).
        latencies: by batch size, ascending.
        load_seconds: fresh process, packages imported, to the first result at the smallest batch.
        peak_mb, own_mb: resident memory of its process at most, and less what it was before loading.
        device_mb: of torch on the GPU; None on the CPU, and of other runtimes.
        bytes_on_disk: of what it is loaded from.
        accuracy: on the images of the evaluation; empty without.
        whole: matrix products (ONNX Runtime) or weights (torch) that were seen to be of whole numbers; None where
            nobody looked.
    """

    deployment: Deployment
    kind: str
    numbers: str
    latencies: tuple[Latency, ...]
    load_seconds: float
    peak_mb: float
    own_mb: float
    device_mb: float | None
    bytes_on_disk: int
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    whole: int | None = None

    @property
    def verdict(self) -> str:
        """Faster, the same or slower than float, and by how much; never of what is simulated."""
        if self.kind == SIMULATED:
            return NOT_A_DEPLOYMENT
        if self.deployment.name == BASE:
            return "what the others are compared with"
        return "; ".join(_sentence(latency) for latency in self.latencies)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.deployment.name,
            "about": self.deployment.about,
            "kind": self.kind,
            "numbers": self.numbers,
            "latency": [latency.to_json() for latency in self.latencies],
            "load_seconds": round(self.load_seconds, 3),
            "peak_mb": round(self.peak_mb, 1),
            "own_mb": round(self.own_mb, 1),
            "device_mb": None if self.device_mb is None else round(self.device_mb, 1),
            "bytes": self.bytes_on_disk,
            "whole_products": self.whole,
            "accuracy": dict(self.accuracy) or None,
            "verdict": self.verdict,
        }


def _sentence(latency: Latency) -> str:
    if latency.speedup is None:
        return f"batch {latency.batch}: not compared"
    told = f"batch {latency.batch}: {latency.speedup} beside {BASE}"
    if latency.speedup_quickest is not None:
        told += f"; {latency.speedup_quickest} beside {latency.quickest}, the quickest float"
    return told


def latencies(
    timings: Timings,
    batches: Sequence[int],
    kinds: Mapping[str, tuple[str, str]],
    roofline: Mapping[str, float],
    macs: int,
    clock: str = WALL,
) -> dict[str, tuple[Latency, ...]]:
    """Name -> its latencies.

    Args:
        clock: CPU or WALL, what is compared and told.
        kinds: name -> (kind, numbers).
        roofline: numbers -> billions of operations a second.
        macs: multiply-accumulates of the matrix products of one image.
    """
    found: dict[str, list[Latency]] = {name: [] for name in kinds if name not in timings.failed}
    for batch in batches:
        turns = {name: (timings.cpu if clock == CPU else timings.turns)[name, batch] for name in found}
        floats = [name for name in found if kinds[name] == (FLOAT, FLOAT32) and name != BASE]
        quickest = min(floats, key=lambda name: statistics.median(turns[name]), default="")
        if quickest and BASE in turns and statistics.median(turns[BASE]) <= statistics.median(turns[quickest]):
            quickest = ""  # it is compared with that already
        for name, own in turns.items():
            low, median, high = (float(value) for value in np.quantile(own, [0.25, 0.5, 0.75]))
            peak = roofline.get(kinds[name][1])
            found[name].append(
                Latency(
                    batch,
                    clock,
                    median,
                    low,
                    high,
                    statistics.median(timings.turns[name, batch]),
                    statistics.median(timings.cpu[name, batch]),
                    len(own),
                    timings.calls[name, batch],
                    speedup(turns[BASE], own) if BASE in turns and name != BASE else None,
                    quickest if name != quickest else "",
                    speedup(turns[quickest], own) if quickest and name not in (quickest, BASE) else None,
                    2e-9 * macs * batch / median / peak if peak else None,
                )
            )
    return {name: tuple(rows) for name, rows in found.items()}
