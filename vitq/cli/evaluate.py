"""vitq evaluate and compare: how good a model is, and against what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vitq.artifact import load
from vitq.cli import app as a
from vitq.cli import tasks, work
from vitq.cli.console import Say, check_folder, check_outputs, command, write_json
from vitq.cli.quantize import evaluate as evaluate_both
from vitq.core.errors import DataError, InputError, UnknownNameError
from vitq.core.qmodel import QuantModel
from vitq.data.checkpoint import load_checkpoint
from vitq.data.images import ImageSet
from vitq.data.native import photo_input
from vitq.data.preprocess import Preprocess
from vitq.data.source import build_model
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.compare import compare as compare_predictions
from vitq.evaluate.fidelity import fidelity as measure_fidelity
from vitq.evaluate.predictions import Predictions, read_predictions, write_predictions


def open_target(
    target: str, checkpoint: Path | None, device: torch.device, trust_code: bool, say: Say
) -> tuple[nn.Module, nn.Module | None, Preprocess, int | None]:
    """The model, its float model where there is one, and its preprocessing and class count."""
    if not work.is_artifact(target):
        loaded = work.open_model(target, checkpoint, device, say)
        if loaded.preprocess is None and photo_input(loaded.model):
            raise work.takes_photos(target)
        return loaded.model, None, work.need_preprocess(loaded.preprocess, target), loaded.num_classes
    qmodel = load(target, trust_code=trust_code).to(device)
    preprocess = work.preprocess_of(qmodel, target)
    float_model = float_of(qmodel, checkpoint, trust_code, say).to(device) if checkpoint else None
    classes = (qmodel.source or {}).get("num_classes")
    return qmodel, float_model, preprocess, classes if isinstance(classes, int) else None


def float_of(qmodel: QuantModel, checkpoint: Path | None, trust_code: bool, say: Say) -> nn.Module:
    """The float model of an artifact: from its checkpoint, or by its name where it has none.

    Raises:
        InputError: the artifact does not name its model, or was made from another file.
    """
    source = qmodel.source or {}
    if "spec" not in source:
        raise InputError("the artifact does not name its model; its float model cannot be built")
    old = source.get("checkpoint") or {}
    if checkpoint is None:
        if old:
            raise InputError(
                f"an artifact holds no float weights: name the file it was made from ({old.get('file')}) with "
                f"--checkpoint"
            )
        if source.get("kind") in ("zoo", "file"):
            return build_model(source, trust_code=trust_code)
        return work.open_model(str(source["spec"]), None, torch.device("cpu"), say).model
    say.note(f"loading {source['spec']} with {checkpoint}")
    model = build_model(source, trust_code=trust_code)
    new = load_checkpoint(model, checkpoint, num_classes=source.get("num_classes"))
    if old.get("sha256") not in (None, new["sha256"]):
        raise InputError(f"{checkpoint} is not the file that was quantized ({old.get('file')}): their digests differ")
    return model


@a.app.command()
@command
def evaluate(
    target: a.Target,
    data: Annotated[
        str,
        typer.Option(
            help=f"Labelled images. {a.DATA_HELP} For detect and instances, COCO's JSON; for segment, masks; "
            "zoo:scenes_test for these three."
        ),
    ],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(tasks.TASKS)}.")] = "classify",
    images: Annotated[
        Path | None, typer.Option(help="The photos that --data is about, for the tasks but classify.")
    ] = None,
    checkpoint: a.Checkpoint = None,
    size: a.Size = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many photos, for the tasks but classify.")
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder for PNGs of the first {tasks.DRAWN} photos and what was found, float beside quantized."
        ),
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write file,label,predicted to this CSV file.")] = None,
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="Also compare with the float model without labels.")
    ] = False,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    skip_bad: a.SkipBad = False,
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Measure top-1 and top-5, box and mask AP, or mIoU, with an interval over images.

    For an artifact, --checkpoint names the float weights it was made from: then both are measured in the same
    run, and paired. Models that file.py:function returns bring theirs.

        vitq evaluate out/ --data val/ --checkpoint deit_tiny.safetensors --predictions out.csv

        vitq evaluate deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors --data val/

        vitq evaluate out/ --task instances --data instances.json --images photos/ --draw drawn/

        vitq evaluate zoo:scenes_maskrcnn --task instances --data zoo:scenes_test
    """
    say = Say(quiet)
    check_outputs(predictions, json)
    check_folder(draw)
    where = work.choose_device(device)
    if task not in tasks.TASKS:
        raise UnknownNameError("task", task, tasks.TASKS)
    if task != "classify":
        if predictions is not None or skip_bad:
            raise InputError(f"--predictions and --skip-bad are for --task classify, not for {task}")
        asked = tasks.Asked(target, task, data, images, checkpoint, size, limit, fidelity, draw, where, trust_code)
        write_json(json, tasks.evaluate_task(asked, float_of, say))
        return
    if any(given is not None for given in (images, size, limit, draw)):
        raise InputError("--images, --size, --limit and --draw are for --task detect, instances and segment")
    model, float_model, preprocess, classes = open_target(target, checkpoint, where, trust_code, say)
    if fidelity and float_model is None:
        raise InputError("--fidelity compares an artifact with its float model; give DIR and --checkpoint")
    scored = work.labelled(data, classes, skip_bad)
    if isinstance(model, QuantModel):
        scored = without_calibration(model, scored, data, say)
    kind = "simulated" if isinstance(model, QuantModel) else "float"
    result: dict[str, Any] = {"model": target, "kind": kind}
    batches = scored.batches(preprocess, batch_size, skip_bad=skip_bad)
    if float_model is not None and isinstance(model, QuantModel):
        pair = evaluate_both(float_model, model, batches, len(scored), where, say)
        result |= pair.to_json()
        measured: ClassifyResult = pair.quantized
        if fidelity:
            unlabelled = (b.images.to(where) for b in scored.batches(preprocess, batch_size, skip_bad=skip_bad))
            result["fidelity"] = measure_fidelity(float_model, model, unlabelled, say).to_json()
            say.table(sorted(result["fidelity"]["sites"], key=lambda s: s["sqnr"])[:10], title="lowest SQNR, dB")
    else:
        measured = run_one(model, batches, len(scored), where, say)
        result |= measured.to_json()
    work.say_skipped(scored, data, say)
    low, high = result["top1_interval"]
    say.result(
        f"{target} ({kind}): top-1 {result['top1']:.2f} % [{low:.2f}, {high:.2f}], top-5 {result['top5']:.2f} % on "
        f"{result['images']} images" + (f"; float {result['top1_float']:.2f} %" if "top1_float" in result else "")
    )
    if predictions is not None:
        write_predictions(predictions, measured.predictions)
    write_json(json, result)


