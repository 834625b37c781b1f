"""Measures how accurate the recipes are, and how far from official code: results/accuracy.csv, results/paired.csv.

DeiT-Tiny with real weights, calibrated on the very files, in the very order, that official code was calibrated on
(seeds 0 to 2), evaluated on photos that neither has seen. The float model runs on the same tensors in the same
process. Everything is simulated.

accuracy.csv   a row per recipe, bits, seed and split, and one over all seeds and splits
paired.csv     each recipe minus official code (where its predictions are stored) and minus our repq_vit, same seed,
               bits and images. Where several seeds are pooled, each image
               counts once, with the mean of its differences over the seeds, and images are what is resampled; `limit`
               is what `low` must stay above, and is set for that row alone

What is there for this commit is not measured again, unless --force is given.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _common import IMAGES, MODEL, SPLITS, Shared, Steps, bootstrap, parser, provenance, results_folder, top
from torch import Tensor

import vitq
from vitq.core.errors import VitqError
from vitq.core.format import Bits
from vitq.data.images import Batch, open_images
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.metrics import logit_kl
from vitq.evaluate.predictions import Predictions, align, read_predictions, write_predictions
from vitq.report.table import append_rows, read_results

PARITY = "repq_vit_parity"
REFERENCE = "repq_vit"
# Recipe -> official code whose predictions are stored.
PEERS = {REFERENCE: "repq-vit", PARITY: "repq-vit", "erq": "erq", "uq_vit": "uq-vit"}
# Name in the tables -> recipe and options. Two switch one part of DopQ-ViT off; the last one leaves probabilities in
# float, which is more than any format for them can reach.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("repq_vit", {}),
    PARITY: ("repq_vit", {"parity": True}),
    "minmax": ("minmax", {}),
    "percentile": ("percentile", {}),
    "dopq_vit": ("dopq_vit", {}),
    "erq": ("erq", {}),
    "uq_vit": ("uq_vit", {}),
    "vitq_calib": ("vitq_calib", {}),
    "dopq_vit_mean": ("dopq_vit", {"aggregate": "mean"}),
    "dopq_vit_log": ("dopq_vit", {"softmax": "logsqrt2"}),
    "repq_vit_softmax_float": ("repq_vit", {}),
}
EXCLUDED = {"repq_vit_softmax_float": ("role=SOFTMAX_OUT",)}  # sites left in float
ABLATIONS = ("dopq_vit_mean", "dopq_vit_log", "repq_vit_softmax_float")
ABLATED_AT = ("w4a4", "w3a3")
LIMITS = {"w4a4": -3.0, "w6a6": -1.5}  # of the lower end of ours minus official code, in points
MEASURED = ("top1_float", "recovery", "agreement", "logit_kl", "seconds", "bytes", "weight_bits", "act_bits")
KEY = ("model", "recipe", "bits", "seed", "split")
PAIRED_KEY = (*KEY, "peer")


@dataclass
class Scores:
    """One model on one split, image by image."""

    result: ClassifyResult
    against: dict[str, float]  # the float model: its top-1, recovery, agreement, KL


@dataclass
class Bench:
    """One run: what is measured, and where it goes."""

    shared: Shared
    out: Path
    splits: list[str]
    seeds: list[int]
    limit: int | None  # images of each split
    calib: int
    predictions: Path | None
    steps: Steps
    floats: dict[str, ClassifyResult] = field(default_factory=dict)
    references: dict[str, dict[tuple[int, str], Scores]] = field(default_factory=dict)  # bits -> REFERENCE's scores

    def __post_init__(self) -> None:
        self.loaded = self.shared.model()
        self.batches = cache(self._batches)
        self.calibration = cache(self._calibration)

    @property
    def pooled(self) -> dict[str, str]:
        """How the row over all seeds and splits is called."""
        return {"seed": " ".join(map(str, self.seeds)), "split": "+".join(self.splits)}

    def _batches(self, split: str) -> list[Batch]:
        images = open_images(self.shared.sample / split, num_classes=self.loaded.num_classes)
        if self.limit is not None:  # evenly spread, as the folder is sorted by class
            images = images.subset(range(0, len(images), -(-len(images) // self.limit)))
        return list(images.batches(self.loaded.preprocess, 50))

    def _calibration(self, seed: int) -> Tensor:
        return self.shared.calibration(seed).subset(range(self.calib)).tensor(self.loaded.preprocess)

    def record(self, where: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Where a number comes from; the float model has no seed."""
        seeds = str(where["seed"]).replace(" ", ",")
        lists = f"{self.calib} of calibration_seed{'{' + seeds + '}' if ',' in seeds else seeds}.txt" if seeds else ""
        kind, photos = "simulated" if seeds else "float", f"{count} of imagenet_sample/{where['split']}"
        return {"kind": kind, "evaluation": photos} | self.shared.weights() | {"calibration": lists} | provenance()

    def there(self, recipe: str, bits: str) -> bool:
        """Whether this very code has measured a group already; its last row tells."""
        file, commit = self.out / "accuracy.csv", str(provenance()["commit"])
        if commit.endswith("+dirty") or not file.exists():  # dirty trees differ, whatever their name
            return False
        images = sum(len(batch.ids) for split in self.splits for batch in self.batches(split))
        wanted = {"model": MODEL, "recipe": recipe, "bits": bits, "commit": commit, **self.pooled}
        same = self.record(self.pooled, images)
        wanted |= {key: str(value) for key, value in same.items() if key != "load_before"}
        known = any(all(row.get(k) == v for k, v in wanted.items()) for row in read_results(file))
        return known and all(f.exists() for s in self.seeds for p in self.splits for f in self.kept(recipe, bits, s, p))

    def kept(self, recipe: str, bits: str, seed: int, split: str) -> list[Path]:
        """Where predictions go, if they were asked for."""
        return [self.predictions / split / f"{recipe}_{bits}_seed{seed}.csv"] if self.predictions else []

    def float_model(self) -> None:
        """The float model on every split, once in this process."""
        rows = []
        for split in self.splits:
            found = evaluate_classifier(self.loaded.model, self.batches(split), keep_logits=True)
            self.floats[split] = found
            row = {"model": MODEL, "recipe": "float", "bits": "", "seed": "", "split": split, "images": found.images}
            rows.append(row | top(found) | dict.fromkeys(MEASURED, "") | self.record(row, found.images))
            self.steps.step(f"float on {split}: top-1 {found.top1:.2f} %")
        append_rows(self.out / "accuracy.csv", rows, KEY)

    def group(self, recipe: str, bits: str) -> None:
        """One recipe at one width, with all seeds."""
        name, options = RECIPES[recipe]
        scores: dict[tuple[int, str], Scores] = {}
        rows: list[dict[str, Any]] = []
        for seed in self.seeds:
            images = self.calibration(seed)
            start = time.perf_counter()
            qmodel = vitq.quantize(
                self.loaded.model, name, bits, images, options=options, seed=seed, exclude=EXCLUDED.get(recipe, ())
            )
            cost = {"seconds": round(time.perf_counter() - start, 3)} | self.size(qmodel)
            for split in self.splits:
                found = scores[seed, split] = self.score(qmodel, split)
                for file in self.kept(recipe, bits, seed, split):
                    write_predictions(file, found.result.predictions)
                row = {"model": MODEL, "recipe": recipe, "bits": bits, "seed": seed, "split": split}
                row |= {"images": found.result.images} | top(found.result) | found.against
                rows.append(row | cost | self.record(row, found.result.images))
                append_rows(self.out / "accuracy.csv", rows[-1:], KEY)
            said = ", ".join(f"{s} {scores[seed, s].result.top1:.2f}" for s in self.splits)
            self.steps.step(f"{recipe} {bits} seed {seed}: top-1 {said} %, calibrated in {cost['seconds']:.1f} s")
        if recipe in PEERS:
            self.pair_with_official(recipe, bits, scores)
        if recipe == REFERENCE:
            self.references[bits] = scores
        elif bits in self.references:
            theirs = {where: found.result.predictions for where, found in self.references[bits].items()}
            self.pair(recipe, bits, scores, theirs, REFERENCE, None)
        # Last: this row says that all of the group is there.
        append_rows(self.out / "accuracy.csv", [self.pool(rows, scores)], KEY)

    def score(self, qmodel: vitq.QuantModel, split: str) -> Scores:
        """The quantized model, and how close it is to the float one."""
        found, reference = evaluate_classifier(qmodel, self.batches(split), keep_logits=True), self.floats[split]
        assert found.logits is not None
        assert reference.logits is not None
        same = found.predictions.predicted == reference.predictions.predicted
        kl = float(logit_kl(reference.logits, found.logits).mean())
        top1 = reference.top1 or float("nan")
        against = {"top1_float": round(top1, 4), "recovery": round((found.top1 or 0) / top1, 4)}
        against |= {"agreement": round(100 * float(same.double().mean()), 4), "logit_kl": float(f"{kl:.4g}")}
        return Scores(found, against)

    def size(self, qmodel: vitq.QuantModel) -> dict[str, Any]:
        """Bytes on disk of all files, and effective bits with side information."""
        assert self.loaded.preprocess is not None
        qmodel.source, qmodel.preprocess = self.loaded.source, self.loaded.preprocess.to_dict()
        with tempfile.TemporaryDirectory() as folder:
            saved = vitq.save(qmodel, Path(folder) / "out")
        bits = saved["effective_bits"]
        return {"bytes": saved["bytes"], "weight_bits": round(bits["weight"], 4), "act_bits": round(bits["act"], 4)}

    def pool(self, rows: list[dict[str, Any]], scores: dict[tuple[int, str], Scores]) -> dict[str, Any]:
        """The row over all seeds and splits; an image counts once, with its mean over the seeds."""
        right = {where: found.result.predictions.correct for where, found in scores.items()}
        correct = self.stacked(right)
        top1, low, high = bootstrap(correct)
        total = sum(row["images"] for row in rows)
        row = rows[0] | self.pooled | {"images": correct.shape[1], "top1": top1, "top1_low": low, "top1_high": high}
        for key in ("top5", "top1_float", "agreement", "logit_kl"):
            row[key] = round(sum(r["images"] * r[key] for r in rows) / total, 4)
        row |= {"recovery": round(top1 / row["top1_float"], 4), "bytes": max(r["bytes"] for r in rows)}
        row["seconds"] = statistics.median(r["seconds"] for r in rows)
        return row | self.record(self.pooled, correct.shape[1])

    def stacked(self, values: Mapping[tuple[int, str], Tensor]) -> Tensor:
        """(seeds, images of all splits)."""
        return torch.stack([torch.cat([values[s, p].double() for p in self.splits]) for s in self.seeds])

    def pair_with_official(self, recipe: str, bits: str, scores: dict[tuple[int, str], Scores]) -> None:
        """Ours minus official code, if its predictions are stored."""
        theirs, peer = {}, PEERS[recipe]
        for seed, split in scores:
            file = self.shared.peers / split / f"{peer}_{bits}_seed{seed}.csv"
            if not file.exists():
                self.steps.say(f"no {file.name} for {split}: {recipe} {bits} is not paired with official code")
                return
            theirs[seed, split] = read_predictions(file)
        self.pair(recipe, bits, scores, theirs, peer, LIMITS.get(bits))

    def pair(
        self,
        recipe: str,
        bits: str,
        scores: dict[tuple[int, str], Scores],
        theirs: Mapping[tuple[int, str], Predictions],
        peer: str,
        limit: float | None,
    ) -> None:
        """Differences for each split and seed, and for all of them."""
        differences: dict[tuple[int, str], Tensor] = {}
        rows = []
        for (seed, split), found in scores.items():
            both = align([found.result.predictions, theirs[seed, split]])
            if len(both.ids) != found.result.images:
                raise VitqError(f"{peer} {bits} seed {seed} lacks {both.left_out[0]} images of {split}")
            ours, others = ((each == both.labels).double() for each in both.predicted)
            differences[seed, split] = ours - others
            rows.append(self.paired_row(recipe, bits, (ours - others)[None], None, seed=seed, split=split, peer=peer))
        rows.append(self.paired_row(recipe, bits, self.stacked(differences), limit, **self.pooled, peer=peer))
        append_rows(self.out / "paired.csv", rows, PAIRED_KEY)
        told = "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format_map(rows[-1])
        told += "" if limit is None else ", must stay above {limit}: {met}".format_map(rows[-1])
        self.steps.say(f"{recipe} {bits} minus {peer}: {told}")

    def paired_row(self, recipe: str, bits: str, values: Tensor, limit: float | None, **where: Any) -> dict[str, Any]:
        (mean, low, high), count = bootstrap(values), values.shape[1]
        met = "" if limit is None else "yes" if low > limit else "no"
        row = {"model": MODEL, "recipe": recipe, "bits": bits, **where, "images": count}
        return row | {"mean": mean, "low": low, "high": high, "limit": limit, "met": met} | self.record(where, count)


