"""Do the embedded models show what real ViTs show? Writes results/zoo_statistics.csv and the tables of docs/zoo.md.

Two properties of real ViTs make them hard to quantize. Attention probabilities fall like a power of their rank, with
most of them far below the largest; and a few channels are much wider than the others after LayerNorm. Both are
measured for the embedded models and, where ../shared is there, for DeiT-Tiny with real weights.

For each softmax, over all its rows (a row: one query of one head of one image):
  below_tenth, below_hundredth   share of the probabilities below 1/10 and 1/100 of the largest of their row
  effective                      exp(entropy) / tokens, mean over rows; 1 is uniform attention
  slope, power_r2                straight line through log probability over log rank, of the mean sorted row
  exponential_r2                 the same over rank itself: the better of the two names the law
For each LayerNorm: range_ratio, the largest channel range (maximum minus minimum) over the median one.
For the embedded models also float top-1 on all embedded test images, with the 95 % interval.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import MODEL, ROOT, Shared, parser, provenance, results_folder, top
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitq.core.files import write_text
from vitq.data.images import ImageSet, open_images
from vitq.data.source import LoadedModel, load_model
from vitq.evaluate.classify import evaluate_classifier
from vitq.report.table import append_rows, markdown_table, read_results, replace_section

Row = dict[str, str]
IMAGES = 64
BATCH = 16
KEY = ("model", "kind", "place")
ZOO = ("fashion_vit", "fashion_swin")
FILES = ROOT / "vitq" / "data" / "zoo" / "files"
RULED_OUT = 1e-30  # of the largest: only Swin's mask makes probabilities this small
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
ATTENTION = ("below_tenth", "below_hundredth", "effective", "slope", "power_r2", "exponential_r2")


class Softmaxes(TorchFunctionMode):
    """Hands the result of every softmax of a forward, and its number, to look."""

    def __init__(self, look: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.look, self.seen = look, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAX:
            self.look(self.seen, result)
            self.seen += 1
        return result


class Attention:
    """Sums over the rows of one softmax."""

    def __init__(self) -> None:
        self.rows = self.entries = 0
        self.tenth = self.hundredth = self.effective = 0.0
        self.log_sorted = torch.zeros(0)
        self.whole = 0  # rows without masked entries: those that are sorted

    def add(self, probabilities: Tensor) -> None:
        """Probabilities (..., tokens)."""
        rows = probabilities.detach().flatten(0, -2).double()
        relative = rows / rows.amax(1, keepdim=True)
        allowed = relative > RULED_OUT
        self.rows += len(rows)
        self.entries += int(allowed.sum())
        self.tenth += int((allowed & (relative < 1e-1)).sum())
        self.hundredth += int((allowed & (relative < 1e-2)).sum())
        entropy = -(rows * rows.clamp_min(1e-300).log()).sum(1)
        self.effective += float((entropy.exp() / allowed.sum(1)).sum())
        whole = rows[allowed.all(1)]
        logs = whole.sort(1, descending=True).values.log().sum(0)
        self.log_sorted = logs if not self.whole else self.log_sorted + logs
        self.whole += len(whole)

    def row(self) -> dict[str, object]:
        mean = (self.log_sorted / self.whole).numpy()
        rank = np.arange(1, len(mean) + 1)
        slope, power = line(np.log(rank), mean)
        _, exponential = line(rank, mean)
        values = {
            "below_tenth": self.tenth / self.entries,
            "below_hundredth": self.hundredth / self.entries,
            "effective": self.effective / self.rows,
            "slope": slope,
            "power_r2": power,
            "exponential_r2": exponential,
        }
        return {"tokens": len(mean)} | {key: f"{value:.4f}" for key, value in values.items()}


def line(x: Any, y: Any) -> tuple[float, float]:
    """Slope and R² of the straight line through the points by least squares."""
    slope, offset = np.polyfit(x, y, 1)
    rest = y - slope * x - offset
    return float(slope), 1 - float((rest**2).sum() / ((y - y.mean()) ** 2).sum())


def measure(name: str, loaded: LoadedModel, images: ImageSet) -> list[dict[str, object]]:
    """One row per softmax and per LayerNorm of a model."""
    model = loaded.model
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    attention: dict[int, Attention] = {}

    def look(place: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            channels = output.detach().flatten(0, -2)
            low[place] = torch.minimum(low.get(place, channels.amin(0)), channels.amin(0))
            high[place] = torch.maximum(high.get(place, channels.amax(0)), channels.amax(0))

        return hook

    for place, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # so that there is a softmax to look at
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(look(place))
    for batch in images.batches(loaded.preprocess, BATCH):
        with torch.no_grad(), Softmaxes(lambda number, p: attention.setdefault(number, Attention()).add(p)):
            model(batch.images)
    common = {"model": name, "images": len(images)}
    rows = [
        {**common, "kind": "attention", "place": f"softmax {number}", **found.row()}
        for number, found in attention.items()
    ]
    for place in low:
        ranges = high[place] - low[place]
        ratio = float(ranges.max() / ranges.median())
        rows.append({**common, "kind": "layernorm", "place": place, "range_ratio": f"{ratio:.4f}"})
    return rows


def accuracy(name: str, loaded: LoadedModel, quick: bool) -> dict[str, object]:
    """Top-1 of the float model on the embedded test images."""
    images = open_images("zoo:fashion_test")
    images = images.sample(100, 0) if quick else images
    found = evaluate_classifier(loaded.model, images.batches(loaded.preprocess, 100))
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    common = {"model": name, "images": len(images), "kind": "accuracy", "place": "", "parameters": parameters}
    return common | {key: value for key, value in top(found).items() if key != "top5"}


def training_table(rows: list[Row]) -> str:
    """What tools/train_zoo.py wrote down, and accuracy as measured here."""
    table = []
    for row in rows:
        if row["kind"] != "accuracy":
            continue
        file = FILES / f"{row['model']}.safetensors"
        record = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        table.append(
            {
                "model": f"`zoo:{row['model']}`",
                "parameters": f"{int(row['parameters']):,}",
                "file, kB": f"{file.stat().st_size / 1e3:.0f}",
                "epochs": str(record["epochs"]),
                "validation top-1 %": f"{record['valid_top1']:.2f}",
                "test top-1 % [95 %]": f"{float(row['top1']):.2f} [{float(row['top1_low']):.1f}, "
                f"{float(row['top1_high']):.1f}]",
                "test images": row["images"],
            }
        )
    return markdown_table(table, list(table[0]))


def attention_table(rows: list[Row]) -> str:
    """Medians over the softmaxes of each model."""
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model and row["kind"] == "attention"]
        middle = {key: float(np.median([float(row[key]) for row in found])) for key in ATTENTION}
        power = sum(float(row["power_r2"]) > float(row["exponential_r2"]) for row in found)
        table.append(
            {
                "model": model,
                "tokens": ", ".join(dict.fromkeys(row["tokens"] for row in found)),
                "below 1/10": f"{100 * middle['below_tenth']:.1f} %",
                "below 1/100": f"{100 * middle['below_hundredth']:.1f} %",
                "effective tokens": f"{100 * middle['effective']:.0f} %",
                "log-log slope": f"{middle['slope']:.2f}",
                "R² power": f"{middle['power_r2']:.3f}",
                "R² exponential": f"{middle['exponential_r2']:.3f}",
                "power fits better in": f"{power} of {len(found)}",
            }
        )
    return markdown_table(table, list(table[0]))


def norm_table(rows: list[Row]) -> str:
    """Ratio of the widest to the median channel: over the LayerNorms of each model."""
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model and row["kind"] == "layernorm"]
        ratios = sorted((float(row["range_ratio"]), row["place"]) for row in found)
        table.append(
            {
                "model": model,
                "LayerNorms": str(len(ratios)),
                "smallest": f"{ratios[0][0]:.2f}",
                "median": f"{float(np.median([ratio for ratio, _ in ratios])):.2f}",
                "largest": f"{ratios[-1][0]:.2f}",
                "where": f"`{ratios[-1][1]}`",
            }
        )
    return markdown_table(table, list(table[0]))


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/zoo_statistics.py")
    options.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md", help="the page whose tables are made")
    args = options.parse_args()
    out, shared = results_folder(args), Shared(args.shared.resolve())
    count = 8 if args.quick else IMAGES
    made = {name: (load_model(f"zoo:{name}"), open_images("zoo:fashion_calib")) for name in ZOO}
    if shared.checkpoint.is_file() and shared.sample.is_dir():
        made[MODEL] = (shared.model(), open_images(shared.sample / "calib", labels="none"))
    else:
        print(f"{shared.path} has no weights or photos: {MODEL} is left out", file=sys.stderr)
    for name, (loaded, images) in made.items():
        print(name, file=sys.stderr, flush=True)
        rows = [accuracy(name, loaded, args.quick)] if name in ZOO else []
        rows += measure(name, loaded, images.sample(min(count, len(images)), 0))
        append_rows(out / "zoo_statistics.csv", [row | provenance() for row in rows], KEY)
    if args.quick or args.out is not None:  # such numbers are not for the page
        return 0
    stored = read_results(out / "zoo_statistics.csv")
    text = args.page.read_text(encoding="utf-8")
    for section, table in (("training", training_table), ("attention", attention_table), ("norms", norm_table)):
        text = replace_section(text, f"zoo_{section}", table(stored))
    write_text(args.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
