"""Rows put together over seeds, and one row measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitq
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.progress import Silent
from vitq.data.images import Batch
from vitq.data.source import load_model
from vitq.data.zoo import zoo_images
from vitq.evaluate import leaderboard
from vitq.evaluate.classify import evaluate_classifier
from vitq.evaluate.leaderboard import FAILED, KEY, MEASURED, OK, Entry, Ground, Key, Row, measure, standings
from vitq.evaluate.metrics import mean_over_seeds, paired_difference

IMAGES = 60


def right(share: float, seed: int) -> Tensor:
    return torch.rand(IMAGES, generator=torch.Generator().manual_seed(seed)) < share


class Table:
    """Rows as they come from a file, with what each got right."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.bits: dict[Key, Tensor] = {}
        self.add("float", "", "", right(0.9, 0))

    def add(self, recipe: str, bits: str, seed: object, correct: Tensor | None, **cells: object) -> None:
        row = dict.fromkeys((*KEY, *MEASURED, "reason"), "") | {"weights_sha256": "w", "evaluation_sha256": "e"}
        row |= {
            "model": "m",
            "recipe": recipe,
            "bits": bits,
            "seed": str(seed),
            "status": OK if correct is not None else FAILED,
        }
        numbers = {"cost": 2, "seconds": 1, "bytes": 1000, "weight_bits": 4.1, "act_bits": 4, "extra_macs": 0}
        row |= {name: str(value) for name, value in (numbers | cells).items()}
        self.rows.append(row)
        if correct is not None:
            self.bits[tuple(row[name] for name in KEY)] = correct

    def found(self, against: str = "float") -> list[leaderboard.Standing]:
        return standings(self.rows, self.bits.get, against)


def test_seeds_are_put_together_and_paired_image_by_image() -> None:
    table = Table()
    answers = {(name, seed): right(0.7, 10 * seed + (name == "a")) for name in "ab" for seed in (0, 1, 2)}
    for (name, seed), correct in answers.items():
        table.add(
            name,
            "w4a4",
            seed,
            correct,
            cost=seed + 1,
            logit_kl=0.1 * seed,
            bytes=1000 + seed,
            macs=3 if seed == 0 else "",
        )
    found = {row.recipe: row for row in table.found()}
    stack = torch.stack([answers["a", s].double() for s in (0, 1, 2)])
    row = found["a"]
    assert row.top1 is not None
    assert (row.top1.middle, row.top1.low, row.top1.high) == pytest.approx(mean_over_seeds(stack), abs=1e-4)
    float_right = right(0.9, 0).double()
    assert row.top1_float == pytest.approx(100 * float(float_right.mean()))
    assert row.recovery == pytest.approx(float(stack.mean() / float_right.mean()), abs=1e-4)
    assert row.minus is not None
    assert (row.minus.middle, row.minus.low, row.minus.high) == pytest.approx(
        mean_over_seeds(stack - float_right), abs=1e-4
    )
    assert (row.cost.middle, row.cost.low, row.cost.high, row.size, row.macs) == (2, 1, 3, 1002, 3)  # type: ignore[union-attr]
    assert (row.kl.middle, row.kl.low, row.kl.high) == pytest.approx((0.1, 0, 0.2))  # type: ignore[union-attr]
    assert row.images == IMAGES
    paired = {each.recipe: each.minus for each in table.found("b")}
    assert paired["b"] is None
    other = torch.stack([answers["b", s].double() for s in (0, 1, 2)])
    assert paired["a"] is not None
    assert paired["a"].middle == pytest.approx(100 * float((stack - other).mean()), abs=1e-4)


def test_a_baseline_is_paired_where_it_has_the_width_and_the_seed() -> None:
    table = Table()
    table.add("base", "w4a4", 0, right(0.5, 1))
    for seed in (0, 1):
        table.add("a", "w4a4", seed, right(0.8, 5 + seed))
    table.add("a", "w3a3", 0, right(0.4, 7))
    found = {(row.recipe, row.bits): row.minus for row in table.found("base")}
    assert found["a", "w3a3"] is None
    minus = found["a", "w4a4"]
    assert minus is not None
    assert minus.middle == pytest.approx(paired_difference(right(0.8, 5), right(0.5, 1)).mean, abs=1e-4)


