"""vitq leaderboard: every recipe on one model and the same images, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.board_run import Asked, Run
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.grid import grid
from vitq.cli.recipes import parse_options
from vitq.core.errors import InputError, MissingExtraError, UnknownNameError
from vitq.evaluate.leaderboard import FLOAT, KEY, Spread, Standing, standings
from vitq.report.board import Board
from vitq.report.plot import Point, accuracy_cost, write
from vitq.report.published import OFFICIAL, PAPER, beside, told

HELP = """Measure recipes on one model with the same images, and keep a row for each in a CSV file.

Examples:

    vitq leaderboard zoo:fashion_vit --recipes minmax,repq_vit --bits w4a4 --images 500

    vitq leaderboard deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors --calib photos/ --eval val/

    vitq leaderboard swin_tiny_patch4_window7_224 --calib photos/ --eval val/ --modifiers gptq,qwt --against repq_vit

    vitq leaderboard deit_small_patch16_224 --calib photos/ --eval val/ --dry-run

Every row is written as soon as it is measured. A second call measures only what is missing, what failed, and what was
measured with other weights, images, options, code or torch, and says so; --keep keeps rows of other code and torch.
Beside the CSV file stand an .npz file, which holds what each row got right image by image, so that rows can be paired,
and the plot of accuracy against cost.

