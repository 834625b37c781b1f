"""A second benchmark for choosing variants: DeiT-Tiny with a linear head on CIFAR-10. Writes results/cifar10_probe.csv.

    python benchmarks/cifar10_probe.py --recipes repq_vit dopq_vit --bits w4a4
    python benchmarks/cifar10_probe.py --recipes vitq_calib "vitq_calib gelu=uniform" "vitq_calib rounds=0"

First, once: features of the frozen float model (what enters its head) on training images, and a linear head fitted on
them (softmax regression, L2 chosen on training images that were held out). Features and head are kept in --store,
outside of the repository, and an interrupted extraction goes on where it stopped. Then each recipe quantizes the whole
model, head included, on 32 training images, and is evaluated on the 10,000 test images, which resolve half a point.

A row per recipe, bits and seed: top-1 of the float and of the quantized model on the same images, 95 % intervals over
images, and the paired difference from the first recipe of the run. A run of one recipe leaves out what is there for
this commit; one of several measures all of them, because it pairs them image by image.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import IMAGES, MODEL, ROOT, Shared, Steps, bootstrap, parser, provenance, results_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitq
from vitq.cli.recipes import parse_options
from vitq.core.errors import VitqError
from vitq.data.images import Batch, ImageSet, open_images
from vitq.data.source import LoadedModel
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.predictions import Predictions
from vitq.report.table import append_rows, read_results

KEY = ("name", "bits", "seed", "images")
CLASSES = 10
BATCH = 50
CHUNK = 1_000  # images whose features are kept in one file
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the L2 penalty
HELD_OUT = 5  # one training image in so many chooses among them


def default_store() -> Path:
    """Where features and heads are kept, outside of the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vitq" / "cifar10_probe"


@dataclass
class Probe:
    """The data, the float model, and its head."""

    shared: Shared
    store: Path
    train_images: int
    test_images: int
    steps: Steps

    @cached_property
    def loaded(self) -> LoadedModel:
        return self.shared.model()

    @cached_property
    def identity(self) -> str:
        """What features depend on: weights and preprocessing."""
        told = f"{self.shared.weights()}{self.loaded.preprocess}"
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def images(self, part: str, count: int) -> ImageSet:
        """The same images for every run; all of them, if so many are wanted."""
        found = open_images(self.shared.path / "data" / "cifar10" / f"{part}.parquet", num_classes=CLASSES)
        return found if count >= len(found) else found.sample(count, 0)

    def features(self) -> tuple[Tensor, Tensor]:
        """(N, D) of the training images, and their labels (N,)."""
        images, parts = self.images("train", self.train_images), []
        model = self.loaded.model
        for start in range(0, len(images), CHUNK):
            some = images.subset(range(start, min(start + CHUNK, len(images))))
            file = self.store / self.identity / f"train_{len(images)}_{start}.safetensors"
            if not file.exists():
                seen = [(self._before_head(model, batch.images), batch.labels) for batch in self._batches(some)]
                tensors = {"x": torch.cat([x for x, _ in seen]), "y": torch.cat([y for _, y in seen if y is not None])}
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(".part")
                save_file(tensors, temporary)
                temporary.replace(file)
            parts.append(load_file(file))
            self.steps.step(f"features of {min(start + CHUNK, len(images))} training images")
        return torch.cat([part["x"] for part in parts]), torch.cat([part["y"] for part in parts])

    def _batches(self, images: ImageSet) -> Iterator[Batch]:
        return iter(images.batches(self.loaded.preprocess, BATCH))

    @staticmethod
    @torch.no_grad()
    def _before_head(model: Any, x: Tensor) -> Tensor:
        found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
        return found

    def model(self) -> nn.Module:
        """DeiT-Tiny with the probe as its head."""
        model: Any = self.shared.model().model
        head = self.store / self.identity / f"head_{self.train_images}.safetensors"
        if not head.exists():
            save_file(fit_head(*self.features()), head)
        tensors = load_file(head)
        model.head = nn.Linear(*reversed(tensors["weight"].shape))
        model.head.load_state_dict(tensors)
        made: nn.Module = model.eval().requires_grad_(False)
        return made

    def test(self) -> Iterator[Batch]:
        """The test images, decoded again each time: kept, 10,000 of them would take 6 GB."""
        return self._batches(self.images("test", self.test_images))

    def calibration(self, seed: int) -> Tensor:
        """Training images drawn by the seed."""
        return self.images("train", sys.maxsize).sample(IMAGES, seed).tensor(self.loaded.preprocess)


