"""The application that commands add themselves to, and the options that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="vitq",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Low-bit Vision Transformers, for real. Start with `vitq demo`, then `vitq quantize --help`.",
)

MODEL_HELP = "A timm name, hf:name-or-path, torchvision:name, zoo:name, file.py:function or file.onnx."
DATA_HELP = "Class folders, a folder with labels.csv, Parquet, a folder of images, or zoo:NAME."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Target = Annotated[str, typer.Argument(metavar="DIR|MODEL", help=f"An artifact's folder. Or a model: {MODEL_HELP}")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights to load: .safetensors, or a .pth that holds tensors only.")
]
Recipe = Annotated[str, typer.Option(help="NAME, NAME+MODIFIER, or FILE.py:FUNCTION; `vitq recipes` lists them.")]
Bits = Annotated[str, typer.Option(help="Widths of weights and activations; 16 leaves that side in float.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="A recipe's own option, KEY=VALUE. Repeatable.")]
Calib = Annotated[str, typer.Option(help=f"Calibration images; labels are not needed. {DATA_HELP}")]
CalibSize = Annotated[int, typer.Option(help="How many of them to use, drawn by the seed.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Leave sites in float: a module, a glob on site ids, or role=NAME. Repeatable."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Other bits for some sites: role=HEAD_IN:w8a8, head:a8. Repeatable.")
]
Seed = Annotated[int, typer.Option(help="Seed for drawing calibration images and for the recipe.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time in evaluation; never changes a scale.")]
Size = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Shorter side of photos in pixels (both sides, for a segmenter), for a model of transformers; "
        "800 and 512 unless given. An artifact keeps it.",
    ),
]
Scope = Annotated[
    list[str] | None, typer.Option(help="Quantize inside of this module only, for example backbone. Repeatable.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unreadable images instead of stopping.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow an artifact to run the file.py it names.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
