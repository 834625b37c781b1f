"""Tables of docs/detection.md and of the scene models in docs/zoo.md; readme.py puts them there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vitq.report.table import markdown_table, read_results

Row = dict[str, str]
FILES = Path(__file__).resolve().parent.parent / "vitq" / "data" / "zoo" / "files"
MEASURES = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}
COSTED = {
    "maskrcnn": "Mask R-CNN of scenes",
    "segformer": "SegFormer of scenes",
    "b0": "SegFormer-B0",
    "photos": "Mask R-CNN over Swin-T",
}
ORDER = ("w8a8", "w6a6", "w4a4", "w3a3")


def detection(folder: Path) -> str | None:
    """Every model, width and recipe beside float."""
    file = folder / "detection.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = sorted((r for r in rows if r["model"] == model), key=lambda r: ORDER.index(r["bits"]))
        shown = {key: name for key, name in MEASURES.items() if of_model[0].get(key)}
        table = [
            {
                "bits": row["bits"],
                "recipe": row["recipe"] + (f", trained on {row['training']}" if row.get("training") else ""),
                **{
                    column: text
                    for key, name in shown.items()
                    for column, text in (
                        (f"{name} [95 %]", _interval(row, key, ".1f")),
                        (f"{name} minus float", _interval(row, f"{key}_minus_float", "+.1f")),
                    )
                },
                "cost": f"{float(row['cost']):.1f}",
                "MB": f"{int(row['bytes']) / 1e6:.2f}",
            }
            for row in of_model
        ]
        first = of_model[0]
        floats = ", ".join(f"{name} {float(first[f'{key}_float']):.1f}" for key, name in shown.items())
        told = f"`{model}`: float {floats}. {first['images']} scenes of {first['evaluation']}"
        parts.append(f"{told}, calibrated on {first['calibration']}.\n\n{markdown_table(table, list(table[0]))}")
    told = "Cost: time of quantizing, in float forwards of the calibration images."
    return "\n\n".join([*parts, f"{told} Simulated; seed {_several(rows, 'seed')}; commit {_several(rows, 'commit')}."])


def detection_cost(folder: Path) -> str | None:
    """What calibrating detectors takes."""
    file = folder / "detection_cost.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    table = [
        {
            "model": COSTED[row["what"]],
            "size": row["size"],
            "images": row["images"],
            "recipe": f"{row['recipe']} {row['bits']}",
            "float forwards": row["forwards"],
            "peak, MB": row["peak_mb"],
            "after a float forward": row["float_peak_mb"],
        }
        for row in rows
    ]
    where = f"commit {_several(rows, 'commit')}, {rows[0]['cpu']}, {rows[0]['threads']} thread"
    how = "Scenes in batches of 8, larger images one by one; peaks are of the whole process"
    return f"{markdown_table(table, list(table[0]))}\n\n{how}; {where}."


def scene_models(folder: Path) -> str | None:
    """What tools/train_scenes.py wrote down."""
    table = []
    for file in sorted(FILES.glob("scenes_*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        reached = ", ".join(
            f"{name} {told[f'test_{key}']:.1f}" for key, name in MEASURES.items() if f"test_{key}" in told
        )
        size = file.with_suffix(".safetensors").stat().st_size
        row = {"model": f"`zoo:{told['model']}`", "file, kB": f"{size / 1000:.0f}"}
        row |= {"training scenes": f"{told['scenes']:,}", "on test scenes": f"{reached} ({told['test_scenes']})"}
        table.append(row)
    return markdown_table(table, list(table[0])) if table else None


def _interval(row: Row, key: str, form: str) -> str:
    return f"{float(row[key]):{form}} [{float(row[f'{key}_low']):{form}}, {float(row[f'{key}_high']):{form}}]"


def _several(rows: Sequence[Row], key: str) -> str:
    return ", ".join(sorted({row[key] for row in rows}))
