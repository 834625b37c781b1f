"""Pages of docs/methods, one for every recipe and modifier: its docstring, its rows of results/leaderboard.csv, what
papers report.

What stands outside of the markers is written by hand, and stays.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from method_tables import PAGES

from vitq.core.recipe import MODIFIERS, RECIPES, Rule
from vitq.evaluate.leaderboard import FLOAT, KEY, Row, Spread, Standing, standings
from vitq.report.board import Board
from vitq.report.published import Published, of_method
from vitq.report.table import markdown_table

Sections = dict[str, Callable[[Path], str | None]]
BITS = 4  # of the formats that are shown
COLUMNS = {
    "vit_small_patch16_224": "ViT-S",
    "vit_base_patch16_224": "ViT-B",
    "deit_tiny_patch16_224": "DeiT-T",
    "deit_small_patch16_224": "DeiT-S",
    "deit_base_patch16_224": "DeiT-B",
    "swin_tiny_patch4_window7_224": "Swin-T",
    "swin_small_patch4_window7_224": "Swin-S",
    "swin_base_patch4_window7_224": "Swin-B",
}
SKELETON = """# {title}

<!-- vitq:method -->
<!-- /vitq:method -->

## Measured

<!-- vitq:leaderboard -->
<!-- /vitq:leaderboard -->

## Published

<!-- vitq:published -->
<!-- /vitq:published -->
"""
INDEX = "README.md"


def pages(folder: Path) -> dict[Path, Sections]:
    """Every page with its sections."""
    own: dict[Path, Sections] = {folder / INDEX: {"methods": methods}}
    for name in (*RECIPES, *MODIFIERS):
        sections: Sections = {"method": partial(method, name), "leaderboard": partial(leaderboard, name)}
        sections |= {"published": partial(published, name)}
        own[folder / f"{name}.md"] = sections | PAGES.get(f"{name}.md", {})
    return own


def skeleton(name: str) -> str:
    """An empty page."""
    return SKELETON.format(title=_docstring(name).partition(":")[0].partition("\n")[0])


def method(name: str, _: Path) -> str:
    """What the docstring says, and what the method is made of."""
    fn, built = _registered(name)
    kind = "recipe" if name in RECIPES else f"modifier, slot `{built.slot}`"
    parts = [f"`{name}` · {kind} · {built.paper}", _markdown(_docstring(name))]
    options = [f"`{p.name}={p.default}`" for p in list(inspect.signature(fn).parameters.values())[2:]]
    if options:
        parts.append(f"Options: {', '.join(options)}.")
    if built.formats:
        rows = [
            {"where": _where(rule), f"format at {BITS} bits": str(rule.format or "float")} for rule in built.formats
        ]
        parts.append(markdown_table(rows, list(rows[0])))
    passes = "\n".join(f"{number}. `{step}`" for number, step in enumerate(built.passes, 1))
    return "\n\n".join([*parts, f"Passes:\n\n{passes}"] if passes else parts)


def leaderboard(name: str, results: Path) -> str:
    """Its rows, for a modifier each minus the same without it."""
    table, sources = [], []
    for model, rows, board in _boards(results):
        mine = sorted({_label(row) for row in rows if name in row["recipe"].split("+")})
        for label in mine:
            base = _without(name, label) if name in MODIFIERS else FLOAT
            chosen = [row for row in rows if row["recipe"] == FLOAT or _label(row) in (label, base)]
            found = [s for s in standings(chosen, board.correct, base) if s.label == label]
            table += [(s.bits, _shown(model, s, "the same without" if name in MODIFIERS else FLOAT)) for s in found]
            sources += [row for row in chosen if _label(row) == label]
    if not table:
        return "Not on the leaderboard yet: `vitq leaderboard` writes `results/leaderboard.csv`."
    order = sorted(table, key=lambda each: [-int(width) for width in re.findall(r"\d+", each[0])])
    shown = [row for _, row in order]
    columns = [column for column in shown[0] if any(row[column] for row in shown)]
    return f"{markdown_table(shown, columns)}\n\n{_origin(sources)}"


def published(name: str, _: Path) -> str:
    """What the paper, its official code and others report."""
    rows = of_method(name)
    if not rows:
        return "No published accuracy of these models is known."
    groups: dict[tuple[str, ...], dict[str, Published]] = {}
    for row in rows:
        groups.setdefault((row.bits, row.training, row.kind, row.source, row.note), {})[row.model] = row
    present = [model for model in COLUMNS if any(model in found for found in groups.values())]
    table = []
    for (bits, training, kind, source, note), found in groups.items():
        cells = {COLUMNS[m]: f"{r.top1:.2f} ({r.recovery:.3f})" if (r := found.get(m)) else "" for m in present}
        table.append(
            {"bits": bits, **cells, "weights": training, "from": "; ".join(filter(None, (kind, source, note)))}
        )
    return (
        f"{markdown_table(table, list(table[0]))}\n\nTop-1 in percent (and recovery). Papers use the 50,000 validation "
        "images, and float models differ: compare recoveries. `calibration`: weights are rounded, or changed in closed "
        "form; `retrained`: they or their rounding are learned."
    )


def methods(results: Path) -> str:
    """Every method in a row, with its recovery on the leaderboard."""
    best: dict[tuple[str, str, str], str] = {}
    for model, rows, board in _boards(results):
        for s in standings(rows, board.correct):
            if not s.options and s.recovery is not None:
                best[model, s.recipe, s.bits] = f"{s.recovery:.3f}"
    measured = list(dict.fromkeys((model, bits) for model, _, bits in best))
    table = []
    for name in (*RECIPES, *MODIFIERS):
        fn, built = _registered(name)
        row = {"": f"[`{name}`]({name}.md)", "kind": "recipe" if name in RECIPES else "modifier", "paper": built.paper}
        row |= {f"{model} {bits}": best.get((model, name, bits), "") for model, bits in measured}
        table.append(row | {"what": _summary(fn)})
    return markdown_table(table, list(table[0]))


@cache
def _boards(results: Path) -> list[tuple[str, list[Row], Board]]:
    """The leaderboard's rows of each model that its float model was measured for."""
    if not (results / "leaderboard.csv").exists():
        return []
    board = Board(results / "leaderboard.csv", KEY)
    models = dict.fromkeys(row["model"] for row in board.rows.values() if row["recipe"] == FLOAT)
    return [(model, [row for row in board.rows.values() if row["model"] == model], board) for model in models]