@a.app.command()
@command
def compare(
    targets: Annotated[list[str], typer.Argument(metavar="DIR|FILE.csv …", help="Artifacts and prediction files.")],
    data: Annotated[str | None, typer.Option(help="Labelled images; needed as soon as an artifact is named.")] = None,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Pair artifacts and prediction files image by image.

    vitq compare out_a/ out_b/ official.csv --data val/
    """
    say = Say(quiet)
    check_outputs(json)
    where = work.choose_device(device)
    if len(targets) < 2:
        raise InputError("compare needs at least two artifacts or prediction files")
    for target in targets:
        if targets.count(target) > 1:
            raise InputError(f"{target} is named twice")
        if data is None and not target.endswith(".csv"):
            raise InputError(f"{target} is no .csv file, so it is run: say on which images with --data")
    read = {target: read_predictions(Path(target)) for target in targets if target.endswith(".csv")}
    found: dict[str, Predictions] = {}
    for target in targets:
        if target in read:
            found[target] = read[target]
            continue
        assert data is not None
        model, _, preprocess, classes = open_target(target, None, where, trust_code, say)
        images = work.labelled(data, classes, skip_bad=False)
        if isinstance(model, QuantModel):
            images = without_calibration(model, images, data, say)
        found[target] = run_one(model, images.batches(preprocess, batch_size), len(images), where, say).predictions
    comparison = compare_predictions(found)
    say.table(comparison.rows())
    say.table(comparison.pair_rows())
    write_json(json, comparison.to_json())


def without_calibration(qmodel: QuantModel, images: ImageSet, data: str, say: Say) -> ImageSet:
    """Leave out the images that an artifact was calibrated on.

    Raises:
        DataError: nothing is left.
    """
    kept = work.not_calibrated(qmodel, images)
    if len(kept) < len(images):
        say.note(f"{len(images) - len(kept)} images of {data} were calibrated on; they are left out")
    if not kept:
        raise DataError(f"{data}: every image was calibrated on; give others")
    return images.subset(kept) if len(kept) < len(images) else images


def run_one(model: nn.Module, batches: Any, count: int, device: torch.device, say: Say) -> ClassifyResult:
    """One model over images, with progress."""
    with say.counted("evaluating", count) as tell:
        return evaluate_classifier(model, batches, on_batch=tell, device=device)
