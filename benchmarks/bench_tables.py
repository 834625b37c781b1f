"""Tables of docs/bench.md; readme.py puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitq.report.table import markdown_table, read_results

Row = dict[str, str]
WHERE = ("commit", "cpu", "threads", "torch", "load_before")


def bench(folder: Path) -> str | None:
    """Every deployment of every artifact that was measured."""
    file = folder / "bench.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    parts = []
    for artifact in dict.fromkeys((row["model"], row["recipe"], row["bits"]) for row in rows):
        own = [row for row in rows if (row["model"], row["recipe"], row["bits"]) == artifact]
        measured = [row for row in own if row["batch"]]
        table = [_row(name, [row for row in measured if row["name"] == name]) for name in _names(measured)]
        missing = "; ".join(f"`{row['name']}` {row['verdict']}" for row in own if not row["batch"])
        images = max((row["images"] for row in measured), key=int)
        told = f"Top-1 on {images} photos of `report`." + (f" Not here: {missing}." if missing else "")
        parts.append(f"**{' '.join(artifact)}.** {told}\n\n{markdown_table(table, list(table[0]))}\n\n{_where(own)}")
    return "\n\n".join(parts)


def roofline(folder: Path) -> str | None:
    """The quickest product of each kind of numbers."""
    file = folder / "roofline.csv"
    if not file.exists():
        return None
    rows = read_results(file)
    table = [
        {
            "numbers": row["numbers"],
            "billions of operations a second": row["gops"],
            "median": row["median_gops"],
            "product": f"{row['kernel']}, ({row['m']}, {row['k']}) by ({row['k']}, {row['n']})",
        }
        for row in rows
        if row["best"]
    ]
    return f"{markdown_table(table, list(table[0]))}\n\n{_where(rows)}"


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _row(name: str, rows: Sequence[Row]) -> Row:
    first = rows[0]
    cells = {"deployment": f"`{name}`", "kind": first["kind"]}
    for row in rows:
        cells[f"{row['clock']} ms, batch {row['batch']}"] = f"{float(row['ms']):.2f}"
        cells[f"x torch, batch {row['batch']}"] = _times(row, "speedup")
        cells[f"roof, batch {row['batch']}"] = f"{100 * float(row['of_roofline']):.0f} %" if row["of_roofline"] else ""
    cells |= {"load s": f"{float(first['load_seconds']):.1f}", "own MiB": f"{float(first['own_mb']):.0f}"}
    cells |= {"MB": f"{int(first['bytes']) / 1e6:.1f}" if first["bytes"] else ""}
    cells["top-1 % [95 %]"] = (
        f"{float(first['top1']):.1f} [{float(first['top1_low']):.1f}, {float(first['top1_high']):.1f}]"
    )
    return cells


def _times(row: Row, key: str) -> str:
    """A ratio with its interval and verdict; none of what is simulated."""
    if row["kind"] == "simulated":
        return "simulated"
    if not row[key]:
        return ""
    ratio, low, high = (float(row[name]) for name in (key, f"{key}_low", f"{key}_high"))
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}] {row['verdict']}"


def _where(rows: Sequence[Row]) -> str:
    seen = dict.fromkeys(tuple(row[key] for key in WHERE) for row in rows)
    told = (f"commit {c}, {cpu}, threads: {t}, torch {v}, load {load} before" for c, cpu, t, v, load in seen)
    return f"Measured at {'; '.join(told)}."
