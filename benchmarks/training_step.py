"""What a step of training costs beside one of the float model: results/training_step.csv.

DeiT-Tiny with real weights, and other shapes with random ones; images and labels are random, in memory, so that nothing
is decoded. `float` trains the float model: cross-entropy, all weights, AdamW. The others are recipes up to the end of
their pass `train`, w4a4, with labels; the float model as a teacher runs in every step, as with augmentation. Each
measurement is a process of its own, and all go one after the other, in turns. A row says

    step_seconds  the median over turns of the median over steps
    ratio         of that to float training of the same model and batch, on the same device
    grown_mb      by how much the peak memory of the process grew with training, from where the model and the images
                  were (CUDA: peak of what is allocated, minus that)
    epoch_hours   1,281,167 images at this rate
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from _common import MODEL, Shared, Steps, fresh, parser, provenance, resident, results_folder
from torch import Tensor, nn

import vitq
from vitq.calibrate.heap import give_back
from vitq.core.recipe import RECIPES, PassSpec
from vitq.core.training import Draw
from vitq.report.table import append_rows

FLOAT = "float"
KINDS = (FLOAT, "gplq", "lsq")
SHAPES = (MODEL, "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
BITS, CALIBRATION, CLASSES, SIZE = "w4a4", 4, 1000, 224
IMAGENET = 1_281_167
KEY = ("model", "kind", "batch", "micro_batch", "precision", "recompute", "device")


class InMemory:
    """Random images that never look the same to a teacher: as with augmentation, nothing is kept."""

    labelled, fixed = True, False

    def __init__(self, count: int) -> None:
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(count, 3, SIZE, SIZE), torch.randint(CLASSES, (count,))

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        return "random"

    def stream(self, batches: Any) -> Any:
        for draws in batches:
            numbers: list[Draw] = list(draws)
            rows = [number for _, number in numbers]
            yield self.images[rows], self.labels[rows]


def measure(shared: Shared, model: str, kind: str, batch: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import timm

    provenance()  # threads
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = shared.model().model if model == MODEL else timm.create_model(model, pretrained=False)
    net, examples = net.to(device).eval(), InMemory(batch * steps)
    with torch.no_grad():
        net(examples.images[:2].to(device))
    give_back()
    before = memory(device)
    seconds = (
        by_float(net, examples, batch, device) if kind == FLOAT else by_recipe(net, examples, kind, batch, options)
    )
    return {"seconds": statistics.median(seconds[1:]), "grown_mb": memory(device) - before}


def memory(device: torch.device) -> float:
    """Peak in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident("VmHWM")


def by_float(model: nn.Module, examples: InMemory, batch: int, device: torch.device) -> list[float]:
    """Seconds of each step of plain training in float."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    taken: list[float] = []
    for images, labels in zip(examples.images.split(batch), examples.labels.split(batch), strict=True):
        start = now(device)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        taken.append(now(device) - start)
    return taken


def by_recipe(model: nn.Module, examples: InMemory, kind: str, batch: int, options: dict[str, Any]) -> list[float]:
    """Seconds of each step of a recipe's pass `train`."""
    device = next(model.parameters()).device
    recipe = RECIPES[kind](4, 4)
    names = [spec.name for spec in recipe.passes]
    kept = [spec for spec in recipe.passes[: names.index("train") + 1] if spec.name != "fit_products"]
    seen: list[float] = []

    def look(quantized: nn.Module) -> dict[str, float]:
        seen.append(now(device))
        return {}

    steps = len(examples) // batch
    training = vitq.Training(
        examples, batch_size=batch, measure=look, looks=steps, **({"micro_batch": batch} | options)
    )
    data: Tensor = examples.images[:CALIBRATION].to(device)
    vitq.quantize(model, replace(recipe, passes=(*kept, PassSpec.of("fit"))), BITS, data, training=training)
    return [after - before for before, after in pairwise(seen)]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/training_step.py --models deit_tiny_patch16_224 --batch 16")
    options.add_argument("--models", nargs="+", default=SHAPES, help="timm names")
    options.add_argument("--kinds", nargs="+", default=KINDS, help="float, or recipes that train")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--micro-batch", type=int)
    options.add_argument("--precision", default="no")
    options.add_argument("--recompute", action="store_true")
    options.add_argument("--one", nargs=2, metavar=("MODEL", "KIND"), help=argparse.SUPPRESS)
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    batch, steps, turns = (4, 3, 1) if args.quick else (args.batch, args.steps, args.turns)
    how = {"micro_batch": args.micro_batch or batch, "precision": args.precision, "recompute": args.recompute}
    if args.one:
        print(json.dumps(measure(shared, *args.one, batch, steps, how)))
        return 0
    file, models = results_folder(args) / "training_step.csv", args.models[:1] if args.quick else args.models
    kinds = [FLOAT, *(kind for kind in args.kinds if kind != FLOAT)]
    told = Steps(len(models) * len(kinds) * turns)
    for model in models:
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(turns):
            for kind in kinds:
                words = [
                    "--shared",
                    args.shared,
                    "--batch",
                    batch,
                    "--steps",
                    steps,
                    "--micro-batch",
                    how["micro_batch"],
                ]
                words += ["--precision", args.precision, *["--recompute"] * args.recompute, "--one", model, kind]
                found[kind].append(json.loads(fresh([__file__, *map(str, words)])))
                told.step(f"{model} {kind}: {found[kind][-1]['seconds']:.3f} s, {found[kind][-1]['grown_mb']:.0f} MB")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        unit = statistics.median(run["seconds"] for run in found[FLOAT])
        for kind, runs in found.items():
            seconds = statistics.median(run["seconds"] for run in runs)
            row: dict[str, Any] = {"model": model, "kind": kind, "device": device, "batch": batch} | how
            row |= {"step_seconds": f"{seconds:.4f}", "ratio": f"{seconds / unit:.2f}", "steps": steps, "turns": turns}
            row |= {"grown_mb": f"{statistics.median(run['grown_mb'] for run in runs):.0f}"}
            row |= {"epoch_hours": f"{seconds / batch * IMAGENET / 3600:.1f}", "bits": BITS, "simulated": kind != FLOAT}
            append_rows(file, [row | provenance()], KEY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
