"""One row of a leaderboard measured, and rows of several seeds put together and compared.

Units:   accuracies, differences and interval ends in percent; divergences in nats; cost in forwards of the float model
         over the calibration images; extra_macs per image. All accuracies are simulated
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq.artifact.save import save
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.format import Bits, Scalar
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import RecipeFn
from vitq.evaluate.classify import Batch, ClassifyResult, evaluate_classifier
from vitq.evaluate.cost import count_macs, float_forward_seconds
from vitq.evaluate.metrics import logit_kl, mean_over_seeds, paired_difference, rounded, rounded_small
from vitq.pipeline import quantize

KEY = ("model", "recipe", "options", "bits", "seed")  # the columns that identify a row
SAME = ("weights_sha256", "evaluation_sha256")  # what rows that are compared must share
FLOAT = "float"  # as a recipe's name: the model as it is
OK, FAILED = "ok", "failed"
MEASURED = (
    "images", "top1", "top1_low", "top1_high", "top1_float", "recovery", "minus_float", "minus_float_low",
    "minus_float_high", "logit_kl", "cost", "macs", "seconds", "float_seconds", "bytes", "weight_bits", "act_bits",
    "model_bits", "extra_macs",
)  # fmt: skip
COMPARED = 1024  # images whose logits are float64 at a time
FORWARDS = 3  # float forwards timed before quantizing, and as many after
Row = Mapping[str, str]
Key = tuple[str, ...]
Correct = Callable[[Key], Tensor | None]


@dataclass(frozen=True)
class Entry:
    """A row to be measured.

    Attributes:
        name: what it is called: `recipe+modifier`, or a function of a file.
        recipe: what `quantize` takes.
        options: of the recipe.
    """

    name: str
    recipe: str | RecipeFn
    options: tuple[tuple[str, Scalar], ...]
    bits: str
    seed: int

    @property
    def told(self) -> str:
        """Options in one cell."""
        return " ".join(f"{key}={value}" for key, value in self.options)

    def cells(self, model: str) -> dict[str, str]:
        """The columns that identify the row."""
        values = (model, self.name, self.told, self.bits, str(self.seed))
        return dict(zip(KEY, values, strict=True))

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.told, self.bits, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Ground:
    """What all rows share.

    Attributes:
        model: float, on the device.
        source, preprocess: for the artifact whose size is measured.
        batches: the evaluation images, from the start at every call.
    """

    model: nn.Module
    source: dict[str, Any]
    preprocess: dict[str, Any]
    batches: Callable[[], Iterable[Batch]]
    device: torch.device


def measure(
    entry: Entry,
    ground: Ground,
    data: Batches,
    reference: ClassifyResult,
    progress: Progress,
    evaluating: AbstractContextManager[Callable[[int], None]] | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Quantize and evaluate: the measured cells of a row, and which images were right.

    The float forward is timed before and after, so that a machine whose speed changes is fair to both.

    Args:
        reference: the float model's result, with its logits.
        evaluating: gives what is called with the number of images evaluated so far.
    """
    before = float_forward_seconds(ground.model, data, FORWARDS)
    start = time.perf_counter()
    qmodel = _quantized(entry, ground, data, progress)
    seconds = time.perf_counter() - start
    forward = (before + float_forward_seconds(ground.model, data, FORWARDS)) / 2
    qmodel.source, qmodel.preprocess = ground.source, ground.preprocess
    with tempfile.TemporaryDirectory() as folder:
        saved = save(qmodel, Path(folder) / "out")
    with evaluating or nullcontext() as tell:
        found = evaluate_classifier(qmodel, ground.batches(), on_batch=tell, device=ground.device, keep_logits=True)
    assert found.logits is not None
    assert reference.logits is not None
    correct, bits = found.predictions.correct, saved["effective_bits"]
    difference = paired_difference(correct, reference.predictions.correct)
    top1, top1_float = (100 * float(each.predictions.correct.double().mean()) for each in (found, reference))
    cells = accuracy_cells(found) | {
        "top1_float": rounded(top1_float),
        "recovery": rounded(top1 / top1_float) if top1_float else None,
        "minus_float": rounded(difference.mean),
        "minus_float_low": rounded(difference.low),
        "minus_float_high": rounded(difference.high),
        "logit_kl": rounded_small(_mean_kl(reference.logits, found.logits)),
        "cost": round(seconds / forward, 3),
        "seconds": round(seconds, 3),
        "float_seconds": round(forward, 4),
        "bytes": saved["bytes"],
        "weight_bits": bits["weight"],
        "act_bits": bits["act"],
        "model_bits": bits["model"],
        "extra_macs": qmodel.extra_macs(),
    }
    return cells, correct


def _mean_kl(expected: Tensor, logits: Tensor) -> float:
    parts = zip(expected.split(COMPARED), logits.split(COMPARED), strict=True)
    return float(torch.cat([logit_kl(*part) for part in parts]).mean())


def accuracy_cells(found: ClassifyResult) -> dict[str, Any]:
    """How many images, and top-1 with its interval."""
    told = found.to_json()
    low, high = told["top1_interval"]
    return {"images": found.images, "top1": told["top1"], "top1_low": low, "top1_high": high}


def macs_in_forwards(entry: Entry, ground: Ground, data: Batches, progress: Progress) -> float:
    """Multiply-accumulates of quantizing over those of one float forward; the same on every machine."""

    def forward() -> None:
        with torch.no_grad():
            for batch in data:
                data.forward(ground.model, batch)

    return round(count_macs(lambda: _quantized(entry, ground, data, progress)) / max(count_macs(forward), 1), 4)