def fit_head(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Softmax regression; the strength of the penalty is the best on one image in HELD_OUT."""
    held = torch.arange(len(y)) % HELD_OUT == 0
    right = {}
    for strength in STRENGTHS:
        head = _regression(x[~held], y[~held], strength)
        right[strength] = float((head(x[held]).argmax(1) == y[held]).float().mean())
    head = _regression(x, y, max(right, key=lambda strength: right[strength]))
    return {name: value.contiguous() for name, value in head.state_dict().items()}


def _regression(x: Tensor, y: Tensor, strength: float) -> nn.Linear:
    """Fitted on standardised features; the result takes plain ones."""
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    z = (x - mean) / spread
    head = nn.Linear(x.shape[1], CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(z), y) + strength * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.bias -= head.weight @ (mean / spread)
        head.weight /= spread
    return head.requires_grad_(False)


def row_of(found: ClassifyResult, reference: ClassifyResult, first: Predictions | None) -> dict[str, Any]:
    """Accuracy, the float model's, and the difference from the first recipe image by image."""
    told, base = found.to_json(), reference.to_json()
    row = {"images": found.images, "top1": told["top1"], "top1_float": base["top1"]}
    row |= dict(zip(("top1_low", "top1_high"), told["top1_interval"], strict=True))
    paired: tuple[Any, Any, Any] = ("", "", "")
    if first is not None:
        paired = bootstrap((found.predictions.correct.double() - first.correct.double())[None])
    return row | dict(zip(("minus_first", "minus_first_low", "minus_first_high"), paired, strict=True))


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/cifar10_probe.py --recipes repq_vit dopq_vit --bits w4a4")
    options.add_argument(
        "--recipes", nargs="+", default=["repq_vit", "dopq_vit"], metavar="'RECIPE [KEY=VALUE …]'",
        help="with their options; compared with the first",
    )  # fmt: skip
    options.add_argument("--bits", nargs="+", default=["w4a4"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0], help="draw the calibration images")
    options.add_argument(
        "--store", type=Path, default=default_store(), help="features and heads (default: %(default)s)"
    )
    options.add_argument("--train-images", type=int, default=10_000, help="to fit the head on (default 10000)")
    options.add_argument("--test-images", type=int, default=10_000)
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing or not (shared.path / "data" / "cifar10").is_dir():
        options.error(f"nothing can be measured: {shared.missing or 'data/cifar10 is not there'}")
    if args.store.resolve().is_relative_to(ROOT):
        options.error("--store must be outside of the repository: it holds data that is not ours to publish")
    train, test = (200, 100) if args.quick else (args.train_images, args.test_images)
    file = results_folder(args) / "cifar10_probe.csv"
    origin = shared.weights() | {"kind": "simulated", "head": f"fitted on {train} training images"} | provenance()
    steps = Steps(-(-train // CHUNK) + 1 + len(args.recipes) * len(args.bits) * len(args.seeds))
    probe = Probe(shared, args.store, train, test, steps)
    try:
        model = probe.model()
        known = read_results(file) if file.exists() and not str(origin["commit"]).endswith("+dirty") else []
        reference = evaluate_classifier(model, probe.test())
        steps.step(f"float: top-1 {reference.top1:.2f} % of {reference.images}")
        for bits in args.bits:
            for seed in args.seeds:
                first: Predictions | None = None
                for name in args.recipes:
                    recipe, *changed = name.split()
                    row = {"name": name, "model": MODEL, "recipe": recipe, "bits": bits, "seed": seed}
                    wanted = {"name": row["name"], "bits": bits, "seed": str(seed), "images": str(reference.images)}
                    wanted["commit"] = str(origin["commit"])
                    if len(args.recipes) == 1 and any(all(r[k] == v for k, v in wanted.items()) for r in known):
                        steps.step(f"{row['name']} {bits} seed {seed} is there")
                        continue
                    images = probe.calibration(seed)
                    qmodel = vitq.quantize(model, recipe, bits, images, options=parse_options(changed), seed=seed)
                    found = evaluate_classifier(qmodel, probe.test())
                    row |= row_of(found, reference, first) | {"options": " ".join(changed)}
                    first = found.predictions if first is None else first
                    append_rows(file, [row | {"calibration": f"{IMAGES} training images"} | origin], KEY)
                    steps.step(f"{row['name']} {bits} seed {seed}: top-1 {found.top1:.2f} %")
    except VitqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
