"""What this machine reaches in matrix products: results/roofline.csv, a row for every size and kernel.

    gops          billions of operations a second of the quickest repetition, which other work disturbs least
    median_gops   of the median one: far below where something else had the processor

float32 and bfloat16 through torch's `linear` and oneDNN's packed one, int8 through `_int_mm` and oneDNN's bytes. Short
products fit between two turns of whatever else runs; `best` marks the quickest of its numbers, which is the roofline.
"""

from __future__ import annotations

import sys

import torch
from _common import Steps, parser, provenance, results_folder

from vitq.bench.roofline import NUMBERS, measure, shapes
from vitq.report.table import append_rows

KEY = ("numbers", "kernel", "m", "n", "k", "threads")


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: OMP_NUM_THREADS=1 python benchmarks/roofline.py", shared=False)
    options.add_argument("--seconds", type=float, default=2.0, help="for every product (default 2)")
    args = options.parse_args()
    where = provenance()
    torch.manual_seed(0)
    sizes = shapes("cpu")[: 1 if args.quick else None]
    steps = Steps(len(NUMBERS) * len(sizes))
    rows = []
    for numbers in NUMBERS:
        points = []
        for shape in sizes:
            points += measure(numbers, shape, "cpu", 0.05 if args.quick else args.seconds)
            steps.step(f"{numbers} {shape}: {max(point.gops for point in points):.0f} at best so far")
        best = max(points, key=lambda point: point.gops)
        for point in points:
            m, n, k = point.shape
            row = {"numbers": numbers, "kernel": point.kernel, "m": m, "n": n, "k": k}
            row |= {"gops": f"{point.gops:.1f}", "median_gops": f"{point.median_gops:.1f}"}
            rows.append(row | {"best": "yes" if point is best else ""} | where)
    append_rows(results_folder(args) / "roofline.csv", rows, KEY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