Calibration images are drawn by each seed; those of any seed are left out of the evaluation. Ends with exit code 1 if a
row failed; the reason is in the row.
"""
ZOO_MODELS = "zoo:fashion_"
ZOO_IMAGES = {"--calib": "zoo:fashion_calib", "--eval": "zoo:fashion_test"}  # for these models, unless others are named


@a.app.command("leaderboard", help=HELP)
@command
def leaderboard_command(
    model: a.Model,
    calib: Annotated[str | None, typer.Option(help=f"Calibration images; labels are not needed. {a.DATA_HELP}")] = None,
    eval_data: Annotated[str | None, typer.Option("--eval", help=f"Labelled images. {a.DATA_HELP}")] = None,
    bits: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "w8a8,w6a6,w4a4,w3a3",
    recipes: Annotated[str, typer.Option(help="all, or recipes as in `vitq quantize`, separated by commas.")] = "all",
    modifiers: Annotated[
        str | None, typer.Option(help="Measure every recipe with these as well: all, or for example gptq,gptq+qwt.")
    ] = None,
    option: a.Options = None,
    seeds: Annotated[str, typer.Option(help="Each draws its own calibration images; separated by commas.")] = "0,1,2",
    calib_size: a.CalibSize = 32,
    images: Annotated[int | None, typer.Option(min=1, help="Evaluate on so many, always the same ones.")] = None,
    against: Annotated[str, typer.Option(help="What to subtract, image by image: float, or a recipe.")] = FLOAT,
    checkpoint: a.Checkpoint = None,
    out: Annotated[Path, typer.Option(help="The CSV file.")] = Path("results/leaderboard.csv"),
    plot: Annotated[Path | None, typer.Option(help="The plot; beside the CSV file unless named.")] = None,
    count_macs: Annotated[
        bool, typer.Option("--count-macs", help="Count multiply-accumulates of quantizing, too: once more, and slower.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep rows that another version of vitq or torch measured.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which rows are there.")] = False,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """See HELP."""
    say = Say(quiet)
    picture = plot or out.with_suffix(".png")
    check_outputs(out, picture, json)
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: name a file that ends in .csv; the others stand beside it")
    entries, notes = grid(recipes, modifiers, bits, seeds, parse_options(option or ()))
    labels = list(dict.fromkeys(f"{entry.name} {entry.told}".strip() for entry in entries))
    if against not in (FLOAT, *labels):
        raise UnknownNameError("row to subtract", against, [FLOAT, *labels], "It must be one of those measured.")
    places = {"--calib": calib, "--eval": eval_data}
    if model.startswith(ZOO_MODELS):
        places = {name: place or ZOO_IMAGES[name] for name, place in places.items()}
    if lacks := [name for name, place in places.items() if place is None]:
        raise InputError(f"no images to work with; name them with {' and '.join(lacks)}")
    for note in notes:
        say.note(note)
    board = Board(out, KEY)
    asked = Asked(
        model=model,
        checkpoint=checkpoint,
        calib=str(places["--calib"]),
        calib_size=calib_size,
        evaluation=str(places["--eval"]),
        images=images,
        seeds=tuple(dict.fromkeys(entry.seed for entry in entries)),
        batch_size=batch_size,
        keep=keep,
        count_macs=count_macs,
    )
    run = Run(asked, work.choose_device(device), board, say)
    todo = run.todo(entries)
    if dry_run:
        waiting = {run.key(entry): why for entry, why in todo}
        say.table([{"row": str(e or FLOAT), "state": waiting.get(run.key(e), "there")} for e in (None, *entries)])
        say.result(f"{len(todo)} of {len(entries) + 1} rows to be measured")
        write_json(json, {"model": model, "rows": len(entries) + 1, "todo": [[str(e or FLOAT), w] for e, w in todo]})
        return
    if len(todo) <= len(entries):
        say.note(f"{len(entries) + 1 - len(todo)} of {len(entries) + 1} rows are there")
    run.measure(todo)
    found = standings([board.rows[run.key(entry)] for entry in (None, *entries)], board.correct, against)
    show(found, asked, against, out, say)
    draw(found, asked, picture, say)
    described = {"model": model, "kind": "simulated", "against": against, "csv": str(out)}
    write_json(json, described | {"rows": [row.to_json() | published_of(row, model) for row in found]})
    failed = [row for row in found if row.failed]
    for row in failed:
        say.error(f"error: {row.label} {row.bits} failed with seed {', '.join(row.failed)}: {row.reason}")
    if failed:
        raise typer.Exit(1)


def published_of(row: Standing, model: str) -> dict[str, str]:
    """What the paper and its official code reach, for a recipe as it is."""
    rows = [] if row.options else beside(row.recipe, model, row.bits)
    return {"paper": told(rows, PAPER), "official code": told(rows, OFFICIAL)}


def show(found: Sequence[Standing], asked: Asked, against: str, out: Path, say: Say) -> None:
    """Print a table for each width, and what its numbers are."""
    first = found[0]
    for bits in dict.fromkeys(row.bits for row in found):
        shown = [shown_row(row, asked.model, against) for row in found if row.bits == bits and row.top1 is not None]
        filled = [name for name in (shown[0] if shown else ()) if any(row[name] for row in shown)]
        if not set(filled) & set(published_of(first, asked.model)):  # what recoveries are to be compared with
            filled = [name for name in filled if name != "recovery"]
        if filled:
            say.table([{name: row[name] for name in filled} for row in shown], title=f"{asked.model} {bits}, simulated")
    data = f"{asked.evaluation}; calibrated on {asked.calib_size} of {asked.calib}"
    say.result(
        f"{first.images} images of {data}, seeds {', '.join(map(str, asked.seeds))}; float {first.top1_float:.2f} %. "
        f"top-1: mean over the seeds, interval over images and seeds. KL: divergence from the float "
        f"model in nats; cost: time of quantizing in forwards of the "
        f"float model over the calibration images; medians of the seeds. Rows: {out}"
    )
    if any(any(published_of(row, asked.model).values()) for row in found):
        say.result(
            "paper, official code: top-1 (recovery). Papers use the 50,000 validation images, official code was run by "
            "us on a sample of other images: compare recoveries, not top-1"
        )


def shown_row(row: Standing, model: str, against: str) -> dict[str, str]:
    """A row of the table."""
    top1, cost = row.top1, row.cost
    assert top1 is not None
    assert cost is not None
    return {
        "recipe": row.label,
        "top-1 % [95 %]": f"{top1.middle:.2f} [{top1.low:.1f}, {top1.high:.1f}]",
        "recovery": "" if row.recovery is None else f"{row.recovery:.3f}",
        f"minus {against} [95 %]": signed(row.minus),
        "KL": "" if row.kl is None else f"{row.kl.middle:.3f}",
        "cost": f"{cost.middle:.1f}",
        "MACs": "" if row.macs is None else f"{row.macs:.2f}",
        "MB": f"{(row.size or 0) / 1e6:.2f}",
        "bits w/a": f"{row.weight_bits:.2f}/{row.act_bits:.2f}",
        "extra MMACs": f"{row.extra_macs / 1e6:.1f}" if row.extra_macs else "",
        **published_of(row, model),
    }


def signed(spread: Spread | None) -> str:
    """A difference with its interval."""
    return "" if spread is None else f"{spread.middle:+.2f} [{spread.low:+.2f}, {spread.high:+.2f}]"


def draw(found: Sequence[Standing], asked: Asked, file: Path, say: Say) -> None:
    """The plot, where there is something to plot and something to plot with."""
    points = [
        Point(row.label, row.bits, row.cost.middle, row.top1.middle, row.top1.low, row.top1.high)
        for row in found
        if row.top1 is not None and row.cost is not None
    ]
    if not points:
        return
    try:
        write(accuracy_cost(points, found[0].top1_float, f"{asked.model}, {found[0].images} images, simulated"), file)
    except MissingExtraError as error:
        say.note(f"no plot: {error}")
    else:
        say.note(f"plot in {file}")
