"""Train the detector or the segmenter of procedural scenes and write it into the package.

    python tools/train_scenes.py maskrcnn|segformer [--data FOLDER of Fashion-MNIST's idx .gz files]

Items of training scenes are those that the models of Fashion-MNIST are trained on (tools/train_zoo.py); those of test
scenes are the embedded test images, looked at once, at the end. Scenes are made anew for every step: none is seen
twice. Interrupted, it goes on from the last 1,000 scenes. `--quick` takes two small steps, which shows that everything
runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
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
from vitq.data.zoo.scene_models import SEGFORMER_DEPTHS, scene_maskrcnn, scene_segformer
from vitq.data.zoo.scenes import MOST, SIZE, Scene, Scenes, scene_set, write_scenes
from vitq.evaluate.detect import evaluate_detectors
from vitq.evaluate.finders import Finder, Segmenter, category_ids
from vitq.evaluate.segment import evaluate_segmenters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_zoo import FILES, ROOT, clock, find_data, rate_at, say, split, write_model
from train_zoo import replace as replace_file

KEPT = 1000  # scenes between checkpoints
DECAY = 0.05


@dataclass(frozen=True)
class Part:
    """A stretch of training.

    Attributes:
        scenes: how many are seen.
        batch: of a step.
        size: of a scene, in pixels.
        most: items of a scene.
        again: rates rise and fall once more from here on, up to this share of the peak; None goes on as before.
        depths: blocks of the stages from here on: new ones pass on what they are given, to begin with. None leaves
            the model as it is. Needs `again`, as the optimizers begin anew.
    """

    scenes: int
    batch: int
    size: int = SIZE
    most: int = MOST
    again: float | None = None
    depths: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Of the optimizers."""
        return self.scenes // self.batch


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Attributes:
        build: it, with fresh weights; given `depths` if a part does.
        loss: (model, scenes, how it takes photos) -> what is made small.
        rate: the peak, of AdamW.
        parts: one after the other.
        matrix_rate: the peak for the weights of linear layers, of Muon; None for AdamW there, too.
    """

    build: Callable[..., nn.Module]
    loss: Callable[[nn.Module, list[Scene], PhotoInput], Tensor]
    rate: float
    parts: tuple[Part, ...]
    matrix_rate: float | None = None

    def optimizers(self, model: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
        """Each with its peak rate."""
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)] if self.matrix_rate else []
        held = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in held]
        made = [(torch.optim.AdamW(others, self.rate, weight_decay=DECAY), self.rate)]
        if self.matrix_rate:
            muon = torch.optim.Muon(matrices, self.matrix_rate, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
            made.append((muon, self.matrix_rate))
        return made


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
    """Cross-entropy of every pixel."""
    pixels = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    normal = (torch.from_numpy(pixels) - torch.tensor(inputs.mean)) / torch.tensor(inputs.std)
    classes = torch.from_numpy(np.stack([scene.classes for scene in scenes])).long()
    logits = model(pixel_values=normal.permute(0, 3, 1, 2)).logits
    logits = F.interpolate(logits, classes.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, classes)


def train(job: Job, items: Any, seed: int, path: Path) -> nn.Module:
    """The trained model, in eval mode. Checkpoints along the way make a second start go on there."""
    torch.manual_seed(seed)
    ends = list(accumulate(part.steps for part in job.parts))
    run, first, steps = {"parts": repr(job.parts), "seed": seed}, 0, ends[-1]
    state = torch.load(path, weights_only=True) if path.is_file() else None
    if state is not None and state["run"] == run:
        first = state["step"]
        say(f"going on after step {first}")
    # The last step's part: the one that follows may have more blocks, which it adds itself.
    model = built(job, bisect_right(ends, max(first - 1, 0)))
    inputs, optimizers = prepared(model), job.optimizers(model)
    if first and state is not None:
        model.load_state_dict(state["model"])
        for (optimizer, _), kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    start, total, since = time.perf_counter(), 0.0, 0
    for step, batch in enumerate(batches(job.parts, items, seed, first), first):
        torch.manual_seed(seed + step)  # which regions are looked at; so that a second start draws the same
        number = bisect_right(ends, step)
        if number and step == ends[number - 1] and job.parts[number].depths is not None:
            model = grown(model, built(job, number))
            optimizers = job.optimizers(model)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scheduled(job.parts, step, peak)
        loss = job.loss(model.train(), batch, inputs)
        for optimizer, _ in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        total, since = total + float(loss.detach()), since + 1
        if since * len(batch) >= KEPT or step + 1 == steps:
            left = (time.perf_counter() - start) / (step + 1 - first) * (steps - step - 1)
            say(f"step {step + 1} of {steps}: loss {total / since:.3f}, {clock(left)} left")
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o, _ in optimizers]}
            state |= {"step": step + 1, "run": run}
            replace_file(path, lambda temporary, state=state: torch.save(state, temporary))  # type: ignore[misc]
            total, since = 0.0, 0
    return model.eval()


def built(job: Job, number: int) -> nn.Module:
    """The model as it is in a part, with fresh weights."""
    depths = [part.depths for part in job.parts[: number + 1] if part.depths is not None]
    return job.build(depths=depths[-1]) if depths else job.build()


def grown(small: nn.Module, large: nn.Module) -> nn.Module:
    """`large` with the weights of `small`; blocks that only it has add nothing to begin with."""
    old = small.state_dict()
    large.load_state_dict(large.state_dict() | old)
    for name, weight in large.named_parameters():
        if name not in old and (".o_proj." in name or ".fc2." in name):  # what a block adds comes through these two
            nn.init.zeros_(weight)
    return large


def scheduled(parts: Sequence[Part], step: int, peak: float) -> float:
    """The rate of a step: a rise and a fall over all parts, or up to the one that begins again."""
    first = 0
    for number, part in enumerate(parts):
        behind = list(takewhile(lambda other: other.again is None, parts[number + 1 :]))
        steps = sum(each.steps for each in (part, *behind))
        if number and part.again is None:
            continue
        if step < first + steps:
            return rate_at(step - first, steps, peak * (1.0 if part.again is None else part.again))
        first += steps
    raise ValueError(f"step {step} is behind the last")


def batches(parts: Sequence[Part], items: Any, seed: int, first: int) -> Iterator[list[Scene]]:
    """The scenes of every step from the first on; those without any item seen are left out."""
    for number, part in enumerate(parts):
        scenes = Scenes(items, seed * len(parts) + number, part.size, part.most)
        for step in range(min(first, part.steps), part.steps):
            drawn = [scenes[step * part.batch + at] for at in range(part.batch)]
            yield [scene for scene in drawn if len(scene.labels)]
        first -= min(first, part.steps)


def prepared(model: nn.Module) -> PhotoInput:
    """How the model takes scenes: at their own size."""
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


JOBS = {
    "maskrcnn": Job(scene_maskrcnn, detection_loss, 1.2e-3, (Part(60_000, 8),)),
    # Items by themselves first: in whole scenes it takes tens of thousands until classes are told apart at all.
    "segformer": Job(
        scene_segformer,
        segmentation_loss,
        3e-3,
        (
            Part(60_000, 32, 64, 1, depths=(2, 2, 2, 2)),
            Part(160_000, 16),
            Part(112_000, 16, again=0.5),
            Part(128_000, 16, again=0.7, depths=SEGFORMER_DEPTHS),
        ),
        matrix_rate=2e-2,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(JOBS))
    parser.add_argument("--out", type=Path, default=FILES, help="folder to write to (default: that of the package)")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "out" / "zoo", help="folder for checkpoints")
    parser.add_argument("--data", type=Path, help="folder with the four idx .gz files of Fashion-MNIST")
    parser.add_argument("--share", type=float, default=1.0, help="of the scenes, for a shorter or longer training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps of two scenes of 300 items, measured on four")
    given = parser.parse_args()
    items: Any = "fashion_calib"
    if not given.quick:
        with tempfile.TemporaryDirectory(prefix="vitq-zoo-") as scratch:
            parts = split(find_data(given.data, Path(scratch)))
        items = parts["train"].pixels.numpy(), parts["train"].labels.numpy()
    job = JOBS[given.model]
    whole = tuple(replace(part, scenes=round(part.scenes * given.share)) for part in job.parts)
    job = replace(job, parts=(Part(4, 2),) if given.quick else whole)
    name = f"scenes_{given.model}"
    path = given.checkpoints / f"{name}{'_quick' if given.quick else ''}.pt"
    model = write_model(given.out, name, train(job, items, given.seed, path))
    told = measured(given.model, model, 4 if given.quick else None)
    seen = sum(part.scenes for part in job.parts)
    result = {"model": name, "scenes": seen, "seed": given.seed, "test_scenes": told["images"]}
    result |= {f"test_{key}": round(told[key], 2) for key in ("box_ap", "mask_ap", "miou") if key in told}
    write_text(given.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
