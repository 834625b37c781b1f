"""What each part of vitq_calib is worth: results/ablation.csv.

DeiT-Tiny with real weights, calibrated on 32 photos, evaluated on photos of split `ablate`, and never on `report`. A
row per variant, bits and seed: one option changed, top-1 and divergence from the float model, and the paired difference
in both from the recipe as it is, image by image, with 95 % intervals over images. Everything is simulated.

`seconds` is what `quantize` took, and `forwards` that in float forwards of the calibration images, timed just before.
Variants that are there for this commit, bits and seed are not measured again.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _common import IMAGES, MODEL, Shared, Steps, bootstrap, float_forward, parser, provenance, results_folder, top
from torch import Tensor

import vitq
from vitq.data.images import Batch, open_images
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.metrics import logit_kl
from vitq.report.table import append_rows, read_results

RECIPE = "vitq_calib"
WHOLE = "as it is"
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "softmax=log2": {"softmax": "log2"},
    "softmax=logsqrt2": {"softmax": "logsqrt2"},
    "softmax=uniform": {"softmax": "uniform"},
    "gelu=uniform": {"gelu": "uniform"},
    "gelu=adaptive_log": {"gelu": "adaptive_log"},  # what it is up to 6 bits, and
    "gelu=twin_gelu": {"gelu": "twin_gelu"},  # beyond
    "balance=True": {"balance": True},
    "rounds=0": {"rounds": 0},
    "rounds=1 steps=16": {"rounds": 1, "steps": 16},
    "objective=hessian": {"objective": "hessian"},
    "columns=False": {"columns": False},
    "absorb=0.3": {"absorb": 0.3},
    "biases=False": {"biases": False},
    "weighted=False": {"weighted": False},
}
KEY = ("model", "recipe", "variant", "bits", "seed", "images")


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/ablation.py --bits w4a4 --seeds 0")
    options.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--images", type=int, default=500, help="evaluate on so many at most (default 500)")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    loaded, file = shared.model(), results_folder(args) / "ablation.csv"
    photos = open_images(shared.sample / "ablate", num_classes=loaded.num_classes)
    wanted = 10 if args.quick else min(args.images, len(photos))
    photos = photos.subset(range(0, len(photos), -(-len(photos) // wanted)))
    batches = list(photos.batches(loaded.preprocess, 50))
    reference = evaluate_classifier(loaded.model, batches, keep_logits=True)
    variants = [WHOLE, *(name for name in args.variants if name != WHOLE)]
    steps = Steps(len(variants) * len(args.bits) * len(args.seeds))
    known = {tuple(row[name] for name in (*KEY, "commit")) for row in (read_results(file) if file.exists() else [])}
    for bits in args.bits:
        for seed in args.seeds:
            count = 4 if args.quick else IMAGES
            seen = shared.calibration(seed).subset(range(count)).tensor(loaded.preprocess)
            whole: tuple[ClassifyResult, Tensor] | None = None
            where = {"kind": "simulated", "calibration": f"{count} of calibration_seed{seed}.txt"}
            where |= {"evaluation": f"{len(photos)} of imagenet_sample/ablate"} | shared.weights() | provenance()
            for variant in variants:
                row: dict[str, Any] = {"model": MODEL, "recipe": RECIPE, "variant": variant, "bits": bits, "seed": seed}
                row["images"] = len(photos)
                there = (*map(str, row.values()), where["commit"]) in known
                if there and variant != WHOLE:  # that one is needed to pair the others with
                    steps.step(f"{bits} seed {seed} {variant}: there")
                    continue
                unit = float_forward(loaded.model, seen)
                start = time.perf_counter()
                qmodel = vitq.quantize(loaded.model, RECIPE, bits, seen, options=VARIANTS[variant], seed=seed)
                seconds = time.perf_counter() - start
                found, kl = judged(qmodel, batches, reference)
                whole = whole or (found, kl)
                row |= top(found) | {"top1_float": reference.top1, "logit_kl": round(float(kl.mean()), 4)}
                row |= against(found, kl, *whole) | {"seconds": round(seconds, 2), "forwards": round(seconds / unit, 1)}
                append_rows(file, [row | where], KEY)
                steps.step(f"{bits} seed {seed} {variant}: top-1 {found.top1:.2f} %, KL {row['logit_kl']}")
    return 0


def judged(qmodel: vitq.QuantModel, batches: list[Batch], reference: ClassifyResult) -> tuple[ClassifyResult, Tensor]:
    """What it gets right, and its divergence from the float model, image by image."""
    found = evaluate_classifier(qmodel, batches, keep_logits=True)
    assert found.logits is not None
    assert reference.logits is not None
    return found, logit_kl(reference.logits, found.logits)


def against(found: ClassifyResult, kl: Tensor, whole: ClassifyResult, whole_kl: Tensor) -> dict[str, float]:
    """Paired differences from the recipe as it is: of top-1 in points, of the divergence in nats."""
    right = found.predictions.correct.double() - whole.predictions.correct.double()
    points, nats = bootstrap(right[None]), bootstrap((kl - whole_kl).double()[None] / 100)
    names = ("", "_low", "_high")
    row = {f"top1_minus_whole{name}": value for name, value in zip(names, points, strict=True)}
    return row | {f"kl_minus_whole{name}": value for name, value in zip(names, nats, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
