"""DeiT-Tiny with real weights where it runs, by `vitq bench`: results/bench.csv, a row for each deployment and batch.

Quantized on 32 photos of calib, which the peers are calibrated on, too; accuracy on photos of report. A row says

    kind                 float, integer, packed (whole numbers in the file, products in float) or simulated
    ms, low, high        of a call: median over rounds and quartiles, on `clock`: with one thread, the processor's
    wall_ms, cpu_ms      both clocks; the first is larger where the machine did other things as well
    speedup, ...         of torch's eager float32, paired by rounds, with its 95 % interval; `verdict` says it plainly
    quickest, ...        the same beside the quickest other float32
    of_roofline          operations of matrix products a second over the machine's best (int8, bfloat16, float32)
    load_seconds         fresh process, packages imported, to the first result; own_mb: memory beyond that, at most
    top1, agreement      of `images` photos; agreement with torch's float model

Deployments that could not run have a row, too, with the reason in `verdict`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import IMAGES, MODEL, ROOT, Shared, Steps, parser, provenance, results_folder

import vitq
from vitq.cli.work import provenance as calibrated_on
from vitq.report.table import append_rows

KEY = ("model", "recipe", "bits", "name", "batch", "threads")


def make_artifact(shared: Shared, recipe: str, bits: str, folder: Path) -> Path:
    """DeiT-Tiny, quantized, with the record of what it was calibrated on."""
    loaded, chosen = shared.model(), shared.calibration(0).subset(range(IMAGES))
    assert loaded.preprocess is not None
    qmodel = vitq.quantize(loaded.model, recipe, bits, chosen.tensor(loaded.preprocess))
    qmodel.source, qmodel.preprocess = loaded.source, loaded.preprocess.to_dict()
    qmodel.provenance = calibrated_on(chosen, "calib", 0)
    vitq.save(qmodel, folder / "artifact")
    return folder / "artifact"


def measure(shared: Shared, artifact: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """What `vitq bench` says."""
    told = folder / "bench.json"
    command = [sys.executable, "-m", "vitq.cli", "bench", str(artifact), "--checkpoint", str(shared.checkpoint)]
    command += ["--data", str(shared.sample / "calib"), "--eval", str(shared.sample / "report"), "--json", str(told)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    subprocess.run([*command, *words], check=True, env=env)
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each deployment and batch size."""
    rows = []
    for deployment in found["deployments"]:
        accuracy = deployment["accuracy"] or {}
        low, high = accuracy.get("top1_interval") or ("", "")
        for latency in deployment["latency"]:
            quarter, three_quarters = latency["quartiles_ms"]
            row = {"name": deployment["name"], "batch": latency["batch"], "kind": deployment["kind"]}
            row |= {"numbers": deployment["numbers"], "clock": latency["clock"], "ms": latency["median_ms"]}
            row |= {"low": quarter, "high": three_quarters, "wall_ms": latency["wall_ms"], "cpu_ms": latency["cpu_ms"]}
            row |= {"images_per_second": latency["images_per_second"], "of_roofline": latency["of_roofline"]}
            row |= compared("speedup", latency["speedup"]) | {"quickest": latency["quickest_float"]}
            row |= compared("speedup_quickest", latency["speedup_over_quickest_float"])
            row |= {key: deployment[key] for key in ("load_seconds", "peak_mb", "own_mb", "bytes", "whole_products")}
            row |= {"top1": accuracy.get("top1"), "top1_low": low, "top1_high": high}
            row |= {"agreement": accuracy.get("agreement"), "images": accuracy.get("images")}
            simulated = deployment["kind"] == "simulated"
            row["verdict"] = deployment["verdict"] if simulated else (latency["speedup"] or {}).get("verdict", "")
            rows.append(row | {"rounds": latency["rounds"], "calls": latency["calls"]})
    for name, why in found["not_run"].items():
        rows.append({"name": name, "batch": "", "verdict": f"not measured: {why}"})
    return rows


def compared(name: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """A ratio with its interval, in columns."""
    found = found or {}
    return {name: found.get("ratio"), f"{name}_low": found.get("low"), f"{name}_high": found.get("high")}


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: OMP_NUM_THREADS=1 python benchmarks/bench.py --recipe minmax --bits w8a8")
    options.add_argument("--recipe", default="minmax")
    options.add_argument("--bits", default="w8a8")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--limit", type=int, default=300, help="photos to measure accuracy on (default 300)")
    options.add_argument("--deployments", default="all")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    where, steps = provenance(), Steps(2)
    words = ["--deployments", args.deployments, "--rounds", str(5 if args.quick else args.rounds)]
    words += ["--limit", str(16 if args.quick else args.limit), "--threads", str(where["threads"])]
    words += ["--seconds", "0.01"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        artifact = make_artifact(shared, args.recipe, args.bits, Path(folder))
        steps.step(f"{args.recipe} {args.bits} is made")
        found = measure(shared, artifact, words, Path(folder))
    name = {"model": MODEL, "recipe": args.recipe, "bits": args.bits}
    after = {"load_after": found["machine"]["load_after"]}
    rows = [name | row | shared.weights() | where | after for row in rows_of(found)]
    append_rows(results_folder(args) / "bench.csv", rows, KEY)
    steps.step(f"{len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
