"""vitq export: an artifact as a file for other runtimes, run there and compared before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitq.artifact import load, schema
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.core.errors import InputError, UnknownNameError
from vitq.core.qmodel import QuantModel
from vitq.core.target import TARGETS, Request
from vitq.data.images import open_images
from vitq.export.lower import PROFILES
from vitq.export.onnx import Exported, check_request, export_onnx
from vitq.export.openvino_ir import PROFILE as OPENVINO
from vitq.export.openvino_ir import check_ir_request, export_openvino
from vitq.export.runtime import need_packages, runtime_named

# With profiles of their own, and the one that is meant where none is named; the others are in vitq/export/targets.
FORMATS = {"onnx": "ort", "openvino": OPENVINO}
FIRST = 3  # products in float that are named


@a.app.command()
@command
def export(
    target: Annotated[str, typer.Argument(metavar="DIR", help="An artifact.")],
    out: Annotated[Path, typer.Option(help="The file to write, in a folder that exists; or the folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx: a file for ONNX Runtime. openvino: an xml, and a bin beside it. hf: a folder for "
            "from_pretrained of transformers after `import vitq`. compressed-tensors: one that it loads with that "
            "package, for uniform formats of linear layers. torch: a program of torch.export (.pt2)."
        ),
    ] = "onnx",
    profile: Annotated[
        str | None,
        typer.Option(
            help="ort: whole numbers next to products, for ONNX Runtime. openvino: the same for OpenVINO. "
            "reference: standard operators in float32.",
            show_default="ort, or openvino with --to openvino",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Images to compare on; labels are not needed. Random ones without. {a.DATA_HELP}"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of them, drawn by the seed 0.")] = 64,
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Write an artifact for another runtime, and run that beside the simulated model before it counts.

    For ONNX, the file is run in ONNX Runtime or OpenVINO, as the profile says.

    Weights are 4- and 8-bit numbers in the file, the batch size is free. Where every site is given what the simulated
    model has, 99.9 % of the codes must be equal and the rest off by one; then predictions are compared on the whole.
    If that fails, the first site that differs is named, and a file that was there stays. What the runtime multiplies
    in whole numbers is read from the graph that it makes of the file.

        vitq export out/ --out model.onnx --data photos/

        vitq export out/ --to onnx --profile reference --out model.onnx --json export.json

        vitq export out/ --to openvino --out model.xml --data photos/

        vitq export out/ --to hf --out folder/
    """
    say = Say(quiet)
    check_outputs(json)
    if to not in FORMATS and to not in TARGETS:
        raise UnknownNameError("export target", to, [*FORMATS, *TARGETS])
    if to in TARGETS:
        if profile is not None:
            raise InputError(f"--profile is for --to {' and '.join(FORMATS)}; leave it out")
        TARGETS[to].check(out)
    else:
        profile = profile or FORMATS[to]
        _check_profile(to, profile, out)
    if not work.is_artifact(target):
        raise InputError(f"{target} is no artifact: quantize or train a model first")
    qmodel = load(target, trust_code=trust_code)
    batch, described = _images(qmodel, target, data, images) if data is not None else (None, "")
    if to in TARGETS:
        say.note(f"exporting {target}, then loading what was written")
        metrics = schema.read(Path(target) / schema.CONFIG).metrics
        written = TARGETS[to].write(qmodel, Request(out, batch, described, metrics))
        for line in written.lines:
            say.result(line)
        write_json(json, {"model": target, "to": to} | written.to_json())
        return
    assert profile is not None
    say.note(f"exporting {target} for {profile}, then running the file")
    if to == "openvino":
        made = export_openvino(qmodel, out, data=batch, described=described)
    else:
        made = export_onnx(qmodel, out, profile, data=batch, described=described)
    _tell(made, say)
    write_json(json, {"model": target, "to": to} | made.to_json())


def _check_profile(to: str, profile: str, out: Path) -> None:
    """Refuse what cannot be written, before anything is loaded."""
    if to != "openvino":
        check_request(out, profile)
    elif profile != OPENVINO:
        raise InputError(f"--to openvino is of the profile {OPENVINO}, not {profile}; leave --profile out")
    else:
        check_ir_request(out)
    need_packages(runtime_named(PROFILES[profile].runtime))


def _beside(path: Path) -> str:
    return f" with {path.with_suffix('.bin').name}" if path.suffix == ".xml" else ""


def _images(qmodel: QuantModel, target: str, data: str, count: int) -> tuple[Any, str]:
    preprocess = work.preprocess_of(qmodel, target)
    found = open_images(data, labels="none")
    found = found.sample(min(count, len(found)), seed=0)
    return found.tensor(preprocess), f"{len(found)} images of {data}"


def _tell(made: Exported, say: Say) -> None:
    whole, rest = (sum(made.products[kind].values()) for kind in ("whole", "float"))
    named = ", ".join(f"{count} {name}" for name, count in list(made.products["float"].items())[:FIRST])
    say.result(
        f"{made.path}: {made.bytes / 1e6:.2f} MB{_beside(made.path)}, ONNX opset {made.opset}, profile {made.profile}"
    )
    say.result(
        f"{made.runtime} does {whole} of {whole + rest} matrix products in whole numbers, {rest} in float"
        + (f" ({named})" if named else "")
    )
    for note in made.notes:
        say.result(note)
    say.result(str(made.parity))