def main() -> int:
    """Entry point; 0 also where a limit is not met, which is for the reader to see."""
    options = parser(__doc__, "example: python benchmarks/accuracy.py --recipes repq_vit --bits w4a4 --splits report")
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which recipes")
    options.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4", "w3a3"], help="widths")
    options.add_argument("--seeds", nargs="+", type=int, choices=(0, 1, 2), default=[0, 1, 2], help="calibration lists")
    options.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="photos to evaluate on")
    options.add_argument("--predictions", type=Path, help="folder for predictions, image by image")
    options.add_argument("--force", action="store_true", help="measure what is there for this commit again, too")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    try:
        bits = [str(Bits.parse(each)) for each in dict.fromkeys(args.bits)]
        wanted = [r for r in RECIPES if r in args.recipes]  # the reference first
        only = {PARITY: tuple(LIMITS)} | dict.fromkeys(ABLATIONS, ABLATED_AT)
        pairs = [(r, b) for b in bits for r in wanted if b in only.get(r, bits)]
        splits, seeds = sorted(set(args.splits)), sorted(set(args.seeds))
        provenance()  # before anything changes
        steps = Steps(len(splits))
        limit, calib = (6, 4) if args.quick else (None, IMAGES)
        bench = Bench(shared, results_folder(args), splits, seeds, limit, calib, args.predictions, steps)
        todo = [pair for pair in pairs if args.force or not bench.there(*pair)]
        steps.say(f"{len(todo)} of {len(pairs)} groups to measure" + ("; the rest is there" if todo != pairs else ""))
        steps.total = (len(splits) if todo else 0) + len(todo) * len(seeds)
        if todo:
            bench.float_model()
        for pair in todo:
            bench.group(*pair)
    except VitqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
