"""Runs every benchmark, one after the other, and then makes the README's tables from the results.

Each writes as it goes: what an interrupted run has measured is kept. What needs ../shared (weights, photos, stored
predictions) is skipped where that is absent, and the output says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _common import ROOT, Shared, clock, parser, results_folder

ON_PHOTOS = (
    "accuracy.py",
    "softmax_formats.py",
    "rounding.py",
    "cifar10_probe.py",
    "cifar10_tuned.py",
    "ablation.py",
    "objectives.py",
    "growth.py",
    "export.py",
    "bench.py",
    "training.py",
    "training_step.py",
)


def plan(args: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """The scripts to run, with their arguments."""
    shared = Shared(args.shared.resolve())
    quick = ["--quick"] if args.quick else []
    common = ["--shared", str(shared.path), *quick]
    if out != ROOT / "results":  # such numbers are not for the pages
        common += ["--out", str(out)]
    scripts = {"speed.py": common, "calibration_memory.py": [*quick, "--out", str(out)], "zoo_statistics.py": common}
    scripts["detection.py"] = [*quick, "--out", str(out)]
    scripts["roofline.py"] = [*quick, "--out", str(out)]
    if shared.missing:
        skip(", ".join(ON_PHOTOS), f"they need weights, photos and stored predictions: {shared.missing}")
    else:
        scripts |= dict.fromkeys(ON_PHOTOS, common)
        scripts["accuracy.py"] = [*common, *(["--force"] if args.force else [])]
    if args.official is None:
        skip("repq_parity.py", "it needs the classification folder of a RepQ-ViT checkout: --official PATH")
    elif shared.missing:
        skip("repq_parity.py", shared.missing)
    else:
        words = ["--official", str(args.official.resolve()), "--bits", "w4a4", "--seed", "0"]
        few = ["--images", "4"] if args.quick else []
        scripts["repq_parity.py"] = [*words, *few, "--shared", str(shared.path), "--out", str(out / "repq_parity.csv")]
    return scripts


def skip(script: str, why: str) -> None:
    """Say what is not measured."""
    print(f"skipped {script}: {why}", file=sys.stderr, flush=True)


def main() -> int:
    """Entry point; 1 if a script failed."""
    options = parser(__doc__, "example: python benchmarks/run.py --official RepQ-ViT/classification")
    options.add_argument("--official", type=Path, help="classification folder of a checkout of the official RepQ-ViT")
    options.add_argument("--force", action="store_true", help="measure accuracy again where this commit has it already")
    args = options.parse_args()
    out = results_folder(args).resolve()
    out.mkdir(parents=True, exist_ok=True)
    scripts = plan(args, out)
    readme = ROOT / "README.md"
    if out != ROOT / "results":  # such numbers are not for the README
        readme = out / "README.md"
        shutil.copyfile(ROOT / "README.md", readme)
    scripts["readme.py"] = ["--results", str(out), "--readme", str(readme)]
    failed = []
    for script, words in scripts.items():
        print(f"== {script}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *words], cwd=ROOT).returncode
        print(f"== {script}: {clock(time.perf_counter() - start)}, exit code {code}", file=sys.stderr, flush=True)
        if code:
            failed.append(script)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
