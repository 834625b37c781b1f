"""The detector of scenes under every recipe, and what calibrating detectors costs.

table     results/detection.csv: box and mask AP, or mIoU, beside float in the same run, intervals over the images
cost      results/detection_cost.csv: float forwards per image and peak memory of quantizing
              maskrcnn    zoo:scenes_maskrcnn, 32 scenes in batches of 8, as `vitq quantize` takes them
              segformer   the same with zoo:scenes_segformer
              b0          transformers' SegFormer-B0 (random weights) at 512 x 512, 32 images one by one
              photos      torchvision's Mask R-CNN over a Swin-T (random weights) at 800 x 1333, 8 images one by one
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import Steps, fresh, parser, provenance, resident, results_folder
from torch import nn

KEY = ("model", "recipe", "bits", "seed")
COST_KEY = ("what", "model", "recipe", "bits", "images")
MODELS = {"maskrcnn": "instances", "segformer": "segment"}
BATCH = "4"  # of training
RECIPES = ("minmax", "percentile", "repq_vit", "dopq_vit", "apq_vit", "vitq_calib", "gplq")
BITS = ("w8a8", "w6a6", "w4a4")
WHATS = ("maskrcnn", "segformer", "b0", "photos")
CALIBRATION = 32
PHOTOS, HEIGHT, WIDTH = 8, 800, 1333
SIDE = 512  # of images for segmentation


def table_row(name: str, recipe: str, bits: str, seed: int, limit: int | None) -> dict[str, Any]:
    """One model, quantized and measured by the two commands."""
    from vitq.cli import app
    from vitq.core.format import Bits
    from vitq.core.recipe import resolve_recipe

    with tempfile.TemporaryDirectory() as temporary:
        made, told = Path(temporary) / "made.json", Path(temporary) / "told.json"
        out, model = str(Path(temporary) / "out"), f"zoo:scenes_{name}"
        asked = ["--calib-size", str(CALIBRATION), "--seed", str(seed), "--out", out, "--json", str(made)]
        trains = any(spec.name == "train" for spec in resolve_recipe(recipe, Bits.parse(bits)).passes)
        if trains:  # on all scenes to calibrate on, once, by the model's own loss
            fed = ["train", model, "--task", MODELS[name], "--train", "zoo:scenes_calib", "--train-batch", BATCH]
        else:
            fed = ["quantize", model, "--calib", "zoo:scenes_calib"]
        for words in (
            [*fed, "--recipe", recipe, "--bits", bits, *asked],
            ["evaluate", out, "--task", MODELS[name], "--data", "zoo:scenes_test", "--fidelity", "--json", str(told),
             *([] if limit is None else ["--limit", str(limit)])],
        ):  # fmt: skip
            app([*words, "--quiet"], standalone_mode=False)
        first, second = (json.loads(path.read_text()) for path in (made, told))
    row: dict[str, Any] = {"model": model, "recipe": recipe, "bits": bits, "seed": seed, "images": second["images"]}
    for key, better in (("box_ap", "box_difference"), ("mask_ap", "mask_difference"), ("miou", "difference")):
        if key in second:
            row |= {key: second[key], f"{key}_float": second[f"{key}_float"]}
            row |= {
                f"{key}_{end}": value for end, value in zip(("low", "high"), second[f"{key}_interval"], strict=True)
            }
            row |= {f"{key}_minus_float{end}": second[better][part] for end, part in
                    (("", "mean"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
    row["cost"] = round(first["seconds"] / max(first["float_forward_seconds"], 1e-9), 1)
    row |= {"seconds": first["seconds"], "bytes": first["bytes"], "kind": second["kind"]}
    row["training"] = first["training_images"] if trains else ""
    return row | {"calibration": f"{CALIBRATION} of zoo:scenes_calib", "evaluation": "zoo:scenes_test"}


class Photos:
    """Random smooth images of one size, made when they are asked for."""

    def __init__(self, count: int, height: int, width: int, name: str | None = None) -> None:
        self.count, self.size, self.name = count, (height, width), name

    def __iter__(self) -> Any:
        for number in range(self.count):
            draw = torch.Generator().manual_seed(number)
            coarse = torch.rand(1, 3, 12, 16, generator=draw)
            image = nn.functional.interpolate(coarse, self.size, mode="bicubic").clamp(0, 1)
            yield [image[0]] if self.name is None else {self.name: image}


def swin_t_detector() -> nn.Module:
    """torchvision's Mask R-CNN over its Swin-T and a feature pyramid, with random weights."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    from vitq.data.zoo.scene_models import SwinPyramid

    torch.manual_seed(0)
    backbone = SwinPyramid((96, 192, 384, 768), 256, head=32, depths=(2, 2, 6, 2), window=7)
    anchors = AnchorGenerator(tuple((32 * 2**n,) for n in range(4)), ((0.5, 1.0, 2.0),) * 4)
    model: nn.Module = MaskRCNN(backbone, 91, rpn_anchor_generator=anchors, box_score_thresh=0.0)
    return model.eval()


