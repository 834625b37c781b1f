"""Peak memory of quantizing with 32, 1,000 and 10,000 calibration images, which are streamed: it has to stay flat.

(Up to 64 micro-batches, that is 2,048 images, may hold 2 GiB while they wait for one another inside of the model:
docs/decisions/determinism.md.)

Each run is a process of its own on the embedded `seeded_vit`. What is written to results/calibration_memory.csv:
    budget_mb     what block inputs may take in memory; beyond it they go to disk
    peak_mb       largest resident memory of the process
    before_mb     the same before quantizing, after one float forward of 32 images
    grown_mb      how much of the peak came with quantizing
    data_mb       what all images would take if they were kept
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from _common import Steps, fresh, parser, provenance, resident, results_folder
from torch import Tensor

from vitq.core.batches import MICRO_BATCH, sizes_of
from vitq.report.table import append_rows

KEY = ("model", "recipe", "bits", "images", "budget_mb")
MODEL = "seeded_vit"
IMAGES = (32, 1000, 10_000)
QUICK = (32, 100)
RECIPES = ("minmax", "percentile", "repq_vit")
SIZE = 32


class Stream:
    """Smooth images, made in micro-batches when they are asked for; the same every time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        axis = torch.linspace(-1, 1, SIZE)
        for number, size in enumerate(sizes_of(self.count, MICRO_BATCH)):
            draw = torch.Generator().manual_seed(number)
            slope, wave, shift = torch.randn(3, size, 3, 2, 1, generator=draw).unbind()
            rows, columns = (slope * axis + wave * torch.sin(6 * axis + shift)).unbind(2)
            yield (rows[..., :, None] + columns[..., None, :]).tanh()


def measure(recipe: str, count: int, budget: int | None) -> dict[str, Any]:
    """One run, in this process."""
    import vitq
    from vitq.calibrate import store
    from vitq.data.zoo import build_zoo

    torch.set_num_threads(1)
    store.BUDGET = store.BUDGET if budget is None else budget * 2**20
    model, stream = build_zoo(MODEL), Stream(count)
    with torch.no_grad():
        model(next(iter(stream)))
    before, start = resident("VmHWM"), time.perf_counter()
    vitq.quantize(model, recipe, "w4a4", stream)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    return {
        "model": MODEL,
        "recipe": recipe,
        "bits": "w4a4",
        "images": count,
        "budget_mb": store.BUDGET // 2**20,
        "peak_mb": f"{peak:.1f}",
        "before_mb": f"{before:.1f}",
        "grown_mb": f"{peak - before:.1f}",
        "data_mb": f"{count * 3 * SIZE * SIZE * 4 / 2**20:.1f}",
        "seconds": f"{seconds:.1f}",
    }


def main() -> int:
    """Entry point: every recipe and number of images, each in a fresh process."""
    options = parser(__doc__, "example: python benchmarks/calibration_memory.py --recipes repq_vit", shared=False)
    options.add_argument("--images", type=int, nargs="+", help="numbers of images (default: 32 1000 10000)")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument(
        "--budget-mb", type=int, help="kept of activations in memory before disk (default: vitq's own)"
    )
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    counts = args.images or (QUICK if args.quick else IMAGES)
    if args.one:
        print(json.dumps(measure(args.recipes[0], counts[0], args.budget_mb)))
        return 0
    file, steps = results_folder(args) / "calibration_memory.csv", Steps(len(counts) * len(args.recipes))
    budget = [] if args.budget_mb is None else ["--budget-mb", str(args.budget_mb)]
    for recipe in args.recipes:
        for count in counts:
            row = json.loads(fresh([__file__, "--one", "--recipes", recipe, "--images", str(count), *budget]))
            append_rows(file, [row | provenance()], KEY)
            steps.step(f"{recipe} {count} images: {row['peak_mb']} MB, of which {row['grown_mb']} grown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
