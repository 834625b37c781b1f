"""vitq train: quantize by a recipe that trains, on images of one's own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import nn

from vitq.artifact import check_destination
from vitq.cli import app as a
from vitq.cli import feed, work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.quantize import Finish, about, report
from vitq.cli.recipes import Asked
from vitq.cli.tasks import TASKS
from vitq.core.errors import InputError
from vitq.core.training import EVERY, Training, TrainingPass
from vitq.data.images import ImageSet
from vitq.data.native import PhotoInput
from vitq.data.preprocess import Preprocess
from vitq.evaluate.classify import evaluate_classifier, evaluate_pair
from vitq.pipeline import quantize

CLASSIFY = TASKS[0]
LOOKED_AT = 256  # images of the evaluation, along the way

HELP = """Quantize a model by a recipe that trains, and save it as a packed artifact.

Examples:

    vitq train deit_small_patch16_224 --recipe gplq --bits w4a4 --train photos/ --eval val/ --out out/

    vitq train deit_small_patch16_224 --train photos/ --labels none --epochs 3 --augment crop --out out/

    vitq train deit_small_patch16_224 --train photos/ --out out/ --resume

    vitq train zoo:scenes_maskrcnn --task instances --train zoo:scenes_calib --train-batch 4 --out out/

    accelerate launch --num_processes 4 -m vitq.cli train deit_base_patch16_224 --train photos/ --out out/