def test_the_wide_come_first_then_the_good_and_failures_last() -> None:
    table = Table()
    for name, bits, share in (("a", "w3a3", 0.9), ("b", "w4a4", 0.3), ("c", "w4a4", 0.8), ("d", "w8a8", 0.1)):
        table.add(name, bits, 0, right(share, 3))
    table.add("e", "w4a4", 0, None, reason="too small")
    table.add("c", "w4a4", 1, None, reason="no luck")
    found = table.found()
    assert [row.recipe for row in found] == ["d", "c", "b", "e", "a"]
    failed = found[3]
    assert (failed.top1, failed.recovery, failed.failed, failed.reason) == (None, None, ("0",), "too small")
    assert (found[1].seeds, found[1].failed, found[1].reason) == (("0",), ("1",), "no luck")


def test_rows_on_other_images_or_weights_are_left_out() -> None:
    table = Table()
    table.add("a", "w4a4", 0, right(0.5, 1))
    table.add("b", "w4a4", 0, right(0.5, 1), evaluation_sha256="other")
    table.add("c", "w4a4", 0, right(0.5, 1), weights_sha256="other")
    assert [row.recipe for row in table.found()] == ["a"]


def test_a_row_whose_images_are_not_known_counts_as_failed() -> None:
    table = Table()
    table.add("a", "w4a4", 0, right(0.5, 1))
    table.bits = {key: bits for key, bits in table.bits.items() if key[1] == "float"}
    (row,) = table.found()
    assert row.failed == ("0",)
    assert "not known" in row.reason


def test_without_the_float_model_there_is_nothing_to_compare_with() -> None:
    table = Table()
    with pytest.raises(DataError, match="float model"):
        standings(table.rows[1:], table.bits.get)
    with pytest.raises(DataError, match="float model"):
        standings(table.rows, lambda key: None)


def ground() -> tuple[Ground, Batches, Callable[[], list[Batch]]]:
    loaded = load_model("zoo:fashion_vit")
    assert loaded.preprocess is not None
    images, labels = zoo_images("fashion_test")
    kept = [Batch(images[i : i + 50], labels[i : i + 50], [f"{i + k}" for k in range(50)]) for i in (0, 50)]
    calib = Batches.of(zoo_images("fashion_calib")[0][:8])
    made = Ground(loaded.model, loaded.source, loaded.preprocess.to_dict(), lambda: kept, torch.device("cpu"))
    return made, calib, lambda: kept


def test_a_row_is_what_quantize_save_and_evaluate_give() -> None:
    base, calib, batches = ground()
    reference = evaluate_classifier(base.model, batches(), keep_logits=True)
    entry = Entry("percentile+qwt", "percentile+qwt", (("p", 0.9995),), "w4a4", 3)
    cells, correct = measure(entry, base, calib, reference, Silent())
    qmodel = vitq.quantize(base.model, "percentile+qwt", "w4a4", calib, options={"p": 0.9995}, seed=3)
    with torch.no_grad():
        logits, plain = (torch.cat([model(b.images) for b in batches()]).double() for model in (qmodel, base.model))
    wanted = logits.argmax(1) == torch.cat([b.labels for b in batches()])
    assert torch.equal(correct, wanted)
    kl = F.kl_div(logits.log_softmax(1), plain.log_softmax(1), log_target=True, reduction="batchmean")
    assert cells["logit_kl"] == pytest.approx(float(kl), rel=1e-3)
    assert set(cells) == set(MEASURED) - {"macs"}
    assert cells["top1"] == pytest.approx(100 * float(wanted.double().mean()))
    assert cells["images"] == 100
    assert cells["minus_float"] == pytest.approx(cells["top1"] - cells["top1_float"])
    assert cells["minus_float_low"] <= cells["minus_float"] <= cells["minus_float_high"]
    assert cells["recovery"] == pytest.approx(cells["top1"] / cells["top1_float"], abs=1e-4)
    assert cells["cost"] == pytest.approx(cells["seconds"] / cells["float_seconds"], rel=0.02)
    assert cells["weight_bits"] == qmodel.effective_bits()["weight"]
    assert cells["extra_macs"] == qmodel.extra_macs() > 0
    assert cells["bytes"] > 50_000


def test_multiply_accumulates_are_counted_in_float_forwards() -> None:
    base, calib, _ = ground()
    plain, rounds = (
        leaderboard.macs_in_forwards(Entry(name, name, (), "w4a4", 0), base, calib, Silent())
        for name in ("minmax", "minmax+gptq")
    )
    assert 1 <= plain < 1.5, "one forward of the images, and one of a single image"
    assert rounds > plain + 1
