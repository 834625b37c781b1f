"""Exports of DeiT-Tiny with real weights, and whether they compute what the simulated model does: results/export.csv.

Calibrated on 32 photos of calib. A row says

    file_bytes           of the ONNX file, beside those of the artifact (all its files)
    whole, float         matrix products of the graph that ONNX Runtime runs, in whole numbers and in float
    equal_codes          share of equal codes where every site is given what the simulated model has
    farthest             the largest difference of a code, in levels
    agree                share of predictions that are the simulated model's, of `images` photos of ablate
    agree_noise          the same for the simulated model under noise of 1e-6 at every site
    agree_image_noise    … under such noise on the images
    seconds              of the export, checks included
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import MODEL, Shared, Steps, parser, provenance, results_folder

import vitq
from vitq.data.images import open_images
from vitq.report.table import append_rows

KEY = ("model", "recipe", "bits", "profile")
RECIPES = ("minmax", "percentile", "repq_vit")
BITS = ("w8a8", "w4a8", "w4a4", "w4a16")


def measure(shared: Shared, recipe: str, bits: str, profile: str, images: int) -> dict[str, Any]:
    """Quantize, save, export."""
    loaded = shared.model()
    photos = open_images(shared.sample / "ablate", labels="none").sample(images, 0).tensor(loaded.preprocess)
    qmodel = vitq.quantize(loaded.model, recipe, bits, shared.calibration(0).tensor(loaded.preprocess))
    with tempfile.TemporaryDirectory() as folder:
        artifact = vitq.save(qmodel, Path(folder) / "artifact")["bytes"]
        start = time.perf_counter()
        made = vitq.export_onnx(qmodel, Path(folder) / "model.onnx", profile, data=photos)
        seconds = time.perf_counter() - start
    parity = made.parity
    return {
        "model": MODEL,
        "recipe": recipe,
        "bits": bits,
        "profile": profile,
        "artifact_bytes": artifact,
        "file_bytes": made.bytes,
        "whole": sum(made.products["whole"].values()),
        "float": sum(made.products["float"].values()),
        "equal_codes": f"{parity.equal_codes:.7f}",
        "farthest": max((site.farthest for site in parity.sites), default=0),
        "agree": f"{parity.agree / parity.images:.4f}",
        "agree_noise": f"{parity.agree_noise / parity.draws:.4f}",
        "agree_image_noise": f"{parity.agree_image_noise / parity.draws:.4f}",
        "images": parity.images,
        "seconds": f"{seconds:.1f}",
    }


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/export.py --recipes repq_vit --bits w4a4")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--bits", nargs="+", default=BITS)
    options.add_argument("--profile", default="ort")
    options.add_argument("--images", type=int, default=64)
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    file = results_folder(args) / "export.csv"
    runs = [(recipe, bits) for recipe in args.recipes for bits in args.bits][: 1 if args.quick else None]
    steps = Steps(len(runs))
    for recipe, bits in runs:
        row = measure(shared, recipe, bits, args.profile, 8 if args.quick else args.images)
        append_rows(file, [row | shared.weights() | provenance()], KEY)
        steps.step(f"{recipe} {bits}: {row['equal_codes']} of the codes, {row['agree']} of the predictions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