The state of the run is kept beside the artifact (OUT.training.0) every minute. An interrupted run goes on from there
with --resume, to the same weights. The model stays in evaluation mode, and learns from its own float version; labels
are used where there are any. Detectors and segmenters learn by the loss that they bring, photo by photo.
"""


@a.app.command("train", help=HELP)
@command
def train_command(
    model: a.Model,
    train: Annotated[
        str, typer.Option(help=f"Training images. {a.DATA_HELP} For --task: COCO's JSON, or a folder of masks.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    recipe: a.Recipe = "gplq",
    bits: a.Bits = "w4a4",
    task: Annotated[
        str,
        typer.Option(help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}: a detector or segmenter has a loss of its own."),
    ] = CLASSIFY,
    images: Annotated[
        Path | None, typer.Option(help="For a detector or segmenter: the photos that --train says what is in.")
    ] = None,
    size: a.Size = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often each image is seen.")] = 1,
    train_batch: Annotated[
        int, typer.Option(min=1, help="Images in a step of the optimizer, over all processes.")
    ] = 16,
    micro_batch: Annotated[int, typer.Option(min=1, help="Of them so many go through the model at a time.")] = 16,
    augment: Annotated[str, typer.Option(help="none, crop (and flip), or deit (as DeiT was trained).")] = "none",
    labels: Annotated[str, typer.Option(help="auto uses labels where there are any; none does not.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the forward: no (float32) or bf16.")] = "no",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run blocks again in the backward: less memory, more time.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")] = False,
    calib_size: Annotated[
        int, typer.Option(min=1, help="How many of the training images, drawn by the seed, ranges begin with.")
    ] = 32,
    eval_data: Annotated[str | None, typer.Option("--eval", help=f"Labelled images. {a.DATA_HELP}")] = None,
    looks: Annotated[
        int, typer.Option(min=0, help=f"Measure on {LOOKED_AT} of them before, and after so many parts of the run.")
    ] = 4,
    basin: Annotated[
        bool, typer.Option("--basin", help="Also evaluate the trained weights in float, without any quantizers.")
    ] = False,
    checkpoint: a.Checkpoint = None,
    option: a.Options = None,
    exclude: a.Exclude = None,
    override: a.Set = None,
    seed: a.Seed = 0,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    skip_bad: a.SkipBad = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact, and forget an interrupted run, that are there.")
    ] = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """See HELP."""
    if task not in TASKS:
        raise InputError(f"--task {task!r}: use {', '.join(TASKS[:-1])} or {TASKS[-1]}")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = int(os.environ.get("RANK", "0")) if several else 0  # of several processes the first one speaks and writes
    say = Say(quiet or rank > 0)
    check_outputs(json)
    if labels not in ("auto", "none"):
        raise InputError(f"--labels {labels!r}: use auto or none")
    if basin and eval_data is None:
        raise InputError("--basin evaluates the trained weights in float; say on which images with --eval")
    asked = Asked.of(recipe, bits, option, exclude, override, seed)
    state = out.parent / f"{out.name}.training"
    trains = [spec for spec in asked.plan.passes if isinstance(spec.build(), TrainingPass)]
    states = [out.parent / f"{state.name}.{number}" for number in range(len(trains))]
    if rank == 0:
        check_destination(out, force=force)
        kept = [file for file in states if file.exists()]
        if kept and not resume and not force:
            raise InputError(f"{kept[0]} is of an interrupted run; go on with --resume, or begin anew with --force")
        if resume and not kept:
            say.note("no run was interrupted here; this one begins")
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    use_own = several and device == "auto" and torch.cuda.is_available()
    where = work.choose_device(local if use_own else device)
    loaded = work.open_model(model, checkpoint, where, say)
    with TemporaryDirectory(prefix="vitq-scenes-") as scratch:
        wanted = feed.Asked(task, train, images, size, augment, labels, workers, calib_size, seed, skip_bad)
        if task == CLASSIFY:
            fed = feed.of_images(wanted, model, loaded, where, say)
        else:
            fed = feed.of_photos(wanted, model, loaded, where, Path(scratch), say)
            micro_batch = 1  # photos have sizes of their own
        training = Training(
            fed.examples, epochs, train_batch, micro_batch, precision, recompute,
            file=state, resume=resume, every=EVERY, loss=fed.loss,
        )  # fmt: skip
        scored = None
        if eval_data is not None:
            if isinstance(fed.prepare, PhotoInput):
                raise InputError(f"{model} finds things in photos: measure it with vitq evaluate {out} --task {task} …")
            scored = work.evaluation(eval_data, fed.images, loaded.num_classes, skip_bad, say)
            judge = Judge(loaded.model, fed.prepare, batch_size, where, skip_bad, say)
            few = scored[0].sample(min(LOOKED_AT, len(scored[0])), seed)
            training = replace(
                training,
                measure=partial(judge.short, few) if looks else None,
                looks=looks or 1,
                latent=partial(judge.whole, scored[0]) if basin else None,
            )
        say.note("passes: " + ", ".join(map(str, asked.plan.passes)))
        say.note(f"{training.steps} steps of {train_batch} of {len(fed.images)} images, {fed.told}")

        if rank == 0 and force and not resume:
            remove(states)
        start = time.perf_counter()
        qmodel = quantize(loaded.model, asked.recipe, data=fed.data, progress=say, training=training, **asked.more)
        seconds = time.perf_counter() - start
        if rank > 0:
            return
        for told in qmodel.log.get("train", []):
            if told.get("diverged"):
                say.note(
                    f"training diverged at step {told['diverged']}; the weights of step {told['kept']} are kept. Lower "
                    f"rates (--option rate=…, scale_rate=…)"
                )
            if "latent" in told:
                say.result(
                    "without quantizers the trained weights reach {top1:.2f} %, and the model as it was "
                    "{top1_float:.2f} % (difference {mean:+.2f} [{low:+.2f}, {high:+.2f}])".format(**told["latent"])
                )
        result = about(qmodel, loaded.model, fed.data, seconds) | {
            "model": model,
            "device": str(where),
            "training_images": len(fed.images),
            "epochs": epochs,
            "labels": "used" if fed.examples.labelled else "none",
        }
        qmodel.source, qmodel.preprocess = loaded.source, fed.prepare.to_dict()
        # Whoever evaluates later leaves out what was trained on, as what was calibrated on.
        remembered = len(fed.images) <= feed.REMEMBERED
        qmodel.provenance = work.provenance(fed.images if remembered else fed.calib, train, seed)
        qmodel.provenance |= {"calibration_images": fed.data.count, "training_images": len(fed.images)}
        if not remembered:
            say.note(
                f"of more than {feed.REMEMBERED} images the artifact does not know which: evaluate on others yourself"
            )
        result = Finish(out, force, eval_data, batch_size, skip_bad).save_and_score(
            qmodel, loaded.model, result, scored, fed.prepare, where, say
        )
        remove(states)  # the artifact is there: nothing to go on with
        report(result, out, say)
        write_json(json, result)


@dataclass(frozen=True)
class Judge:
    """Measures a model while it is trained, and after."""

    original: nn.Module
    preprocess: Preprocess
    batch_size: int
    where: torch.device
    skip_bad: bool
    say: Say

    def short(self, images: ImageSet, model: nn.Module) -> dict[str, float]:
        """Top-1 in percent."""
        batches = images.batches(self.preprocess, self.batch_size, skip_bad=self.skip_bad)
        found = evaluate_classifier(model, batches, device=self.where)
        assert found.top1 is not None
        self.say.note(f"top-1 {found.top1:.2f} % on {found.images} images")
        return {"images": found.images, "top1": found.top1}

    def whole(self, images: ImageSet, model: nn.Module) -> dict[str, float]:
        """Top-1 of the model and of the original one in percent, and the difference in points, paired."""
        batches = images.batches(self.preprocess, self.batch_size, skip_bad=self.skip_bad)
        pair = evaluate_pair(self.original, model, batches, device=self.where)
        assert pair.difference is not None
        assert pair.quantized.top1 is not None
        assert pair.float.top1 is not None
        found = {"images": pair.quantized.images, "top1": pair.quantized.top1, "top1_float": pair.float.top1}
        return found | {"mean": pair.difference.mean, "low": pair.difference.low, "high": pair.difference.high}


def remove(states: list[Path]) -> None:
    """Forget runs that are over."""
    for file in states:
        file.unlink(missing_ok=True)
