"""Measures what vitq costs, as ratios to the float model in one run: results/speed.csv.

Both sides of every ratio are measured in turn, several times; `value` is the median of the ratios, `low` and `high`
are the smallest and the largest of them. CPU, all cores.

quantize_forwards              seconds of vitq.quantize, tracing included, over one float forward of the same images in
                               one batch (stock model, fused attention, inference mode, median of 5)
quantize_forwards_first        the same for the first call of a process, which also pays for torch's own lazy imports
eval_ratio                     forward of the frozen model over the float eager forward (no_grad)
eval_ratio_compiled            the same with torch.compile, which multiplies the codes of linear layers (integer) where
                               this processor can; compile_seconds is its first call
calibration_peak_memory_ratio  peak memory of a fresh process that quantizes over that of one that runs the float
                               forward in one batch; `_growth`: less what each held before
import_ratio                   `import vitq` over `import torch`, fresh processes
artifact_bytes                 all files of the artifact, and model.safetensors alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from _common import (
    IMAGES,
    MODEL,
    Pair,
    Shared,
    Steps,
    float_forward,
    fresh,
    medians,
    parser,
    predict,
    provenance,
    resident,
    results_folder,
    text,
    timed,
    use_all_cores,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitq
from vitq.data.source import LoadedModel, load_model
from vitq.report.table import append_rows

SMALL = "deit_small_patch16_224"
KEY = ("name", "model", "recipe", "bits", "batch")
FIGURES = ("quantize", "eval", "memory", "import", "artifact")
MAIN = "repq_vit"
BITS = "w4a4"
AIM = 4
CASES = ((MODEL, MAIN, 12), (SMALL, MAIN, 8), (MODEL, "minmax", None), (MODEL, "percentile", None))


@dataclass
class Bench:
    """One run: what it measures on, and the file that it writes."""

    shared: Shared
    file: Path
    steps: Steps
    quick: bool
    repetitions: int

    @cached_property
    def tiny(self) -> LoadedModel:
        return self.shared.model()

    @cached_property
    def small(self) -> LoadedModel:
        torch.manual_seed(0)
        return load_model(SMALL, pretrained=False)

    @cached_property
    def images(self) -> Tensor:
        count = 4 if self.quick else IMAGES
        return self.shared.calibration(0).subset(range(count)).tensor(self.tiny.preprocess)

    def write(self, name: str, values: Sequence[float], limit: float | None = None, **more: Any) -> None:
        """One figure: median and spread, and whether it meets its limit."""
        value, low, high = statistics.median(values), min(values), max(values)
        met = "" if limit is None else "yes" if value <= limit else "no"
        row: dict[str, Any] = {"name": name, "model": "", "recipe": "", "bits": "", "batch": ""}
        row |= {"value": text(value), "low": text(low), "high": text(high), "unit": "ratio"}
        row |= {"limit": limit, "aim": None, "met": met, "seconds": "", "reference_seconds": "", "note": ""}
        row |= {"kind": "simulated", "seed": 0, "repetitions": len(values)} | self.measured_on(more.get("model"))
        append_rows(self.file, [row | more | provenance()], KEY)
        what = " ".join(str(more[key]) for key in ("model", "recipe", "batch") if key in more)
        told = f", limit {limit:g}: {'met' if met == 'yes' else 'NOT met'}" if limit else ""
        self.steps.say(f"{name} {what}: {text(value)} [{text(low)} .. {text(high)}]{told}")

    def write_ratio(self, name: str, pairs: Sequence[Pair], limit: float | None, **more: Any) -> None:
        """A figure that is ours over the reference, pair by pair."""
        self.write(name, [ours / reference for ours, reference in pairs], limit, **more)

    def measured_on(self, model: object) -> dict[str, Any]:
        """Which weights and images."""
        if not model:
            return {"weights": "", "weights_sha256": "", "calibration": "", "evaluation": ""}
        weights = self.shared.weights() if model == MODEL else {"weights": "random, seed 0", "weights_sha256": ""}
        return weights | {"calibration": f"{len(self.images)} of calibration_seed0.txt", "evaluation": ""}

    def quantize(self, loaded: LoadedModel, recipe: str = MAIN) -> vitq.QuantModel:
        return vitq.quantize(loaded.model, recipe, BITS, self.images)

    def quantize_forwards(self) -> None:
        """Calibration in float forwards; the very first call is kept apart."""
        for name, recipe, limit in CASES:
            loaded = self.tiny if name == MODEL else self.small
            more: dict[str, Any] = {"model": name, "recipe": recipe, "bits": BITS, "batch": len(self.images)}
            more["aim"] = AIM if recipe == MAIN else None
            pairs = []
            for _ in range(self.repetitions + 1):
                seconds = timed(partial(self.quantize, loaded, recipe))
                pairs.append((seconds, float_forward(loaded.model, self.images)))
                self.steps.step(f"{name} {recipe} {seconds:.2f} s = {seconds / pairs[-1][1]:.1f} float forwards")
            if (name, recipe) == (MODEL, MAIN):
                self.write_ratio("quantize_forwards_first", pairs[:1], limit, **more, **medians(pairs[:1]))
            self.write_ratio("quantize_forwards", pairs[1:], limit, **more, **medians(pairs[1:]))

    def evaluation(self) -> None:
        """Simulated forwards, eager and compiled, in turn with float ones."""
        qmodel, model = self.quantize(self.tiny), self.tiny.model
        compiled = cast(nn.Module, torch.compile(qmodel))
        pool = torch.cat([self.images, self.images.flip(-1)])
        for size in (2, 3) if self.quick else (32, 50):
            x = pool[:size]
            more: dict[str, Any] = {"model": MODEL, "recipe": MAIN, "bits": BITS, "batch": size}
            rivals: dict[str, nn.Module] = {"eval_ratio": qmodel}
            if size in (2, 32):  # compiled once, for one batch size
                self.write("compile_seconds", [timed(partial(predict, compiled, x))], unit="s", **more)
                rivals["eval_ratio_compiled"] = compiled
            expected = predict(qmodel, x)
            same = {name: int((predict(rival, x) == expected).sum()) for name, rival in rivals.items()}
            predict(model, x)
            pairs: dict[str, list[Pair]] = {name: [] for name in rivals}
            for _ in range(2 * self.repetitions):
                base = timed(partial(predict, model, x))
                for name, rival in rivals.items():
                    pairs[name].append((timed(partial(predict, rival, x)), base))
            for name, found in pairs.items():
                note = f"predicts as uncompiled on {same[name]} of {size}" if rivals[name] is compiled else ""
                limit = 1.0 if rivals[name] is compiled else 2.0
                kind = "linear layers integer" if rivals[name] is compiled else "simulated"
                self.write_ratio(name, found, limit, note=note, kind=kind, **more, **medians(found))
            self.steps.step(f"forwards at batch {size}")

    def memory(self) -> None:
        """Peaks of fresh processes; the images are decoded here, so that decoding is in neither."""
        whole, growth = [], []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.safetensors"
            save_file({"images": self.images}, file)
            for _ in range(1 if self.quick else 3):
                peaks = []
                for what in ("quantize", "forward"):
                    words = [__file__, "--child", what, str(file), "--shared", str(self.shared.path)]
                    peaks.append(json.loads(fresh(words)))
                    self.steps.step(f"peak of {what}: {peaks[-1]['peak']:.0f} MiB, before {peaks[-1]['before']:.0f}")
                whole.append((peaks[0]["peak"], peaks[1]["peak"]))
                growth.append((peaks[0]["peak"] - peaks[0]["before"], peaks[1]["peak"] - peaks[1]["before"]))
        for suffix, pairs in (("", whole), ("_growth", growth)):
            ours, reference = (statistics.median(side) for side in zip(*pairs, strict=True))
            more: dict[str, Any] = {"model": MODEL, "recipe": MAIN, "bits": BITS, "batch": len(self.images)}
            note = f"{ours:.0f} MiB over {reference:.0f} MiB"
            self.write_ratio(f"calibration_peak_memory_ratio{suffix}", pairs, 1.5, note=note, **more)

    def imports(self) -> None:
        """Import times of fresh processes."""
        goes = 2 if self.quick else 8
        pairs = [(seconds_to_import("vitq"), seconds_to_import("torch")) for _ in range(goes)][1:]  # first: disk cache
        self.write_ratio("import_ratio", pairs, 1.5, kind="", seed="", **medians(pairs))
        self.steps.step("imports")

    def artifact(self) -> None:
        """Bytes of the artifact with all that the command line records in it."""
        qmodel, chosen = self.quantize(self.tiny), self.shared.calibration(0).subset(range(len(self.images)))
        assert self.tiny.preprocess is not None
        qmodel.source, qmodel.preprocess = self.tiny.source, self.tiny.preprocess.to_dict()
        qmodel.provenance = {"calibration": "calib", "calibration_images": len(chosen), "seed": 0}
        qmodel.provenance |= {"calibration_ids": list(chosen.ids), "calibration_sha256": chosen.digests()}
        with tempfile.TemporaryDirectory() as folder:
            size = int(vitq.save(qmodel, Path(folder) / "out")["bytes"])
            tensors = (Path(folder) / "out" / "model.safetensors").stat().st_size
        more: dict[str, Any] = {"model": MODEL, "recipe": MAIN, "bits": BITS, "unit": "bytes"}
        self.write("artifact_bytes", [size], 3.6e6, **more)
        self.write("artifact_bytes_tensors", [tensors], **more, note="model.safetensors alone")
        self.steps.step("artifact")


def seconds_to_import(name: str) -> float:
    """In a fresh process, without its start."""
    return float(fresh(["-c", f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"]))


def child(what: str, file: str, shared: Shared) -> None:
    """In a fresh process: load, do one thing, print the memory it took."""
    use_all_cores()
    model = shared.model().model
    images = load_file(file)["images"]
    before = resident("VmRSS")
    if what == "quantize":
        vitq.quantize(model, MAIN, BITS, images)
    else:
        with torch.inference_mode():
            model(images)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def main() -> int:
    """Entry point; 0 also where a limit is not met, which is for the reader to see."""
    args_parser = parser(__doc__, "example: python benchmarks/speed.py --only quantize memory --repetitions 7")
    args_parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="which figures")
    args_parser.add_argument("--repetitions", type=int, default=5, help="times that each pair is measured (default 5)")
    args_parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = args_parser.parse_args()
    shared = Shared(args.shared)
    if args.child:
        child(args.child[0], args.child[1], shared)
        return 0
    if args.repetitions < 1:
        args_parser.error("--repetitions must be at least 1")
    only = list(args.only)
    if shared.missing:
        print(f"skipped: all but import_ratio needs weights and photos: {shared.missing}", file=sys.stderr)
        only = [name for name in only if name == "import"]
    repetitions = 1 if args.quick else args.repetitions
    goes = dict(zip(FIGURES, (4 * (repetitions + 1), 2, 2 if args.quick else 6, 1, 1), strict=True))
    provenance()
    file = results_folder(args) / "speed.csv"
    bench = Bench(shared, file, Steps(sum(goes[name] for name in only)), args.quick, repetitions)
    work = (bench.quantize_forwards, bench.evaluation, bench.memory, bench.imports, bench.artifact)
    for name, measure in zip(FIGURES, work, strict=True):
        if name in only:
            measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
