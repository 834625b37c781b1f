"""Peak memory of quantizing with 32, 1,000 and 10,000 calibration images, which are streamed: it has to stay flat.

Each run is a process of its own on the embedded `seeded_vit`. What is written to results/calibration_memory.csv:
    peak_mb       largest resident memory of the process
    before_mb     the same before quantizing, after one float forward of 32 images
    grown_mb      how much of the peak came with quantizing
    data_mb       what all images would take if they were kept

    python benchmarks/calibration_memory.py [--images 32 1000 10000] [--recipes minmax percentile repq_vit]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from _common import RESULTS, Steps
from torch import Tensor

from vitq.core.batches import MICRO_BATCH, sizes_of

MODEL = "seeded_vit"
IMAGES = (32, 1000, 10_000)
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


def measure(recipe: str, count: int) -> dict[str, str]:
    """One run, in this process."""
    import vitq
    from vitq.cli.console import peak_rss_mb
    from vitq.data.zoo import build_zoo

    torch.set_num_threads(1)
    model, stream = build_zoo(MODEL), Stream(count)
    with torch.no_grad():
        model(next(iter(stream)))
    before, start = peak_rss_mb(), time.perf_counter()
    vitq.quantize(model, recipe, "w4a4", stream)
    seconds, peak = time.perf_counter() - start, peak_rss_mb()
    return {
        "model": MODEL,
        "recipe": recipe,
        "bits": "w4a4",
        "images": str(count),
        "peak_mb": f"{peak:.1f}",
        "before_mb": f"{before:.1f}",
        "grown_mb": f"{peak - before:.1f}",
        "data_mb": f"{count * 3 * SIZE * SIZE * 4 / 2**20:.1f}",
        "seconds": f"{seconds:.1f}",
        "torch": torch.__version__,
    }


def main() -> None:
    """Run every recipe and number of images, each in a fresh process, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.recipes[0], asked.images[0])))
        return
    rows, steps = [], Steps(len(asked.images) * len(asked.recipes))
    for recipe in asked.recipes:
        for count in asked.images:
            words = ["--one", "--recipes", recipe, "--images", str(count)]
            found = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            rows.append(json.loads(found.stdout))
            steps.step(f"{recipe} {count} images: {rows[-1]['peak_mb']} MB, of which {rows[-1]['grown_mb']} grown")
    with (RESULTS / "calibration_memory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
