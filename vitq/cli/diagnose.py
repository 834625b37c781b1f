"""vitq diagnose: where the loss comes from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitq.artifact import load
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.evaluate import float_of
from vitq.cli.recipes import parse_options, recipe_of
from vitq.core.errors import InputError
from vitq.data.images import open_images
from vitq.data.native import PhotoInput
from vitq.data.preprocess import Preprocess
from vitq.evaluate.diagnose import GROUPINGS
from vitq.evaluate.diagnose import diagnose as find_suspects
from vitq.evaluate.diagnose_photos import diagnose_photos
from vitq.evaluate.finders import reader_of
from vitq.pipeline import quantize, resolve


@a.app.command()
@command
def diagnose(
    target: a.Target,
    data: Annotated[str, typer.Option(help=f"Images; labels are not needed. {a.DATA_HELP}")],
    by: Annotated[str, typer.Option(help="What to quantize one at a time: site, role or block.")] = "site",
    images: Annotated[int, typer.Option(min=1, help="How many images; each group costs one forward of them.")] = 16,
    checkpoint: a.Checkpoint = None,
    recipe: a.Recipe = "repq_vit",
    bits: a.Bits = "w4a4",
    option: a.Options = None,
    calib: Annotated[str | None, typer.Option(help="Calibration images, for a MODEL.")] = None,
    calib_size: a.CalibSize = 32,
    size: a.Size = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows to print.")] = 20,
    seed: a.Seed = 0,
    device: a.Device = "auto",
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Quantize one site (or role, or block) at a time and rank them by what they cause.

    For a classifier that is the KL divergence. For a detector or segmenter, --data is a folder of photos, taken at
    their own sizes: what share of the float model's detections is found again (of pixels, keeps its class), and the
    signal to noise of every output and level of the pyramid.

    An artifact needs the float weights it was made from. A model is quantized first.

        vitq diagnose out/ --data photos/ --checkpoint deit_tiny.safetensors --by role

        vitq diagnose deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors --calib photos/ --data photos/

        vitq diagnose zoo:scenes_maskrcnn --calib zoo:scenes_calib --data zoo:scenes_test --by block
    """
    say = Say(quiet)
    check_outputs(json)
    if by not in GROUPINGS:
        raise InputError(f"cannot diagnose by {by!r}; use one of {', '.join(GROUPINGS)}")
    where = work.choose_device(device)
    chosen = open_images(data, labels="none").sample(images, seed)
    chosen.check()
    prepare: Preprocess | PhotoInput
    if work.is_artifact(target):
        work.no_size(size)
        frozen = load(target, trust_code=trust_code)
        qmodel = load(target, float_model=float_of(frozen, checkpoint, trust_code, say)).to(where)
        stored = frozen.preprocess or {}
        prepare = PhotoInput.from_dict(stored) if "form" in stored else work.preprocess_of(frozen, target)
    else:
        if calib is None:
            raise InputError("a model is quantized first: name calibration images with --calib")
        options = parse_options(option or ())
        found = recipe_of(recipe, options)
        resolve(found, bits, options=options)
        loaded = work.open_model(target, checkpoint, where, say)
        prepare = work.input_of(loaded, target, size)
        if isinstance(prepare, PhotoInput):
            batches, _ = work.photos(calib, calib_size, seed, prepare, where, False, say)
        else:
            batches, _ = work.calibration(calib, calib_size, seed, prepare, where, False, say)
        qmodel = quantize(loaded.model, found, bits, batches, options=options, seed=seed, freeze=False, progress=say)
    rows: list[dict[str, Any]]
    if isinstance(prepare, PhotoInput):
        photos = [chosen.photo(position) for position in range(len(chosen))]
        reader = reader_of(qmodel, prepare, where, photos[0])
        ranked = diagnose_photos(qmodel, reader, photos, by, say)
        told, rows, unit = [s.to_json() for s in ranked], [s.row() for s in ranked], "kept in percent, outputs in dB"
    else:
        inputs = [b.images.to(where) for b in chosen.batches(prepare, batch_size=16)]
        told = rows = [s.to_json() for s in find_suspects(qmodel, inputs, by, say)]
        unit = "KL in nats"
    say.table([*rows[:-1][:top], rows[-1]], title=f"quantized alone, by {by}; {unit}")
    write_json(json, {"model": target, "by": by, "images": images, "suspects": told})
