"""Writes the tables of README.md and docs/ from results/*.csv, and the pages of docs/methods also from docstrings.

A section whose CSV file is missing is left as it is. A recipe or modifier without a page gets one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_tables import bench, roofline
from detection_tables import detection, detection_cost, scene_models
from method_pages import INDEX, pages, skeleton
from method_tables import growth, saliency

from vitq.core.errors import VitqError
from vitq.core.files import write_text
from vitq.report.table import markdown_table, read_results, replace_section

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, str]
ELSEWHERE = ("dopq_vit_mean", "dopq_vit_log", "repq_vit_softmax_float")  # ablations: on the method's page
OFFICIAL = ("repq-vit", "erq", "uq-vit")  # peers in paired.csv that are official code
WORDS = {
    "quantize_forwards": "quantize, in float forwards of the calibration images",
    "quantize_forwards_first": "the same, first call of a process",
    "eval_ratio": "simulated forward / eager float forward",
    "eval_ratio_compiled": "the same with `torch.compile`",
    "calibration_peak_memory_ratio": "peak memory of quantize / of the float forward",
    "calibration_peak_memory_ratio_growth": "the same, less what was held before",
    "import_ratio": "`import vitq` / `import torch`",
    "artifact_bytes": "artifact, all files, MB",
}


def speed(folder: Path) -> str | None:
    """What it costs, against the limits."""
    file = folder / "speed.csv"
    if not file.exists():
        return None
    rows = [row for row in read_results(file) if row["name"] in WORDS]
    order = list(WORDS)
    rows.sort(key=lambda row: order.index(row["name"]))
    table = [
        {
            "figure": WORDS[row["name"]] + (f", batch {row['batch']}" if row["name"].startswith("eval") else ""),
            "model": " ".join(row[key] for key in ("model", "recipe", "bits") if row[key]),
            "median": amount(row, "value"),
            "range": f"{amount(row, 'low')} to {amount(row, 'high')}" if int(row["repetitions"]) > 1 else "",
            "limit": amount(row, "limit"),
            "aim": amount(row, "aim"),
            "met": row["met"],
        }
        for row in rows
    ]
    columns = ["figure", "model", "median", "range", "limit", "aim", "met"]
    return f"{markdown_table(table, columns)}\n\n{origin(rows)}"


def amount(row: Row, key: str) -> str:
    """A number short enough for a table; bytes as MB."""
    if not row[key]:
        return ""
    value = float(row[key]) / (1e6 if row["unit"] == "bytes" else 1)
    return f"{value:.2f}" if key in ("value", "low", "high") else f"{value:g}"


def accuracy(folder: Path) -> str | None:
    """How good each recipe is, over all seeds and splits, and how far from official code."""
    file, paired = folder / "accuracy.csv", folder / "paired.csv"
    if not file.exists():
        return None
    rows = [row for row in widest(read_results(file)) if row["recipe"] not in ("float", *ELSEWHERE)]
    pairs = [row for row in read_results(paired) if row["peer"] in OFFICIAL] if paired.exists() else []
    official = {name(row): row for row in widest(pairs)}
    table = []
    for row in sorted(rows, key=lambda row: (-int(row["bits"].partition("a")[2] or 0), row["bits"])):
        table.append(
            {
                "recipe": row["recipe"],
                "bits": row["bits"],
                "top-1 % [95 %]": f"{float(row['top1']):.2f} {interval(row, 'top1_low', 'top1_high', '.1f')}",
                "float": f"{float(row['top1_float']):.2f}",
                "recovery": f"{float(row['recovery']):.3f}",
                "minus official code [95 %]": difference(official.get(name(row))),
                "MB": f"{int(row['bytes']) / 1e6:.2f}",
                "seconds": f"{float(row['seconds']):.1f}",
            }
        )
    if not table:
        return None
    counts = sorted({(row["images"], row["split"], row["seed"]) for row in rows})
    over = "; ".join(f"{n} images of {split}, calibration lists {seed}" for n, split, seed in counts)
    return f"{markdown_table(table, list(table[0]))}\n\nOver {over}. {origin(rows)}"


def widest(rows: Sequence[Row]) -> list[Row]:
    """Per recipe and width, the row over the most seeds and images."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if name(row) not in best or width(row) > width(best[name(row)]):
            best[name(row)] = row
    return list(best.values())


def name(row: Row) -> tuple[str, ...]:
    """What a table has one row for."""
    return row["model"], row["recipe"], row["bits"]


def width(row: Row) -> tuple[int, int]:
    """How much a row was measured on."""
    return len(row["seed"].split()), int(row["images"])


def interval(row: Row, low: str, high: str, form: str) -> str:
    """Both ends in brackets."""
    return f"[{float(row[low]):{form}}, {float(row[high]):{form}}]"


def difference(row: Row | None) -> str:
    """Ours minus official code, with its limit."""
    if row is None:
        return ""
    told = f", {'above' if row['met'] == 'yes' else 'NOT above'} {float(row['limit']):g}" if row["limit"] else ""
    return f"{float(row['mean']):+.2f} {interval(row, 'low', 'high', '+.2f')}{told}"


def origin(rows: Sequence[Row]) -> str:
    """Commit and machine, all of them if there are several."""
    keys = ("commit", "cpu", "cores", "torch", "threads")
    seen = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    told = (f"commit {c}, {cpu}, {cores} cores, torch {torch}, {t} threads" for c, cpu, cores, torch, t in seen)
    return f"Measured at {'; '.join(told)}."


Sections = dict[str, Callable[[Path], str | None]]
SECTIONS: Sections = {"accuracy": accuracy, "speed": speed}
DOCS: dict[str, Sections] = {
    "bench.md": {"roofline": roofline, "bench": bench},
    "detection.md": {"detection": detection, "detection_cost": detection_cost},
    "zoo.md": {"scene_models": scene_models},
    "decisions/products.md": {"growth": growth},
    "onnx_models.md": {"saliency": saliency},
}


def filled(page: Path, sections: Sections, results: Path, check: bool) -> bool:
    """Put the tables of a page into it, unless it is only checked; whether they were others before."""
    new = not page.exists() and page.name != INDEX
    before = "" if new else page.read_text(encoding="utf-8")
    text = skeleton(page.stem) if new else before
    for section, make in sections.items():
        body = make(results)
        if body is None:
            print(f"no results for section {section!r} of {page.name}: it is left as it is", file=sys.stderr)
        else:
            text = replace_section(text, section, body)
    if text != before and not check:
        write_text(page, text)
    return text != before


def main() -> int:
    """Entry point; with --check, 1 if a page is not what the results say."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="example: python benchmarks/readme.py --check"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file to change")
    text = (
        "folder of the methods' pages (default: docs/methods; none with another README, whose numbers are not for them)"
    )
    parser.add_argument("--methods", type=Path, help=text)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it is not up to date")
    args = parser.parse_args()
    wanted = {args.readme: SECTIONS}
    if args.methods is not None or args.readme == ROOT / "README.md":
        wanted |= pages(args.methods or ROOT / "docs" / "methods")
    if args.readme == ROOT / "README.md":
        wanted |= {ROOT / "docs" / name: sections for name, sections in DOCS.items()}
    try:
        stale = [page for page, sections in wanted.items() if filled(page, sections, args.results, args.check)]
        if args.check and stale:
            names = ", ".join(page.name for page in stale)
            print(f"{names} is not what the results say; run benchmarks/readme.py", file=sys.stderr)
            return 1
    except (VitqError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
