"""What training leaves of a fine-tuned model: DeiT-Tiny on CIFAR-10. Writes results/cifar10_tuned.csv.

    python benchmarks/cifar10_tuned.py                                            on a CPU: small images, a part of them
    python benchmarks/cifar10_tuned.py --side 224 --train-images 50000 --device cuda

First, once: the float model, with a new head, is fine-tuned on training images; it is kept in --store, outside of the
repository. Then each recipe quantizes it: ranges begin with 32 training images, and a recipe that trains sees the same
training images once more, with labels. A row says

    top1            on test images, of the float and the quantized model, and their difference, paired
    latent          the same for the trained weights without any quantizers ("the same basin")
    transfer        top-1 of a linear probe on frozen features for Fashion-MNIST (the embedded test images, of which a
                    fifth is kept to test on), of the float and the quantized model, and their difference, paired
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import IMAGES, MODEL, ROOT, Shared, Steps, parser, provenance, results_folder, text
from cifar10_probe import CLASSES, default_store
from safetensors.torch import load_file, save_file
from torch import nn

import vitq
from vitq.cli.transfer import set_apart
from vitq.core.format import Bits
from vitq.core.recipe import resolve_recipe
from vitq.data.examples import ImageExamples
from vitq.data.images import ImageSet, open_images
from vitq.data.preprocess import Preprocess
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.metrics import PairedDifference, paired_difference
from vitq.evaluate.transfer import transfer
from vitq.report.table import append_rows

RECIPES = ("vitq_calib", "gplq", "lsq", "direct")
KEY = ("name", "bits", "seed", "side", "train_images", "images")
RATE, DECAY, WARMUP = 1e-4, 0.05, 0.1  # of fine-tuning in float: AdamW, a linear rise and a fall to zero
BATCH = 32
AT_ONCE = 50  # images in evaluation


@dataclass
class Tuned:
    """The data, and the float model.

    Attributes:
        side: of the images, in pixels.
        store: where the float model is kept.
        epochs: of its fine-tuning.
    """

    shared: Shared
    side: int
    train: ImageSet
    test: ImageSet
    store: Path
    epochs: int
    device: torch.device

    @property
    def preprocess(self) -> Preprocess:
        """DeiT's, at the size of the images, all of which is seen."""
        own = self.shared.model().preprocess
        assert own is not None
        return replace(own, input_size=(3, self.side, self.side), crop_pct=1.0)

    def model(self, steps: Steps) -> nn.Module:
        """The fine-tuned float model."""
        import timm

        model: nn.Module = timm.create_model(
            MODEL,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(self.shared.checkpoint)},
            img_size=self.side,
            num_classes=CLASSES,
        )
        name = (
            f"tuned_{self.side}_{len(self.train)}_{self.epochs}_{self.shared.weights()['weights_sha256']}.safetensors"
        )
        if not (self.store / name).is_file():
            self._tune(model.to(self.device), steps)
            self.store.mkdir(parents=True, exist_ok=True)
            temporary = self.store / f"{name}.part"
            save_file({key: value.cpu() for key, value in model.state_dict().items()}, temporary)
            temporary.replace(self.store / name)
        model.load_state_dict(load_file(self.store / name))
        return model.to(self.device).eval()

    def _tune(self, model: nn.Module, steps: Steps) -> None:
        torch.manual_seed(0)
        examples = ImageExamples(self.train, self.preprocess, augment="crop")
        training = vitq.Training(examples, epochs=self.epochs, batch_size=BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
        total, done, rise = training.steps, 0, max(1, round(WARMUP * training.steps))
        model.train()
        for epoch in range(self.epochs):
            losses = []
            for images, labels in examples.stream(training.batches(0, epoch)):
                done += 1
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(done / rise, (total - done) / max(1, total - rise))
                assert labels is not None
                loss = F.cross_entropy(model(images.to(self.device)), labels.to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            steps.say(f"float epoch {epoch + 1} of {self.epochs}: loss {sum(losses) / len(losses):.3f}")

    def judged(self, model: nn.Module) -> ClassifyResult:
        """On the test images."""
        return evaluate_classifier(model, self.test.batches(self.preprocess, AT_ONCE), device=self.device)


def told(name: str, difference: PairedDifference) -> dict[str, str]:
    """A difference and its interval."""
    return {f"{name}{end}": f"{value:.2f}" for end, value in
            (("", difference.mean), ("_low", difference.low), ("_high", difference.high))}  # fmt: skip


def measure(
    tuned: Tuned, model: nn.Module, reference: ClassifyResult, name: str, bits: str, seed: int
) -> dict[str, Any]:
    """One recipe."""
    right = reference.predictions.correct
    seen = tuned.train.sample(IMAGES, seed).tensor(tuned.preprocess).to(tuned.device)
    trains = any(spec.name == "train" for spec in resolve_recipe(name, Bits.parse(bits)).passes)
    latent: list[ClassifyResult] = []

    def whole(without: nn.Module) -> dict[str, float]:
        latent.append(tuned.judged(without))
        return {"top1": latent[0].top1}

    training = None
    if trains:
        examples = ImageExamples(tuned.train, tuned.preprocess, augment="crop", seed=seed)
        training = vitq.Training(examples, batch_size=BATCH, micro_batch=BATCH, latent=whole)
    start = time.perf_counter()
    qmodel = vitq.quantize(model, name, bits, seen, seed=seed, training=training)
    seconds = time.perf_counter() - start
    found = tuned.judged(qmodel)
    halves = [half.batches(tuned.preprocess, AT_ONCE) for half in set_apart(open_images("zoo:fashion_test"), 0)]
    probe = transfer(model, qmodel, *halves, device=tuned.device)[0]
    row: dict[str, Any] = {"name": name, "bits": bits, "seed": seed, "side": tuned.side}
    row |= {"train_images": len(tuned.train), "images": found.images, "steps": training.steps if training else 0}
    row |= {"top1": text(found.top1), "top1_float": text(reference.top1)}
    row |= told("minus_float", paired_difference(found.predictions.correct, right))
    if latent:
        row |= {"latent": text(latent[0].top1)}
        row |= told(
            "latent_minus_float", paired_difference(latent[0].predictions.correct, reference.predictions.correct)
        )
    row |= {"transfer": text(probe.top1), "transfer_float": text(probe.top1_float)}
    row |= told("transfer_minus_float", probe.difference)
    return row | {"seconds": text(seconds), "batch": BATCH if trains else "", "kind": "simulated"}


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/cifar10_tuned.py --recipes gplq lsq")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--bits", nargs="+", default=["w4a4"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--side", type=int, default=96, help="of the images, in pixels (default 96)")
    options.add_argument("--train-images", type=int, default=5_000)
    options.add_argument("--test-images", type=int, default=2_000)
    options.add_argument("--float-epochs", type=int, default=3)
    options.add_argument("--device", default="cpu")
    options.add_argument("--store", type=Path, default=default_store(), help="float models (default: %(default)s)")
    args = options.parse_args()
    shared = Shared(args.shared)
    folder = shared.path / "data" / "cifar10"
    if shared.missing or not folder.is_dir():
        options.error(f"nothing can be measured: {shared.missing or 'data/cifar10 is not there'}")
    if args.store.resolve().is_relative_to(ROOT):
        options.error("--store must be outside of the repository: it holds data that is not ours to publish")
    counts = (64, 50) if args.quick else (args.train_images, args.test_images)
    train, test = (
        open_images(folder / f"{part}.parquet", num_classes=CLASSES).sample(count, 0)
        for part, count in zip(("train", "test"), counts, strict=True)
    )
    epochs = 1 if args.quick else args.float_epochs
    tuned = Tuned(shared, args.side, train, test, args.store, epochs, torch.device(args.device))
    origin, file = shared.weights() | {"device": args.device} | provenance(), results_folder(args) / "cifar10_tuned.csv"
    steps = Steps(1 + len(args.recipes) * len(args.bits) * len(args.seeds))
    model = tuned.model(steps)
    reference = tuned.judged(model)
    steps.step(f"float: top-1 {reference.top1:.2f} %")
    for bits in args.bits:
        for seed in args.seeds:
            for name in args.recipes:
                row = measure(tuned, model, reference, name, bits, seed)
                append_rows(file, [row | {"float_epochs": epochs} | origin], KEY)
                steps.step(
                    f"{name} {bits} seed {seed}, minus float: top-1 {row['minus_float']}, latent "
                    f"{row.get('latent_minus_float', '-')}, transfer {row['transfer_minus_float']}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
