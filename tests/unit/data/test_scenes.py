"""Procedural scenes: the same from a seed, their annotations true, and the script that trains on them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vitq.data.coco import open_coco
from vitq.data.semantic import open_semantic
from vitq.data.zoo.scenes import MOST, SIZE, VISIBLE, Scenes, write_scenes

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def test_a_scene_depends_on_its_seed_and_number_alone() -> None:
    first = Scenes(seed=3)
    later = first[7]
    again = Scenes(seed=3)[7]
    assert np.array_equal(later.image, again.image)
    assert np.array_equal(later.masks, again.masks)
    assert not np.array_equal(later.image, Scenes(seed=4)[7].image)
    assert not np.array_equal(later.image, first[8].image)


def test_masks_are_what_is_seen_and_boxes_go_around_them() -> None:
    overlaps = 0
    for number in range(40):
        scene = Scenes()[number]
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert 1 <= len(scene.labels) == len(scene.masks) == len(scene.boxes) <= MOST
        assert int(scene.masks.sum(0).max()) == 1, "a pixel is of one item"
        for mask, label, (left, top, right, bottom) in zip(scene.masks, scene.labels, scene.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
            assert set(scene.classes[mask]) == {label + 1}
        assert int((scene.classes > 0).sum()) == int(scene.masks.sum())
        boxes = scene.boxes
        overlaps += any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            for n, a in enumerate(boxes)
            for b in boxes[n + 1 :]
        )
    assert overlaps > 5
    assert 0 < VISIBLE < 1


def test_written_scenes_read_back_as_they_were(tmp_path: Path) -> None:
    mask = pytest.importorskip("faster_coco_eval").core.mask
    scenes = Scenes(seed=1)
    write_scenes(tmp_path, scenes, 5)
    data = open_coco(tmp_path / "truth.json", tmp_path / "photos", masks=True)
    assert data.notes == ()
    assert len(data.categories) == 10
    pairs = list(open_semantic(tmp_path / "masks", tmp_path / "photos"))
    for number, photo in enumerate(data.photos):
        scene = scenes[number]
        assert np.array_equal(np.asarray(data.image(number)), scene.image)
        assert np.array_equal(pairs[number][2].numpy(), scene.classes)
        assert [o["category_id"] - 1 for o in photo.objects] == scene.labels.tolist()
        for each, expected in zip(photo.objects, scene.masks, strict=True):
            code = mask.frPyObjects(each["segmentation"], SIZE, SIZE)
            assert np.array_equal(mask.decode(code).astype(bool), expected)
            assert each["area"] == expected.sum()


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_scenes", TOOLS / "train_scenes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "number"), [("maskrcnn", "mask_ap"), ("segformer", "miou")])
def test_the_training_script_takes_two_steps(
    name: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval" if name == "maskrcnn" else "transformers")
    module = script()
    monkeypatch.setattr(
        sys, "argv", ["train_scenes.py", name, "--quick", "--out", str(tmp_path), "--checkpoints", str(tmp_path)]
    )
    module.main()
    told = json.loads((tmp_path / f"scenes_{name}.json").read_text())
    assert told["scenes"] == 4
    assert told["test_scenes"] == 4
    assert 0 <= told[f"test_{number}"] <= 100
    assert (tmp_path / f"scenes_{name}.safetensors").stat().st_size < 4_000_000


@pytest.mark.parametrize("name", ["maskrcnn", "segformer"])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    monkeypatch.setattr(module, "KEPT", 2)  # a checkpoint after every step of two scenes
    parts = [module.Part(2, 2, 64, 1), module.Part(4, 2)]
    if name == "segformer":  # which grows right after the step that is kept
        parts = [module.Part(2, 2, 64, 1, depths=(1, 1, 1, 1)), module.Part(4, 2, again=0.5, depths=(1, 2, 1, 1))]
    job = dataclasses.replace(module.JOBS[name], parts=tuple(parts))
    whole = module.train(job, "fashion_calib", 0, tmp_path / "whole.pt")
    kept = module.replace_file

    def stopped(path: Path, write: Any) -> None:
        kept(path, write)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "replace_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        module.train(job, "fashion_calib", 0, tmp_path / "cut.pt")
    monkeypatch.setattr(module, "replace_file", kept)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 1
    cut = module.train(job, "fashion_calib", 0, tmp_path / "cut.pt")
    for (name, one), other in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_rates_rise_and_fall_over_parts_and_once_more_where_one_begins_again() -> None:
    module = script()
    first = (module.Part(40, 2), module.Part(120, 2))
    rates = [module.scheduled(first, step, 1.0) for step in range(80)]
    assert rates == [module.rate_at(step, 80, 1.0) for step in range(80)]
    more = (*first, module.Part(60, 2, again=0.5), module.Part(20, 2))
    longer = [module.scheduled(more, step, 1.0) for step in range(120)]
    assert longer[:80] == rates
    assert longer[80:] == [module.rate_at(step, 40, 0.5) for step in range(40)]
    assert max(longer[80:]) == 0.5
    with pytest.raises(ValueError, match="behind the last"):
        module.scheduled(more, 120, 1.0)


def test_new_blocks_change_nothing_to_begin_with_and_can_learn() -> None:
    module = script()
    torch.manual_seed(0)
    small = module.scene_segformer((1, 1, 2, 1)).eval()
    images = torch.randn(2, 3, 64, 64)
    before = small(pixel_values=images).logits
    large = module.grown(small, module.scene_segformer((1, 2, 2, 3))).eval()
    after = large(pixel_values=images).logits
    assert torch.equal(before, after)
    after.square().sum().backward()
    new = [p for name, p in large.named_parameters() if name not in small.state_dict()]
    assert len(new) > 20
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in new)


def test_a_step_of_training_lowers_the_loss() -> None:
    """On the same scenes: gradients reach the weights, and targets fit what the model is told."""
    module = script()
    torch.manual_seed(0)
    model = module.scene_segformer().train()
    scenes, inputs = [Scenes()[n] for n in range(4)], module.prepared(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        loss = module.segmentation_loss(model, scenes, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
