"""Train the detector or the segmenter of procedural scenes and write it into the package.

    python tools/train_scenes.py maskrcnn|segformer [--data FOLDER of Fashion-MNIST's idx .gz files]

Items of training scenes are those that the models of Fashion-MNIST are trained on (tools/train_zoo.py); those of test
scenes are the embedded test images, looked at once, at the end. Scenes are made anew for every step: none is seen
twice. Interrupted, it goes on from the last whole epoch of 1,000 scenes. `--quick` takes two small steps, which shows
that everything runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.core.files import write_text
from vitq.data.coco import open_coco
from vitq.data.native import PhotoInput, photo_input
from vitq.data.semantic import open_semantic
from vitq.data.zoo.fashion import CLASSES
from vitq.data.zoo.scene_models import scene_maskrcnn, scene_segformer
from vitq.data.zoo.scenes import Scene, Scenes, scene_set, write_scenes
from vitq.evaluate.detect import evaluate_detectors
from vitq.evaluate.finders import Finder, Segmenter, category_ids
from vitq.evaluate.segment import evaluate_segmenters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_zoo import FILES, ROOT, clock, find_data, rate_at, replace, say, split, write_model

EPOCH = 1000  # scenes
BATCH = 8
RATES = {"maskrcnn": 1.2e-3, "segformer": 1.2e-3}
BUILD = {"maskrcnn": scene_maskrcnn, "segformer": scene_segformer}
EPOCHS = {"maskrcnn": 60, "segformer": 40}
DECAY = 0.05


def detection_loss(model: nn.Module, scenes: list[Scene], inputs: PhotoInput) -> Tensor:
    """Sum of Mask R-CNN's own losses."""
    images = [torch.from_numpy(scene.image).permute(2, 0, 1).float().div(255) for scene in scenes]
    targets = [
        {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels) + 1,
            "masks": torch.from_numpy(scene.masks).to(torch.uint8),
        }
        for scene in scenes
    ]
    losses: dict[str, Tensor] = model(images, targets)
    return torch.stack(list(losses.values())).sum()


def segmentation_loss(model: nn.Module, scenes: list[Scene], inputs: PhotoInput) -> Tensor:
    """Cross-entropy of all pixels at the size of the scene."""
    pixels = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    normal = (torch.from_numpy(pixels) - torch.tensor(inputs.mean)) / torch.tensor(inputs.std)
    classes = torch.from_numpy(np.stack([scene.classes for scene in scenes])).long()
    logits = model(pixel_values=normal.permute(0, 3, 1, 2)).logits
    logits = F.interpolate(logits, classes.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, classes)


def train(name: str, items: Any, steps: int, batch: int, seed: int, path: Path) -> nn.Module:
    """The trained model, in eval mode. A checkpoint after each epoch makes a second start go on there."""
    torch.manual_seed(seed)
    model, scenes, loss_of = BUILD[name](), Scenes(items, seed), LOSSES[name]
    inputs = prepared(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATES[name], weight_decay=DECAY)
    run, first, every = {"steps": steps, "batch": batch, "seed": seed}, 0, max(1, EPOCH // batch)
    if path.is_file():
        state = torch.load(path, weights_only=True)
        if state["run"] == run:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            say(f"{name}: going on after step {first}")
    start, total = time.perf_counter(), 0.0
    for step in range(first, steps):
        torch.manual_seed(seed + step)  # which regions are looked at; so that a second start draws the same
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, RATES[name])
        drawn = [scenes[step * batch + number] for number in range(batch)]
        loss = loss_of(model.train(), [scene for scene in drawn if len(scene.labels)], inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            left = (time.perf_counter() - start) / (step + 1 - first) * (steps - step - 1)
            say(f"{name} step {step + 1} of {steps}: loss {total / every:.3f}, {clock(left)} left")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "run": run}
            replace(path, lambda temporary, state=state: torch.save(state, temporary))  # type: ignore[misc]
            total = 0.0
    return model.eval()


def prepared(model: nn.Module) -> PhotoInput:
    """How the model takes scenes: at their own size."""
    from vitq.data.zoo.scenes import SIZE

    found = photo_input(model, None if hasattr(model, "transform") else SIZE)
    assert found is not None
    return found


def measured(name: str, model: nn.Module, count: int | None) -> dict[str, Any]:
    """AP, or mIoU, on test scenes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes, whole = scene_set("scenes_test")
        write_scenes(folder, scenes, count or whole)
        cpu, inputs = torch.device("cpu"), prepared(model)
        if name == "maskrcnn":
            data = open_coco(folder / "truth.json", folder / "photos", masks=True)
            finder = Finder(model, inputs, cpu, category_ids(model, data.categories), masks=True)
            return evaluate_detectors({name: finder}, data, masks=True)[name].to_json()
        pairs = open_semantic(folder / "masks", folder / "photos")
        segmenter = Segmenter(model, inputs, cpu)
        return evaluate_segmenters({name: segmenter}, pairs, len(CLASSES) + 1)[name].to_json()


LOSSES = {"maskrcnn": detection_loss, "segformer": segmentation_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(BUILD))
    parser.add_argument("--out", type=Path, default=FILES, help="folder to write to (default: that of the package)")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "out" / "zoo", help="folder for epoch checkpoints")
    parser.add_argument("--data", type=Path, help="folder with the four idx .gz files of Fashion-MNIST")
    parser.add_argument("--epochs", type=float, help="of 1,000 scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps of two scenes of 300 items, measured on four")
    given = parser.parse_args()
    items: Any = "fashion_calib"
    if not given.quick:
        with tempfile.TemporaryDirectory(prefix="vitq-zoo-") as scratch:
            parts = split(find_data(given.data, Path(scratch)))
        items = parts["train"].pixels.numpy(), parts["train"].labels.numpy()
    batch = 2 if given.quick else BATCH
    epochs = given.epochs or EPOCHS[given.model]
    steps = 2 if given.quick else round(epochs * EPOCH / BATCH)
    name = f"scenes_{given.model}"
    path = given.checkpoints / f"{name}{'_quick' if given.quick else ''}.pt"
    model = write_model(given.out, name, train(given.model, items, steps, batch, given.seed, path))
    told = measured(given.model, model, 4 if given.quick else None)
    result = {"model": name, "scenes": steps * batch, "seed": given.seed, "test_scenes": told["images"]}
    result |= {f"test_{key}": round(told[key], 2) for key in ("box_ap", "mask_ap", "miou") if key in told}
    write_text(given.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
