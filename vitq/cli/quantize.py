"""vitq quantize: from a float model to a packed artifact with an honest number."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vitq.artifact import check_destination, save
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, command, peak_rss_mb, write_json
from vitq.core.errors import InputError
from vitq.core.format import Scalar
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import RecipeFn
from vitq.evaluate.classify import PairResult, evaluate_pair
from vitq.pipeline import quantize, resolve

HELP = """Quantize a model and save it as a packed artifact.

Examples:

    vitq quantize deit_small_patch16_224 --recipe repq_vit --bits w4a4 --calib photos/ --eval val/ --out out/

    vitq quantize deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors --calib photos/ --out out/

    vitq quantize deit_tiny_patch16_224 --calib photos/ --out out/ --set role=HEAD_IN:w8a8 --exclude patch_embed

    vitq quantize my_models.py:build --recipe my_recipe.py:mine --bits w3a3 --calib photos/ --out out/

Preprocessing is the model's own. With --eval, float and quantized accuracy are measured in the same run;
images that were calibrated on are left out of it.
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
    asked = {
        "bits": bits,
        "exclude": exclude or (),
        "overrides": override or (),
        "options": parse_options(option or ()),
        "seed": seed,
    }
    found = find_recipe(recipe)
    plan = resolve(found, **asked)  # type: ignore[arg-type]
    check_destination(out, force=force)
    where = work.choose_device(device)
    loaded = work.open_model(model, checkpoint, where, say)
    preprocess = work.need_preprocess(loaded.preprocess, model)
    data, images = work.calibration(calib, calib_size, seed, preprocess, where, skip_bad, say)
    scored = work.evaluation(eval_data, images, loaded.num_classes, say) if eval_data else None
    say.note("passes: " + ", ".join(map(str, plan.passes)))

    start = time.perf_counter()
    qmodel = quantize(loaded.model, found, data=data, progress=say, **asked)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    peak = peak_rss_mb()
    qmodel.source, qmodel.preprocess = loaded.source, preprocess.to_dict()
    qmodel.provenance = work.provenance(images, calib, seed)
    result: dict[str, Any] = {
        "model": model,
        "recipe": plan.recipe.name,
        "bits": plan.bits,
        "kind": "simulated",
        "calibration_images": data.count,
        "seed": seed,
        "device": str(where),
        "seconds": round(seconds, 3),
        "float_forward_seconds": round(work.float_forward_seconds(loaded.model, data), 4),
        "peak_rss_mb": peak,
    }
    # Saved before it is evaluated: an interrupted evaluation loses nothing.
    result |= save(qmodel, out, force=force, metrics=result)
    if scored is not None:
        evaluation, left_out = scored
        pair = evaluate(loaded.model, qmodel, evaluation.batches(preprocess, batch_size, skip_bad=skip_bad),
                        len(evaluation), where, say)  # fmt: skip
        result |= pair.to_json() | {"evaluation": Path(str(eval_data)).name, "left_out": len(left_out)}
        result |= save(qmodel, out, force=True, metrics=result)
    result.setdefault("images", 0)
    for key in ("top1_float", "top1", "recovery"):
        result.setdefault(key, None)
    report(result, out, say)
    write_json(json, result)


def evaluate(float_model: Any, qmodel: QuantModel, batches: Any, count: int, device: Any, say: Say) -> PairResult:
    """Both models over the same images, with progress."""
    with say.task("evaluating float and quantized", count) as task:
        done = 0

        def tell(images: int) -> None:
            nonlocal done
            task.advance(images - done)
            done = images

        return evaluate_pair(float_model, qmodel, batches, on_batch=tell, device=device)


def report(result: dict[str, Any], out: Path, say: Say) -> None:
    """Print what was measured."""
    if result["top1"] is not None:
        low, high = result["top1_interval"]
        say.result(
            f"{result['model']} {result['recipe']} {result['bits']} ({result['kind']}): top-1 {result['top1']:.2f} % "
            f"[{low:.2f}, {high:.2f}] on {result['images']} images; float {result['top1_float']:.2f} %, recovery "
            f"{result['recovery'] or 0:.3f}"
        )
    bits = result["effective_bits"]
    forwards = result["seconds"] / max(result["float_forward_seconds"], 1e-9)
    say.result(
        f"{result['seconds']:.1f} s = {forwards:.1f} float forwards of the "
        f"{result['calibration_images']} calibration images; {result['bytes'] / 1e6:.2f} MB on disk, "
        f"{bits['weight']:.2f} bits per weight, {bits['act']:.2f} per activation; saved in {out}"
    )


def parse_options(pairs: Sequence[str]) -> dict[str, Scalar]:
    """KEY=VALUE pairs; numbers, true and false are read as such.

    Raises:
        InputError: not of that form.
    """
    options: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"option {pair!r} is not KEY=VALUE; write for example parity=true")
        options[key] = _scalar(value)
    return options


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def find_recipe(spec: str) -> str | RecipeFn:
    """A registered name as it is; FILE.py:FUNCTION as the function.

    Raises:
        InputError: no such file or function.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        return spec
    if not Path(path).is_file():
        raise InputError(f"recipe file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise InputError(f"{path} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return getattr(module, name)  # type: ignore[no-any-return]
