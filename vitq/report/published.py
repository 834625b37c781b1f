"""What papers and official code report, to stand beside our own numbers: `published.csv`.

Units:   top-1 and float in percent; recovery is their ratio
Columns: `training` is "calibration" where weights are only rounded, or changed in closed form, and "retrained" where
         they, or their rounding, are learned; `kind` is "paper", "official code, our run" or "third party re-run"

Papers measure on the 50,000 validation images, official code was run by us on other ones, and float models differ: only
recoveries are comparable, and those with care.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.report.table import read_results

FILE = Path(__file__).with_name("published.csv")
KINDS = PAPER, OFFICIAL, OTHERS = ("paper", "official code, our run", "third party re-run")
TRAININGS = CALIBRATION, RETRAINED = ("calibration", "retrained")


@dataclass(frozen=True)
class Published:
    """One number of one method; `top1_float` is the column `float`."""

    method: str
    paper: str
    model: str
    bits: str
    top1: float
    top1_float: float
    training: str
    kind: str
    source: str
    note: str

    @property
    def recovery(self) -> float:
        """Share of the float model's accuracy."""
        return self.top1 / self.top1_float


@cache
def published() -> tuple[Published, ...]:
    """Every row of the file."""
    words = ("method", "paper", "model", "bits", "training", "kind", "source", "note")
    return tuple(
        Published(top1=float(row["top1"]), top1_float=float(row["float"]), **{name: row[name] for name in words})
        for row in read_results(FILE)
    )


def of_method(name: str) -> list[Published]:
    """What is known of a registered recipe's or modifier's paper: the same arXiv id, or the same name."""
    registered = RECIPES[name] if name in RECIPES else MODIFIERS[name]
    ids = _ids(registered(8, 8).paper)
    return [row for row in published() if ids & _ids(row.paper) or _letters(row.method) == _letters(name)]


def beside(recipe: str, model: str, bits: str) -> list[Published]:
    """What is known of a recipe without modifiers on a model, by its timm name, at some bits."""
    if recipe not in RECIPES:
        return []
    name = model.partition(".")[0]
    return [row for row in of_method(recipe) if (row.model, row.bits) == (name, bits)]


def told(rows: list[Published], kind: str) -> str:
    """The numbers of one kind, each with its recovery; `retrained` where it is one."""
    chosen = [row for row in rows if row.kind == kind]
    texts = [
        f"{row.top1:.2f} ({row.recovery:.3f})" + (" retrained" if row.training == RETRAINED else "") for row in chosen
    ]
    return "; ".join(dict.fromkeys(texts))


def _ids(paper: str) -> set[str]:
    return set(re.findall(r"\d{4}\.\d{4,5}", paper))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
