"""vitq demo: the main job on whatever this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vitq.artifact import load, save
from vitq.cli import app as a
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.quantize import quantize_command
from vitq.core.recipe import RECIPES
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images, zoo_names, zoo_preprocess
from vitq.evaluate.fidelity import fidelity
from vitq.pipeline import quantize

BITS = ("w8a8", "w4a4", "w3a3")
IMAGES = 256
SHARED = "deit_tiny_patch16_224"


@a.app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("out/demo"),
    shared: Annotated[Path, typer.Option(help="Folder with real weights and photos, used if it is there.")] = Path(
        "../shared"
    ),
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Quantize the embedded models with every recipe, print a table, leave artifacts.

    The embedded models have random weights drawn from a seed, so the table shows agreement with the float
    model, not accuracy. Where real weights and photos are beside the checkout, DeiT-Tiny is quantized, too, and
    measured on 400 photos.

        vitq demo

        vitq demo --out out/demo --shared ../shared --json demo.json
    """
    say = Say(quiet)
    check_outputs(json)
    rows: list[dict[str, Any]] = []
    for name in zoo_names():
        rows += _embedded(name, out, say)
    say.table(rows, title="embedded models (random weights, seeded): agreement with the float model, simulated")
    weights = shared / "models" / f"{SHARED}.safetensors"
    photos = shared / "data" / "imagenet_sample"
    if weights.is_file() and photos.is_dir():
        say.note(f"found {shared}: quantizing {SHARED} on real photos")
        quantize_command(
            SHARED, str(photos / "calib"), out / SHARED, eval_data=str(photos / "report"), checkpoint=weights,
            force=True, quiet=quiet,
        )  # fmt: skip
    else:
        say.note(f"{shared} is not there: no real weights or photos, so no accuracy is measured")
    write_json(json, {"rows": rows})


def _embedded(name: str, out: Path, say: Say) -> list[dict[str, Any]]:
    loaded = load_model(f"zoo:{name}")
    calib, unseen = seeded_images(32, seed=0), seeded_images(IMAGES, seed=1)
    rows = []
    for recipe in RECIPES:
        for bits in BITS:
            qmodel = quantize(loaded.model, recipe, bits, calib, progress=say)
            qmodel.source, qmodel.preprocess = loaded.source, zoo_preprocess(name).to_dict()
            qmodel.provenance = {"calibration": "seeded_images", "calibration_images": 32, "seed": 0}
            folder = out / f"{name}_{recipe}_{bits}"
            written = save(qmodel, folder, force=True)
            again = load(folder)
            with torch.no_grad():
                same = torch.equal(again(unseen), qmodel(unseen))
            close = fidelity(loaded.model, qmodel, [unseen])
            rows.append(
                {
                    "model": name,
                    "recipe": recipe,
                    "bits": bits,
                    "agreement %": close.agreement,
                    "logit KL": close.logit_kl,
                    "logit SQNR dB": close.logit_sqnr,
                    "kB": written["bytes"] / 1e3,
                    "reloads": "identical" if same else "DIFFERS",
                }
            )
    return rows
