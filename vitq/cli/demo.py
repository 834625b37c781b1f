"""vitq demo: the main job on the embedded models and images, and on real weights where they are named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vitq.artifact import load, save
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.quantize import quantize_command
from vitq.core.errors import InputError, VitqError
from vitq.data.images import open_images
from vitq.data.source import load_model
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.pipeline import quantize

MODELS = ("fashion_vit", "fashion_swin")
RECIPES = ("minmax", "percentile", "repq_vit")
BITS = ("w8a8", "w4a4", "w3a3")
CALIBRATION, TEST = "zoo:fashion_calib", "zoo:fashion_test"
CALIBRATED = 32  # calibration images
IMAGES = 2_000  # test images: all that are embedded
BATCH = 100
SHARED = "deit_tiny_patch16_224"


@a.app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("out/demo"),
    shared: Annotated[
        Path | None, typer.Option(help="Folder with real weights and photos: DeiT-Tiny is quantized, too.")
    ] = None,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Quantize the embedded models with several recipes, print their accuracy, leave artifacts.

    A small ViT and a small Swin, trained on Fashion-MNIST, are calibrated on embedded training images that they
    were not trained on, and evaluated on embedded test images, each artifact as it is loaded again.

        vitq demo

        vitq demo --out out/demo --json demo.json

        vitq demo --shared ../shared
    """
    say = Say(quiet)
    check_outputs(json)
    weights, photos = _shared_files(shared) if shared is not None else (None, None)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in MODELS:
        rows += _embedded(name, out, say)
    title = f"Fashion-MNIST, {IMAGES} test images, {CALIBRATED} calibration images: top-1, simulated"
    say.table([_shown(row) for row in rows], title=title)
    bad = [f"{row['model']} {row['recipe']} {row['bits']}" for row in rows if row["reloads"] == "DIFFERS"]
    if bad:
        raise VitqError(f"{', '.join(bad)}: the artifact gives other outputs than what was saved; please report this")
    seconds = time.perf_counter() - start
    say.result(f"{len(rows) - len(MODELS)} artifacts in {out}, all reload to identical outputs; {seconds:.0f} s")
    if weights is None:
        say.note(f"with --shared FOLDER, {SHARED} is quantized on real photos as well (some minutes)")
    else:
        say.note(f"quantizing {SHARED} on the photos of {shared}")
        quantize_command(
            SHARED, f"{photos}/calib", out / SHARED, eval_data=f"{photos}/report", checkpoint=weights,
            force=True, quiet=quiet,
        )  # fmt: skip
    write_json(json, {"kind": "simulated", "images": IMAGES, "calibration_images": CALIBRATED, "rows": rows})


def _shared_files(shared: Path) -> tuple[Path, Path]:
    """Weights of SHARED, and the folder of the photos.

    Raises:
        InputError: they are not there.
    """
    weights, photos = shared / "models" / f"{SHARED}.safetensors", shared / "data" / "imagenet_sample"
    for path in (weights, photos):
        if not path.exists():
            raise InputError(f"--shared {shared}: {path.relative_to(shared)} is not there. Leave --shared out.")
    return weights, photos


def _embedded(name: str, out: Path, say: Say) -> list[dict[str, Any]]:
    """One row for the float model and one for each artifact."""
    loaded = load_model(f"zoo:{name}")
    preprocess = work.need_preprocess(loaded.preprocess, name)
    calib, images = work.calibration(CALIBRATION, CALIBRATED, 0, preprocess, torch.device("cpu"), False, say)
    test = open_images(TEST, num_classes=loaded.num_classes)
    unseen = list((test if len(test) == IMAGES else test.sample(IMAGES, 0)).batches(preprocess, BATCH))
    reference = evaluate_classifier(loaded.model, unseen)
    float_row = {"model": name, "recipe": "float", "bits": "", "bytes": None, "reloads": ""}
    rows = [float_row | _measured(reference, reference)]
    for recipe in RECIPES:
        for bits in BITS:
            say.note(f"{name} {recipe} {bits}")
            qmodel = quantize(loaded.model, recipe, bits, calib, progress=say)
            qmodel.source, qmodel.preprocess = loaded.source, preprocess.to_dict()
            qmodel.provenance = work.provenance(images, CALIBRATION, 0)
            folder = out / f"{name}_{recipe}_{bits}"
            save(qmodel, folder, force=True)
            again = load(folder)
            with torch.no_grad():
                same = torch.equal(again(unseen[0].images), qmodel(unseen[0].images))
            metrics = _measured(evaluate_classifier(again, unseen), reference)
            written = save(qmodel, folder, force=True, metrics=metrics)
            row = {"model": name, "recipe": recipe, "bits": bits, **metrics}
            rows.append(row | {"bytes": written["bytes"], "reloads": "identical" if same else "DIFFERS"})
    return rows


def _measured(found: ClassifyResult, reference: ClassifyResult) -> dict[str, Any]:
    """Top-1 with its interval in percent, and as a share of the float model's."""
    measured = found.to_json()
    recovery = None if found.top1 is None or not reference.top1 else round(found.top1 / reference.top1, 4)
    return {key: measured[key] for key in ("images", "top1", "top1_interval")} | {"recovery": recovery}


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    low, high = row["top1_interval"]
    return {
        "model": row["model"],
        "recipe": row["recipe"],
        "bits": row["bits"],
        "top-1 % [95 %]": f"{row['top1']:.2f} [{low:.1f}, {high:.1f}]",
        "recovery": "" if row["recovery"] is None else f"{row['recovery']:.3f}",
        "kB": "" if row["bytes"] is None else f"{row['bytes'] / 1e3:.0f}",
    }
