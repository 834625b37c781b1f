"""What changes of basis before quantization gain, whole and each part alone: results/rewrites.csv.

DeiT-Tiny with real weights, calibrated on 32 photos, evaluated on photos of split `ablate` (evenly spread over the
classes). The float model runs on the same tensors in the same process. Everything is simulated.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _common import IMAGES, MODEL, Shared, Steps, parser, provenance, results_folder, top

import vitq
from vitq.core.format import Bits
from vitq.core.recipe import MODIFIERS, RECIPES, Recipe, compose
from vitq.data.images import open_images
from vitq.evaluate.classify import evaluate_classifier
from vitq.evaluate.metrics import logit_kl
from vitq.report.table import append_rows

PHOTOS = 300
KEY = ("model", "recipe", "rewrite", "bits", "seed")
ROTATION, SMOOTH = ("streams", "scores", "values"), ("norms", "values", "scores")


def alone(part: str, parts: tuple[str, ...]) -> dict[str, bool]:
    """Options that leave one part switched on."""
    return {each: each == part for each in parts}


# Name in the table -> modifiers with their options.
REWRITES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "none": [],
    "rotation": [("rotation", {})],
    **{f"rotation_{part}": [("rotation", alone(part, ROTATION))] for part in ROTATION},
    "smoothquant": [("smoothquant", {})],
    **{f"smoothquant_{part}": [("smoothquant", alone(part, SMOOTH))] for part in SMOOTH},
    "rotation+smoothquant": [("rotation", {}), ("smoothquant", {})],
}


def built(recipe: str, rewrite: str, bits: str) -> Recipe:
    """A recipe with its modifiers at some width."""
    widths = Bits.parse(bits)
    made = [MODIFIERS[name](widths.weight, widths.act, **options) for name, options in REWRITES[rewrite]]
    return compose(RECIPES[recipe](widths.weight, widths.act), made)


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/rewrites.py --recipes minmax --bits w4a4")
    options.add_argument("--recipes", nargs="+", default=["minmax", "repq_vit"], help="which recipes")
    options.add_argument("--rewrites", nargs="+", choices=REWRITES, default=list(REWRITES), help="what is done before")
    options.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"], help="widths")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    out, loaded, where = results_folder(args), shared.model(), provenance()
    calib, photos = (4, 6) if args.quick else (IMAGES, PHOTOS)
    calibration = shared.calibration(0).subset(range(calib)).tensor(loaded.preprocess)
    split = open_images(shared.sample / "ablate", num_classes=loaded.num_classes)
    spread = split.subset([number * len(split) // photos for number in range(photos)])
    batches = list(spread.batches(loaded.preprocess, 50))
    wanted = [(recipe, rewrite, bits) for bits in args.bits for recipe in args.recipes for rewrite in args.rewrites]
    steps = Steps(len(wanted) + 1)
    reference = evaluate_classifier(loaded.model, batches, keep_logits=True)
    steps.step(f"float: top-1 {reference.top1:.2f} %")
    for recipe, rewrite, bits in wanted:
        start = time.perf_counter()
        qmodel = vitq.quantize(loaded.model, built(recipe, rewrite, bits), bits, calibration)
        seconds = time.perf_counter() - start
        found = evaluate_classifier(qmodel, batches, keep_logits=True)
        assert found.logits is not None
        assert reference.logits is not None
        same = found.predictions.predicted == reference.predictions.predicted
        kl = float(logit_kl(reference.logits, found.logits).mean())
        row = {"model": MODEL, "recipe": recipe, "rewrite": rewrite, "bits": bits, "seed": 0, "kind": "simulated"}
        row |= {"images": found.images} | top(found) | {"top1_float": round(float(reference.top1 or 0), 4)}
        row |= {"agreement": round(100 * float(same.double().mean()), 4), "logit_kl": float(f"{kl:.4g}")}
        row |= {"seconds": round(seconds, 1), "evaluation": f"{found.images} of imagenet_sample/ablate"}
        row |= {"calibration": f"{calib} of calibration_seed0.txt"} | shared.weights() | where
        append_rows(out / "rewrites.csv", [row], KEY)
        steps.step(f"{recipe}+{rewrite} {bits}: top-1 {found.top1:.2f} %, KL {kl:.3f}, quantized in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
