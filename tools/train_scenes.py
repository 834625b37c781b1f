"""Train the detector and the segmenter of procedural scenes, and measure them on scenes that they have not seen.

    python tools/train_scenes.py maskrcnn --out FOLDER [--data FOLDER of Fashion-MNIST's idx .gz files]
    python tools/train_scenes.py segformer --out FOLDER

Items of training scenes are those of the official training set, or without --data the 300 that come with vitq; those of
test scenes are the embedded test images. Scenes are made anew for every step: none is seen twice. `--quick` takes two
small steps, which shows that everything runs. An epoch is 1,000 scenes; the script prints how long one took.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from vitq.data.coco import open_coco
from vitq.data.native import PhotoInput, photo_input
from vitq.data.semantic import open_semantic
from vitq.data.zoo.fashion import CLASSES
from vitq.data.zoo.scene_models import scene_maskrcnn, scene_segformer
from vitq.data.zoo.scenes import Scene, Scenes, write_scenes
from vitq.evaluate.detect import evaluate_detectors
from vitq.evaluate.finders import Finder, Segmenter, category_ids
from vitq.evaluate.segment import evaluate_segmenters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_zoo import read_idx, say

EPOCH = 1000  # scenes
BATCH = 8
RATES = {"maskrcnn": 4e-4, "segformer": 6e-4}
BUILD = {"maskrcnn": scene_maskrcnn, "segformer": scene_segformer}
WARMUP = 0.05  # share of the steps
DECAY = 0.05
TEST_SCENES = 200
TEST_SEED = 1_000_003


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


def rate_at(step: int, steps: int, rate: float) -> float:
    """Linear warm-up, then half a cosine."""
    start = max(1, round(WARMUP * steps))
    if step < start:
        return rate * (step + 1) / start
    return float(rate * 0.5 * (1 + np.cos(np.pi * (step - start) / max(1, steps - start))))


def train(name: str, items: Any, steps: int, batch: int, seed: int) -> nn.Module:
    """The trained model, in eval mode."""
    torch.manual_seed(seed)
    model, scenes, loss_of = BUILD[name](), Scenes(items, seed), LOSSES[name]
    inputs = prepared(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATES[name], weight_decay=DECAY)
    start, total = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, RATES[name])
        drawn = [scenes[step * batch + number] for number in range(batch)]
        loss = loss_of(model.train(), [scene for scene in drawn if len(scene.labels)], inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
        every = max(1, EPOCH // batch)
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = (time.perf_counter() - start) / (step + 1) * every
            say(f"step {step + 1} of {steps}: loss {total / (step + 1):.3f}, {seconds:.0f} s an epoch")
    return model.eval()


def prepared(model: nn.Module) -> PhotoInput:
    """How the model takes scenes: at their own size."""
    from vitq.data.zoo.scenes import SIZE

    found = photo_input(model, None if hasattr(model, "transform") else SIZE)
    assert found is not None
    return found


def measured(name: str, model: nn.Module, count: int) -> dict[str, Any]:
    """AP, or mIoU, on test scenes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scenes(folder, Scenes("fashion_test", TEST_SEED), count)
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
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and what they reach")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's train-*.gz")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps of two scenes, measured on four")
    given = parser.parse_args()
    items: Any = "fashion_calib"
    if given.data is not None:
        items = tuple(
            read_idx(given.data / f"train-{part}.gz").numpy() for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
    batch = 2 if given.quick else BATCH
    steps = 2 if given.quick else round(given.epochs * EPOCH / BATCH)
    model = train(given.model, items, steps, batch, given.seed)
    half = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in
            model.state_dict().items()}  # fmt: skip
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in half.items()})
    told = measured(given.model, model, 4 if given.quick else TEST_SCENES) | {"steps": steps, "seed": given.seed}
    given.out.mkdir(parents=True, exist_ok=True)
    save_file(half, given.out / f"scenes_{given.model}.safetensors")
    (given.out / f"scenes_{given.model}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    say(json.dumps({key: value for key, value in told.items() if key != "iou"}))


if __name__ == "__main__":
    main()
