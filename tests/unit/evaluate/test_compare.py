"""Comparing several sets of predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitq.core.errors import DataError, InputError
from vitq.evaluate.compare import compare
from vitq.evaluate.metrics import bootstrap_interval, paired_difference
from vitq.evaluate.predictions import Predictions, read_predictions

PEERS = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "peer_predictions"


def right_on(count: int, n: int = 100, folder: str = "") -> Predictions:
    labels = torch.arange(n) % 10
    return Predictions([f"{folder}{i:04}.jpg" for i in range(n)], labels, labels + (torch.arange(n) >= count).long())


def test_every_set_and_every_pair_is_there_with_its_numbers() -> None:
    sets = {"float": right_on(90), "w6a6": right_on(88, folder="report/"), "w4a4": right_on(70)}
    found = compare(sets)
    assert [each.top1 for each in found.accuracies] == pytest.approx([90, 88, 70])
    assert [(each.first, each.second) for each in found.pairs] == [
        ("float", "w6a6"),
        ("float", "w4a4"),
        ("w6a6", "w4a4"),
    ]
    correct = {name: each.correct for name, each in sets.items()}
    for each in found.accuracies:
        assert (each.low, each.high) == bootstrap_interval(correct[each.name])
    for pair in found.pairs:
        assert pair.difference == paired_difference(correct[pair.first], correct[pair.second])


def test_only_shared_images_count() -> None:
    found = compare({"all": right_on(90), "some": right_on(40, n=50)})
    assert found.images == 50
    assert [each.left_out for each in found.accuracies] == [50, 0]
    assert [each.top1 for each in found.accuracies] == pytest.approx([100, 80])


def test_one_set_has_an_accuracy_and_no_pair() -> None:
    found = compare({"float": right_on(90)})
    assert len(found.rows()) == 1
    assert found.pair_rows() == []


def test_rows_are_text_under_one_heading_and_say_the_level() -> None:
    found = compare({"a": right_on(90), "b": right_on(70)}, level=0.9)
    assert found.rows()[0]["top-1 %"] == "90.00"
    assert found.pair_rows()[0]["first - second, points"] == "+20.00"
    assert found.pair_rows()[0]["only first right"] == "20"
    for rows in (found.rows(), found.pair_rows()):
        assert all("90 % interval" in row for row in rows)
        assert all(isinstance(cell, str) for row in rows for cell in row.values())


def test_json_is_strict_and_complete() -> None:
    found = compare({"a": right_on(90), "b": right_on(70)}).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["images"] == 100
    assert found["predictions"][1]["top1"] == 70
    assert found["pairs"][0]["mean"] == 20
    assert 0 < found["pairs"][0]["p_value"] < 1e-5


def test_nothing_to_compare_and_unknown_labels_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        compare({})
    unlabelled = Predictions(["a.jpg"], torch.tensor([-1]), torch.tensor([3]))
    with pytest.raises(DataError, match=r"a\.jpg has no label"):
        compare({"a": unlabelled})


@pytest.mark.skipif(not PEERS.is_dir(), reason="the shared peer predictions are not there")
def test_real_peer_files_compare() -> None:
    names = ("float", "repq-vit_w6a6_seed0", "repq-vit_w4a4_seed0")
    found = compare({name: read_predictions(PEERS / "report" / f"{name}.csv") for name in names})
    assert found.images == 400
    assert found.accuracies[0].top1 == pytest.approx(79.25)
    assert found.pairs[1].difference.low > 0
