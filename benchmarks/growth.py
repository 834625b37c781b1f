"""How the cost of quantizing grows with the model and with the images: results/growth.csv.

DeiT-Tiny with real weights, and the shapes of DeiT-Small and DeiT-Base with random ones (accuracy is not looked at);
w4a4; real photos. Each run is a process of its own. A row says

    seconds       what `quantize` took
    forwards      the same in float forwards of the same images, in micro-batches of 32, timed just before
    float_mb      by how much the peak memory of the process grew with those float forwards
    grown_mb      by how much it grew with quantizing, from the same start: the larger of both
    data_mb       the images, which are in memory before either
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from _common import MODEL, Shared, Steps, fresh, parser, provenance, resident, results_folder, text

import vitq
from vitq.calibrate.heap import give_back
from vitq.core.batches import MICRO_BATCH
from vitq.data.images import open_images
from vitq.report.table import append_rows, read_results

KEY = ("model", "recipe", "bits", "images")
RECIPES = ("repq_vit", "adalog", "ptq4vit", "apq_vit", "vitq_calib")
SHAPES = (MODEL, "deit_small_patch16_224", "deit_base_patch16_224")
FEW = 16  # images for the growth over models
COUNTS = (32, 128, 512)
BITS = "w4a4"


def measure(shared: Shared, model: str, recipe: str, count: int) -> dict[str, Any]:
    """One run, in this process."""
    import timm

    loaded = shared.model()
    splits = [open_images(shared.sample / split, labels="none") for split in ("calib", "ablate")]
    parts, left = [], count
    for split in splits:
        take = min(left, len(split))
        parts += [split.subset(range(take)).tensor(loaded.preprocess)] if take else []
        left -= take
    images = torch.cat(parts)
    torch.manual_seed(0)
    net = loaded.model if model == MODEL else timm.create_model(model, pretrained=False).eval()
    provenance()  # threads
    with torch.no_grad():
        net(images[:2])
    give_back()
    before, start = resident("VmHWM"), time.perf_counter()
    with torch.no_grad():
        for part in images.split(MICRO_BATCH):
            net(part)
    unit, floated = time.perf_counter() - start, resident("VmHWM")
    start = time.perf_counter()
    vitq.quantize(net, recipe, BITS, images)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    return {
        "model": model,
        "recipe": recipe,
        "bits": BITS,
        "images": len(images),
        "weights": "real" if model == MODEL else "random",
        "seconds": text(seconds),
        "float_seconds": text(unit),
        "forwards": f"{seconds / unit:.1f}",
        "float_mb": f"{floated - before:.1f}",
        "grown_mb": f"{peak - before:.1f}",
        "data_mb": f"{images.numel() * 4 / 2**20:.1f}",
        "peak_mb": f"{peak:.1f}",
    }


def main() -> int:
    """Entry point: every combination that is not there yet, each in a fresh process."""
    options = parser(__doc__, "example: python benchmarks/growth.py --recipes repq_vit vitq_calib")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--models", nargs="+", default=SHAPES, help="timm names: the growth over models")
    options.add_argument("--images", nargs="+", type=int, default=COUNTS, help="for DeiT-Tiny: the growth over images")
    options.add_argument("--one", nargs=3, metavar=("MODEL", "RECIPE", "COUNT"), help=argparse.SUPPRESS)
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    if args.one:
        print(json.dumps(measure(shared, args.one[0], args.one[1], int(args.one[2]))))
        return 0
    file = results_folder(args) / "growth.csv"
    wanted = [(model, 2 if args.quick else FEW) for model in (args.models[:1] if args.quick else args.models)]
    wanted += [(MODEL, count) for count in ((4,) if args.quick else args.images)]
    there = {tuple(row[name] for name in KEY) for row in (read_results(file) if file.exists() else [])}
    runs = [(m, r, n) for m, n in wanted for r in args.recipes if (m, r, BITS, str(n)) not in there]
    steps = Steps(len(runs))
    for model, recipe, count in runs:
        row = json.loads(fresh([__file__, "--shared", str(args.shared), "--one", model, recipe, str(count)]))
        append_rows(file, [row | provenance()], KEY)
        steps.step(f"{model} {recipe} {count} images: {row['forwards']} float forwards, {row['grown_mb']} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