def _quantized(entry: Entry, ground: Ground, data: Batches, progress: Progress) -> QuantModel:
    options = dict(entry.options)
    return quantize(ground.model, entry.recipe, entry.bits, data, options=options, seed=entry.seed, progress=progress)


@dataclass(frozen=True)
class Spread:
    """A mean with its 95 % interval, or a median with the least and the most."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """One recipe at one width, over all of its seeds.

    Attributes:
        seeds, failed: with a result, and without.
        top1: mean over the seeds; its interval is over images and seeds. None without a result, as what follows.
        minus: paired difference from the baseline, over the seeds that both have; None without a baseline.
        kl: mean divergence from the float model over images, nats, over the seeds; None in rows of older versions.
        cost, seconds: of quantizing, over the seeds.
        macs: the same in multiply-accumulates; None where they were not counted.
        size: bytes of the artifact, the largest of the seeds'.
        reason: of the first seed that failed.
    """

    recipe: str
    options: str
    bits: str
    images: int
    top1_float: float
    seeds: tuple[str, ...]
    failed: tuple[str, ...]
    reason: str
    top1: Spread | None = None
    minus: Spread | None = None
    kl: Spread | None = None
    cost: Spread | None = None
    seconds: Spread | None = None
    macs: float | None = None
    size: int | None = None
    weight_bits: float | None = None
    act_bits: float | None = None
    extra_macs: int | None = None

    @property
    def label(self) -> str:
        """Recipe and options."""
        return f"{self.recipe} {self.options}".strip()

    @property
    def recovery(self) -> float | None:
        """Share of the float model's accuracy."""
        return self.top1.middle / self.top1_float if self.top1 is not None and self.top1_float else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"recovery": rounded(self.recovery)}


def standings(rows: Sequence[Row], correct: Correct, against: str = FLOAT) -> list[Standing]:
    """Rows of one model put together over seeds; the widest first, within a width the best first, failures last.

    Args:
        rows: of the leaderboard's file. Those on other images or weights than the float model's row are left out.
        correct: which images a row got right, by its key.
        against: `float`, or the recipe (with its options) whose rows are subtracted.

    Raises:
        DataError: no row of the float model, or its images are not known.
    """
    base_row = next((row for row in rows if row["recipe"] == FLOAT), None)
    reference = None if base_row is None else correct(_key(base_row))
    if base_row is None or reference is None:
        raise DataError("the float model's own row is missing; without it there is nothing to compare with")
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["recipe"] != FLOAT and all(row[name] == base_row[name] for name in SAME):
            groups.setdefault((row["recipe"], row["options"], row["bits"]), {})[row["seed"]] = row
    right = {group: _right(seeds, correct) for group, seeds in groups.items()}
    bases = {(f"{recipe} {options}".strip(), bits): found for (recipe, options, bits), found in right.items()}
    found = []
    for group, seeds in groups.items():
        own = right[group]
        base = dict.fromkeys(own, reference) if against == FLOAT else bases.get((against, group[2]), {})
        found.append(_standing(group, seeds, own, reference, {} if base is own else base))
    return sorted(found, key=lambda s: (_width(s.bits), -(s.top1.middle if s.top1 else -1), s.label))


def _width(bits: str) -> tuple[int, ...]:
    parsed = Bits.parse(bits)
    return -(parsed.weight or 0), -(parsed.act or 0)


def _key(row: Row) -> Key:
    return tuple(row[name] for name in KEY)


def _right(seeds: Mapping[str, Row], correct: Correct) -> dict[str, Tensor]:
    found = {seed: correct(_key(row)) for seed, row in seeds.items() if row["status"] == OK}
    return {seed: right for seed, right in found.items() if right is not None}


def _standing(
    group: tuple[str, str, str],
    rows: Mapping[str, Row],
    right: Mapping[str, Tensor],
    reference: Tensor,
    base: Mapping[str, Tensor],
) -> Standing:
    recipe, options, bits = group
    failed = tuple(seed for seed in rows if seed not in right)
    row = Standing(
        recipe=recipe,
        options=options,
        bits=bits,
        images=len(reference),
        top1_float=100 * float(reference.double().mean()),
        seeds=tuple(right),
        failed=failed,
        reason=rows[failed[0]]["reason"] or "which images it got right is not known" if failed else "",
    )
    if not right:
        return row
    done = [rows[seed] for seed in right]
    both = [seed for seed in right if seed in base]
    macs, kl = _numbers(done, "macs"), _numbers(done, "logit_kl")
    return replace(
        row,
        top1=_mean([right[seed].double() for seed in right]),
        minus=_mean([right[seed].double() - base[seed].double() for seed in both]) if both else None,
        kl=_median(kl) if kl else None,
        cost=_median(_numbers(done, "cost")),
        seconds=_median(_numbers(done, "seconds")),
        macs=macs[0] if macs else None,
        size=int(max(_numbers(done, "bytes"))),
        weight_bits=max(_numbers(done, "weight_bits")),
        act_bits=max(_numbers(done, "act_bits")),
        extra_macs=int(max(_numbers(done, "extra_macs"))),
    )


def _mean(values: list[Tensor]) -> Spread:
    return Spread(*(round(each, 4) for each in mean_over_seeds(torch.stack(values))))


def _median(values: list[float]) -> Spread:
    return Spread(round(statistics.median(values), 4), min(values), max(values))


def _numbers(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row.get(column, "")]