def _shown(model: str, s: Standing, minus: str) -> dict[str, str]:
    told = {
        "model": model,
        "bits": s.bits,
        "recipe": s.label,
        "top-1 % [95 %]": _interval(s.top1, ".2f"),
        "float": f"{s.top1_float:.2f}",
        "recovery": "" if s.recovery is None else f"{s.recovery:.3f}",
        f"minus {minus} [95 %]": _interval(s.minus, "+.2f"),
        "KL": "" if s.kl is None else f"{s.kl.middle:.3f}",
        "cost": "" if s.cost is None else f"{s.cost.middle:.1f}",
        "cost in MACs": "" if s.macs is None else f"{s.macs:.2f}",
        "MB": "" if s.size is None else f"{s.size / 1e6:.2f}",
        "extra MMACs": f"{s.extra_macs / 1e6:.1f}" if s.extra_macs else "",
    }
    return told | {"failed": s.reason if s.top1 is None else ""}


def _interval(spread: Spread | None, form: str) -> str:
    return "" if spread is None else f"{spread.middle:{form}} [{spread.low:{form}}, {spread.high:{form}}]"


def _origin(rows: list[Row]) -> str:
    where = dict.fromkeys((r["images"], r["evaluation"], r["calibration_images"], r["calibration"]) for r in rows)
    images = "; ".join(f"{n} images of {of}, calibrated on {m} of {calib}" for n, of, m, calib in where if n)
    seeds = ", ".join(sorted({row["seed"] for row in rows}))
    code = ", ".join(sorted({row["commit"] or row["version"] for row in rows}))
    units = "KL from the float model in nats; cost in float forwards of the calibration images"
    return f"Simulated. {images}; seeds {seeds}; commit {code}. {units}."


def _label(row: Row) -> str:
    return f"{row['recipe']} {row['options']}".strip()


def _without(name: str, label: str) -> str:
    recipe, space, options = label.partition(" ")
    return "+".join(part for part in recipe.split("+") if part != name) + space + options


def _registered(name: str) -> tuple[Callable[..., Any], Any]:
    fn: Callable[..., Any] = RECIPES[name] if name in RECIPES else MODIFIERS[name]
    return fn, fn(BITS, BITS)


def _docstring(name: str) -> str:
    module = inspect.getmodule(_registered(name)[0])
    return inspect.getdoc(module) or ""


def _summary(fn: Callable[..., Any]) -> str:
    return (inspect.getdoc(fn) or "").split("\n")[0]


def _markdown(text: str) -> str:
    """Prose as Markdown: what would be emphasis in a formula (2**bits) is none."""
    return re.sub(r"(?<=\w)\*\*?(?=\w)", lambda found: re.sub(r"\*", r"\\*", found[0]), text)


def _where(rule: Rule) -> str:
    roles = ", ".join(rule.roles) or "everywhere"
    return (
        roles + (f", made by {rule.producer}" if rule.producer else "") + (", after a norm" if rule.after_norm else "")
    )
