"""mIoU against an independent count, also on the shared semantic masks; masks and images paired by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitq.core.errors import DataError, InputError
from vitq.data.semantic import open_semantic, read_mask
from vitq.evaluate.segment import Confusion, evaluate_segmenters, pair_json, result


def counted(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> float:
    """mIoU in percent, class by class over all pixels at once."""
    labels = np.concatenate([a.ravel() for a, _ in pairs])
    predicted = np.concatenate([b.ravel() for _, b in pairs])
    predicted, labels = predicted[labels != 255], labels[labels != 255]
    found = []
    for c in range(classes):
        either = np.sum((labels == c) | (predicted == c))
        if either:
            found.append(np.sum((labels == c) & (predicted == c)) / either)
    return 100 * float(np.mean(found))


def noisy(labels: np.ndarray, classes: int, draw: np.random.Generator) -> np.ndarray:
    """Labels shifted by some pixels, with blocks of other classes."""
    moved = np.roll(labels, tuple(draw.integers(-4, 5, 2)), (0, 1)).copy()
    moved[moved == 255] = 0
    for _ in range(3):
        y, x = draw.integers(0, labels.shape[0]), draw.integers(0, labels.shape[1])
        moved[y : y + 30, x : x + 30] = draw.integers(0, classes)
    return moved


def test_miou_and_its_interval_follow_from_counts() -> None:
    draw = np.random.default_rng(0)
    pairs = []
    for _ in range(12):
        labels = draw.integers(0, 4, (20, 25))
        labels[:2] = 255
        pairs.append((labels, noisy(labels, 5, draw)))
    tally = Confusion(6)  # class 5 is nowhere
    for labels, predicted in pairs:
        tally.add(torch.from_numpy(labels), torch.from_numpy(predicted), "x")
    found = result(tally)
    assert found.miou == pytest.approx(counted(pairs, 6), abs=1e-9)
    assert np.isnan(found.iou[5])
    assert found.interval[0] < found.miou < found.interval[1]
    # One resample by hand: the images repeated as often as they were drawn.
    times = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=1000)[17]
    again = [pair for pair, n in zip(pairs, times, strict=True) for _ in range(n)]
    assert 100 * found.resampled[17] == pytest.approx(counted(again, 6), abs=1e-9)


@pytest.mark.real
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_miou_is_an_independent_count_on_coco(shared: Path, split: str) -> None:
    root = shared / "data" / "coco128"
    data, draw = open_semantic(root / f"semantic_{split}", root / split), np.random.default_rng(0)
    assert len(data) > 50
    few = data.subset(list(range(0, len(data), 12)))
    pairs = [(labels.numpy(), noisy(labels.numpy(), 201, draw)) for _, _, labels in few]
    guesses = iter(torch.from_numpy(b) for _, b in pairs)
    found = evaluate_segmenters({"it": lambda image: next(guesses)}, few, 201)["it"]
    assert found.miou == pytest.approx(counted(pairs, 201), abs=1e-9)
    assert 5 < found.miou < 99


def test_pairs_are_reported_with_their_difference() -> None:
    draw = np.random.default_rng(1)
    labels = [torch.from_numpy(draw.integers(0, 3, (10, 10))) for _ in range(8)]
    worse = [torch.from_numpy(noisy(each.numpy(), 3, draw)) for each in labels]
    pairs = [(str(n), n, each) for n, each in enumerate(labels)]
    both = evaluate_segmenters({"float": labels.__getitem__, "quantized": worse.__getitem__}, pairs, 3)
    told = pair_json(both["quantized"], both["float"])
    assert told["miou_float"] == 100
    assert told["difference"]["mean"] == pytest.approx(told["miou"] - 100, abs=1e-3)
    assert told["difference"]["low"] <= told["difference"]["mean"] <= told["difference"]["high"] < 0
    assert told["recovery"] == pytest.approx(told["miou"] / 100, abs=1e-4)


def test_labels_that_are_no_classes_and_sizes_that_differ_are_refused() -> None:
    tally = Confusion(3)
    with pytest.raises(DataError, match=r"cat\.png: label 7 is none of the 3 classes"):
        tally.add(torch.full((2, 2), 7), torch.zeros(2, 2), "cat.png")
    with pytest.raises(InputError, match=r"labels are \(2, 2\) and predictions \(2, 3\)"):
        tally.add(torch.zeros(2, 2), torch.zeros(2, 3), "cat.png")
    tally.add(torch.full((2, 2), 255), torch.zeros(2, 2), "cat.png")
    with pytest.raises(DataError, match="no labelled pixel"):
        result(tally)


def test_masks_find_their_images_by_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("b.jpg", "a.jpg", "extra.jpg"):
        Image.new("RGB", (6, 4)).save(tmp_path / "images" / name)
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("L", (6, 4), number).save(tmp_path / "masks" / name)
    found = list(open_semantic(tmp_path / "masks", tmp_path / "images"))
    assert [(name, int(labels.unique())) for name, _, labels in found] == [("a.jpg", 0), ("b.jpg", 1)]
    Image.new("L", (4, 6)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(DataError, match="4 x 6 pixels and its image 6 x 4"):
        list(open_semantic(tmp_path / "masks", tmp_path / "images"))
    Image.new("L", (6, 4)).save(tmp_path / "masks" / "lone.png")
    with pytest.raises(DataError, match=r"1 of 3 masks have no image .*lone.png"):
        open_semantic(tmp_path / "masks", tmp_path / "images")
    Image.new("RGB", (6, 4)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(DataError, match="holds colours"):
        read_mask(tmp_path / "masks" / "b.png")