def segformer_b0() -> nn.Module:
    """transformers' default SegFormer, with 150 classes as for ADE20K and random weights."""
    import transformers

    torch.manual_seed(0)
    library: Any = transformers
    model: nn.Module = library.SegformerForSemanticSegmentation(library.SegformerConfig(num_labels=150))
    return model.eval()


def cost(what: str, recipe: str, count: int) -> dict[str, Any]:
    """One run, in this process."""
    import vitq
    from vitq.cli import work
    from vitq.cli.console import Say
    from vitq.data.native import photo_input
    from vitq.data.source import load_model

    torch.set_num_threads(1)
    data: Any
    if what == "photos":
        model, data = swin_t_detector(), Photos(count, HEIGHT, WIDTH)
    elif what == "b0":
        model, data = segformer_b0(), Photos(count, SIDE, SIDE, "pixel_values")
    else:
        model = load_model(f"zoo:scenes_{what}").model
        inputs = photo_input(model)
        assert inputs is not None
        data, _ = work.photos("zoo:scenes_calib", count, 0, inputs, torch.device("cpu"), False, Say(quiet=True))
    with torch.no_grad():
        run(model, next(iter(data)))
        start = time.perf_counter()
        for batch in data:
            run(model, batch)
        forward = time.perf_counter() - start
    before, start = resident("VmHWM"), time.perf_counter()
    vitq.quantize(model, recipe, "w4a4", data)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    size = {"photos": f"{HEIGHT} x {WIDTH}", "b0": f"{SIDE} x {SIDE}"}.get(what, "128 x 128")
    return {
        "what": what, "model": type(model).__name__, "recipe": recipe, "bits": "w4a4", "images": count, "size": size,
        "forwards": f"{seconds / forward:.1f}", "seconds": f"{seconds:.1f}", "float_seconds": f"{forward:.2f}",
        "float_peak_mb": f"{before:.0f}", "peak_mb": f"{peak:.0f}",
    }  # fmt: skip


def run(model: nn.Module, batch: Any) -> Any:
    """A batch as the model takes it."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def table(args: argparse.Namespace) -> None:
    """Every row that this commit has not measured."""
    from vitq.report.table import append_rows, read_results

    file, recipes = results_folder(args) / "detection.csv", args.recipes or RECIPES
    grid = [(m, b, r, s) for m in args.models for b in args.bits for r in recipes for s in args.seeds]
    known = {tuple(row[name] for name in (*KEY, "commit")) for row in (read_results(file) if file.exists() else [])}
    steps, about = Steps(len(grid)), provenance()
    for name, bits, recipe, seed in grid:
        if (f"zoo:scenes_{name}", recipe, bits, str(seed), about["commit"]) in known:
            steps.step(f"{name} {recipe} {bits}: there")
            continue
        row = table_row(name, recipe, bits, seed, 4 if args.quick else None)
        append_rows(file, [row | about], KEY)
        key = "box_ap" if "box_ap" in row else "miou"
        steps.step(f"{name} {recipe} {bits} seed {seed}: {key} {row[key]} of {row[f'{key}_float']}, cost {row['cost']}")


def costs(args: argparse.Namespace) -> None:
    """Each in a fresh process."""
    from vitq.report.table import append_rows

    file, recipes = results_folder(args) / "detection_cost.csv", args.recipes or ("minmax", "repq_vit")
    steps = Steps(len(args.whats) * len(recipes))
    for what in args.whats:
        count = 2 if args.quick else PHOTOS if what == "photos" else CALIBRATION
        for recipe in recipes:
            row = json.loads(fresh([__file__, "cost", "--one", what, recipe, str(count)]))
            append_rows(file, [row | provenance()], COST_KEY)
            memory = f"{row['peak_mb']} MB after {row['float_peak_mb']}"
            steps.step(f"{what} {recipe}: {row['forwards']} forwards, {memory}")


def main() -> int:
    """Entry point: rows of the table that are there already at this commit are not done again."""
    options = parser(__doc__, "example: python benchmarks/detection.py table --recipes minmax", shared=False)
    options.add_argument("part", choices=("table", "cost", "all"), nargs="?", default="all")
    options.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    options.add_argument("--recipes", nargs="+", default=None)
    options.add_argument("--bits", nargs="+", default=BITS)
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--whats", nargs="+", choices=WHATS, default=WHATS)
    options.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        what, recipe, count = args.one
        print(json.dumps(cost(what, recipe, int(count))))
        return 0
    if args.part != "cost":
        table(args)
    if args.part != "table":
        costs(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
