"""vitq quantize: from a float model to a packed artifact with an honest number."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vitq.artifact import check_destination, save
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.recipes import Asked
from vitq.core.batches import Batches
from vitq.core.errors import InputError
from vitq.core.memory import peak_rss_mb
from vitq.core.qmodel import QuantModel
from vitq.core.training import TrainingPass
from vitq.data.images import ImageSet
from vitq.data.native import PhotoInput
from vitq.data.preprocess import Preprocess
from vitq.evaluate.classify import PairResult, evaluate_pair
from vitq.evaluate.cost import float_forward_seconds
from vitq.pipeline import quantize

HELP = """Quantize a model and save it as a packed artifact.

Examples:

    vitq quantize deit_small_patch16_224 --recipe repq_vit --bits w4a4 --calib photos/ --eval val/ --out out/

    vitq quantize deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors --calib photos/ --out out/

    vitq quantize deit_tiny_patch16_224 --calib photos/ --out out/ --set role=HEAD_IN:w8a8 --exclude patch_embed

    vitq quantize my_models.py:build --recipe my_recipe.py:mine --bits w3a3 --calib photos/ --out out/

    vitq quantize my_models.py:mask_rcnn --scope backbone --calib photos/ --out out/

Preprocessing is the model's own; detectors and segmenters calibrate on photos at their own sizes. With --eval, float
and quantized accuracy are measured in the same run; images that were calibrated on are left out of it.
"""


@a.app.command("quantize", help=HELP)
@command
def quantize_command(
    model: a.Model,
    calib: a.Calib,
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    recipe: a.Recipe = "repq_vit",
    bits: a.Bits = "w4a4",
    calib_size: a.CalibSize = 32,
    eval_data: Annotated[str | None, typer.Option("--eval", help=f"Labelled images. {a.DATA_HELP}")] = None,
    checkpoint: a.Checkpoint = None,
    option: a.Options = None,
    exclude: a.Exclude = None,
    override: a.Set = None,
    scope: a.Scope = None,
    size: a.Size = None,
    seed: a.Seed = 0,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    skip_bad: a.SkipBad = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """See HELP."""
    say = Say(quiet)
    check_outputs(json)
    asked = Asked.of(recipe, bits, option, exclude, override, seed, scope)
    check_destination(out, force=force)
    where = work.choose_device(device)
    loaded = work.open_model(model, checkpoint, where, say)
    preprocess = work.input_of(loaded, model, size)
    if isinstance(preprocess, PhotoInput):
        if eval_data is not None:
            raise InputError(f"{model} finds things in photos: measure it with vitq evaluate {out} --task … instead")
        data, images = work.photos(calib, calib_size, seed, preprocess, where, skip_bad, say)
    else:
        data, images = work.calibration(calib, calib_size, seed, preprocess, where, skip_bad, say)
    scored = work.evaluation(eval_data, images, loaded.num_classes, skip_bad, say) if eval_data else None
    say.note("passes: " + ", ".join(map(str, asked.plan.passes)))
    if any(isinstance(spec.build(), TrainingPass) for spec in asked.plan.passes):
        say.note(f"{recipe} trains, here for one epoch on the calibration images; `vitq train` takes more")

    start = time.perf_counter()
    qmodel = quantize(loaded.model, asked.recipe, data=data, progress=say, **asked.more)
    result = about(qmodel, loaded.model, data, time.perf_counter() - start) | {"model": model, "device": str(where)}
    qmodel.source, qmodel.preprocess = loaded.source, preprocess.to_dict()
    qmodel.provenance = work.provenance(images, calib, seed)
    finish = Finish(out, force, eval_data, batch_size, skip_bad)
    result = finish.save_and_score(qmodel, loaded.model, result, scored, preprocess, where, say)
    report(result, out, say)
    write_json(json, result)


def about(qmodel: QuantModel, float_model: nn.Module, data: Batches, seconds: float) -> dict[str, Any]:
    """What a result says before anything was evaluated."""
    return {
        "recipe": qmodel.plan.recipe.name,
        "bits": qmodel.plan.bits,
        "kind": "simulated",
        "calibration_images": data.count,
        "seed": qmodel.plan.seed,
        "seconds": round(seconds, 3),
        "float_forward_seconds": round(float_forward_seconds(float_model, data), 4),
        "peak_rss_mb": peak_rss_mb(),
    }


@dataclass(frozen=True)
class Finish:
    """What is done with a quantized model: where it goes, and on what it is evaluated."""

    out: Path
    force: bool
    eval_data: str | None
    batch_size: int
    skip_bad: bool

    def save_and_score(
        self,
        qmodel: QuantModel,
        float_model: nn.Module,
        result: dict[str, Any],
        scored: tuple[ImageSet, list[str]] | None,
        preprocess: Preprocess | PhotoInput,
        where: torch.device,
        say: Say,
    ) -> dict[str, Any]:
        """Saved before it is evaluated, so that an interrupted evaluation loses nothing, and again after."""
        note_gaps(qmodel, say)
        result |= save(qmodel, self.out, force=self.force, metrics=result)
        if scored is not None and isinstance(preprocess, Preprocess):
            say.note(f"saved in {self.out}")
            evaluation, left_out = scored
            batches = evaluation.batches(preprocess, self.batch_size, skip_bad=self.skip_bad)
            pair = evaluate(float_model, qmodel, batches, len(evaluation), where, say)
            work.say_skipped(evaluation, str(self.eval_data), say)
            result |= pair.to_json() | {"evaluation": Path(str(self.eval_data)).name, "left_out": len(left_out)}
            result |= save(qmodel, self.out, force=True, metrics=result)
        result.setdefault("images", 0)
        for key in ("top1_float", "top1", "recovery"):
            result.setdefault(key, None)
        return result


def note_gaps(qmodel: QuantModel, say: Say) -> None:
    """Say what the model lacks that the recipe would have used."""
    if not qmodel.graph.has_attention:
        say.note("no attention was found: the model is quantized all the same, as linears and convolutions")
    if unfolded := qmodel.log.get("no_norm_to_fold_into"):
        say.note(
            f"{len(unfolded)} sites have one scale each instead of one per channel, for example {unfolded[0]}: no "
            f"LayerNorm with weight and bias is there to take the channel scales up"
        )


def evaluate(float_model: Any, qmodel: QuantModel, batches: Any, count: int, device: Any, say: Say) -> PairResult:
    """Both models over the same images, with progress."""
    with say.counted("evaluating float and quantized", count) as tell:
        return evaluate_pair(float_model, qmodel, batches, on_batch=tell, device=device)


def report(result: dict[str, Any], out: Path, say: Say) -> None:
    """Print what was measured."""
    if result["top1"] is not None:
        low, high = result["top1_interval"]
        recovery = "undefined" if result["recovery"] is None else f"{result['recovery']:.3f}"
        say.result(
            f"{result['model']} {result['recipe']} {result['bits']} ({result['kind']}): top-1 {result['top1']:.2f} % "
            f"[{low:.2f}, {high:.2f}] on {result['images']} images; float {result['top1_float']:.2f} %, "
            f"recovery {recovery}"
        )
    bits = result["effective_bits"]
    forwards = result["seconds"] / max(result["float_forward_seconds"], 1e-9)
    say.result(
        f"{result['seconds']:.1f} s = {forwards:.1f} float forwards of the "
        f"{result['calibration_images']} calibration images; {result['bytes'] / 1e6:.2f} MB on disk, "
        f"{bits['weight']:.2f} bits per weight, {bits['act']:.2f} per activation; saved in {out}"
    )
