"""What training on a few photos gains beside calibrating alone, and which choices it takes: results/training.csv.

DeiT-Tiny on photos of `calib`, without labels; evaluated on photos of `ablate`, paired with `vitq_calib` on the list of
32 that ranges begin with. `report` is for the end: --splits calib ablate --evaluate report.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import MODEL, Shared, Steps, float_forward, parser, provenance, results_folder, text, top
from ablation import against, judged

import vitq
from vitq.data.examples import ImageExamples
from vitq.data.images import ImageSet, open_images
from vitq.evaluate.classify import evaluate_classifier
from vitq.report.table import append_rows

BASE = "vitq_calib"
PAPER = {"softmax": "logsqrt2", "gelu": "uniform", "search": False, "columns": False}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gplq": ("gplq", {}),
    "gplq columns=False": ("gplq", {"columns": False}),
    "gplq search=False": ("gplq", {"search": False}),
    "gplq as the paper": ("gplq", PAPER),
    "gplq logits=1 features=0": ("gplq", {"features": 0.0, "logits": 1.0}),
    "lsq": ("lsq", {}),
    "direct": ("direct", {}),
    "prequant": ("prequant", {}),
    "rotated_ste": ("rotated_ste", {}),
}
KEY = ("model", "variant", "bits", "seed", "photos", "epochs", "batch", "evaluation")


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/training.py --photos 128 --epochs 2")
    options.add_argument("--bits", nargs="+", default=["w4a4"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--photos", type=int, default=300, help="to train on, at most (default 300)")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--images", type=int, default=300, help="evaluate on so many at most (default 300)")
    options.add_argument("--splits", nargs="+", default=["calib"], help="where the photos come from")
    options.add_argument("--evaluate", default="ablate", help="the split that is evaluated on")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    loaded, file = shared.model(), results_folder(args) / "training.csv"
    count = 10 if args.quick else args.images
    photos = spread(open_images(shared.sample / args.evaluate, num_classes=loaded.num_classes), count)
    batches = list(photos.batches(loaded.preprocess, 50))
    reference = evaluate_classifier(loaded.model, batches, keep_logits=True)
    learned_from = together([shared.sample / split for split in args.splits], 8 if args.quick else args.photos)
    steps = Steps((1 + len(args.variants)) * len(args.bits) * len(args.seeds))
    for bits in args.bits:
        for seed in args.seeds:
            start_on = shared.calibration(seed)
            seen = start_on.subset(range(4 if args.quick else len(start_on))).tensor(loaded.preprocess)
            unit, judgement = float_forward(loaded.model, seen), None
            for variant in (BASE, *args.variants):
                recipe, chosen = VARIANTS.get(variant, (BASE, {}))
                training = None
                if variant != BASE:
                    examples = ImageExamples(learned_from, loaded.preprocess, labels=False, seed=seed)
                    training = vitq.Training(examples, epochs=args.epochs, batch_size=args.batch)
                began = time.perf_counter()
                qmodel = vitq.quantize(loaded.model, recipe, bits, seen, options=chosen, seed=seed, training=training)
                seconds = time.perf_counter() - began
                found, kl = judged(qmodel, batches, reference)
                judgement = judgement or (found, kl)
                row: dict[str, Any] = {"model": MODEL, "variant": variant, "bits": bits, "seed": seed}
                row |= {"photos": len(training.examples) if training else 0, "epochs": args.epochs if training else 0}
                row |= {"batch": args.batch if training else 0, "steps": training.steps if training else 0}
                row |= {"evaluation": f"{len(photos)} of imagenet_sample/{args.evaluate}"}
                row |= top(found) | {"top1_float": reference.top1, "logit_kl": round(float(kl.mean()), 4)}
                row |= against(found, kl, *judgement)
                row |= {"seconds": text(seconds), "forwards": f"{seconds / unit:.1f}", "kind": "simulated"}
                row |= {"calibration": f"{len(seen)} of calibration_seed{seed}.txt", "splits": "+".join(args.splits)}
                append_rows(file, [row | shared.weights() | provenance()], KEY)
                steps.step(f"{bits} seed {seed} {variant}: top-1 {found.top1:.2f} %, KL {row['logit_kl']}")
    return 0


def spread(images: ImageSet, count: int) -> ImageSet:
    """At most so many, evenly spread."""
    return images.subset(range(0, len(images), -(-len(images) // min(count, len(images)))))


def together(folders: list[Path], count: int) -> ImageSet:
    """At most so many photos of each of these folders, without labels, as one set."""
    names = [
        f"{folder.name}/{name}" for folder in folders for name in spread(open_images(folder, labels="none"), count).ids
    ]
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "photos.txt"
        listed.write_text("\n".join(names) + "\n", encoding="utf-8")
        return open_images(listed, root=folders[0].parent, labels="none")


if __name__ == "__main__":
    sys.exit(main())
