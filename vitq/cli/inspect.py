"""vitq recipes and vitq inspect: what there is, and what a model or an artifact is made of."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils import _pytree as pytree

from vitq.artifact import schema
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.core.errors import InputError
from vitq.core.format import Format
from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.core.roles import OTHER_IN
from vitq.core.site import Graph
from vitq.data.source import load_model
from vitq.evaluate.metrics import rounded_small
from vitq.graph.trace import trace
from vitq.pipeline import insert, resolve

TOLERANCE = 1e-4  # of the output's magnitude: attention taken apart rounds differently from a fused kernel


@a.app.command()
@command
def recipes(json: a.Json = None, quiet: a.Quiet = False) -> None:
    """List recipes and modifiers, with their papers.

    A modifier is added with a plus: `--recipe repq_vit+gptq`.
    """
    check_outputs(json)
    rows = []
    for kind, registry in (("recipe", RECIPES), ("modifier", MODIFIERS)):
        for name in registry:
            fn = registry[name]
            built: Any = fn(4, 4)
            rows.append({"name": name, "kind": kind, "paper": built.paper, "what": (fn.__doc__ or "").split("\n")[0]})
    Say(quiet).table(rows)
    write_json(json, {"recipes": rows})


@a.app.command()
@command
def inspect(
    model: a.Target,
    checkpoint: a.Checkpoint = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width to trace with.")] = None,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Print where a model can be quantized, or what an artifact is.

    Of a model: every site with role, owner, axes, shape and share of the work. Weights are not needed. Ends with exit
    code 1 if a matrix product has neither a role nor a reason to stay in float, or if quantizers that are switched off
    change the output. Of an artifact: formats by role, size, how it was made, what was measured, and whether its files
    are whole; no model is built.

        vitq inspect swin_tiny_patch4_window7_224

        vitq inspect torchvision:vit_b_16 --json sites.json

        vitq inspect out/
    """
    say = Say(quiet)
    check_outputs(json)
    if work.is_artifact(model):
        if checkpoint is not None or image_size is not None:
            raise InputError("--checkpoint and --image-size are for models; an artifact says itself what it is")
        write_json(json, inspect_artifact(Path(model), say))
    else:
        inspect_model(model, checkpoint, image_size, json, say)


def inspect_artifact(folder: Path, say: Say) -> dict[str, Any]:
    """Print what an artifact's own files say, and give it as plain data.

    Raises:
        ArtifactError: files that are missing, damaged or of a newer vitq.
    """
    config = schema.read(folder / schema.CONFIG)
    schema.check_tensors(folder / schema.TENSORS, config)
    with schema.told_as_damage(folder):
        recipe, bits, source = config.plan["recipe"], config.effective_bits, config.source or {}
        count = Counter((config.graph[site].split()[0], str(Format.from_json(f))) for site, f in config.formats.items())
        rows = [{"role": role, "format": name, "sites": sites} for (role, name), sites in sorted(count.items())]
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        named = source.get("name") or source.get("spec") or "a model without a name"
        title = f"{named}, {recipe['name']}, {config.plan['bits']}, {config.kind}"
        summary = (
            f"{bits['weight']:.2f} bits per weight, {bits['act']:.2f} per activation, {bits['model']:.2f} over the "
            f"whole model; {size / 1e6:.2f} MB, the files are whole; written by vitq {config.vitq_version}"
        )
        plain = {key: value for key, value in config.provenance.items() if not isinstance(value, (list, dict))}
    say.table(rows, title=title)
    say.result(summary)
    for title, told in (("made", plain), ("measured", config.metrics)):
        if told:
            say.table([{title: key, "": str(value)} for key, value in told.items()])
    made = {"recipe": recipe["name"], "bits": config.plan["bits"], "kind": config.kind, "effective_bits": bits}
    return {"artifact": str(folder), "source": source, "bytes": size, "roles": rows, **made} | {
        "metrics": config.metrics,
        "provenance": config.provenance,
        "rewrites": [rewrite.name for rewrite in config.rewrites],
    }


def inspect_model(model: str, checkpoint: Path | None, image_size: int | None, json: Path | None, say: Say) -> None:
    """Print a model's sites; see `inspect`."""
    loaded = load_model(model, checkpoint, pretrained=None if checkpoint else False)
    size = loaded.preprocess.input_size if loaded.preprocess else (3, 224, 224)
    shape = (1, size[0], image_size or size[1], image_size or size[2])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = trace(loaded.model, x)
    macs = {s: c.macs for c in graph.calls for s in c.sites}
    total = max(graph.macs, 1)
    rows = [
        {
            "site": s.id,
            "role": s.role + (f" ({s.producer})" if s.producer else ""),
            "axes": " ".join(s.axes),
            "shape": "×".join(map(str, s.shape)),
            "share %": 100 * macs[s.id] / total,
        }
        for s in graph.sites.values()
    ]
    say.table(rows, title=f"{model}: {len(rows)} sites, {graph.macs / 1e6:,.0f} million multiply-accumulates")
    left = [
        {"call": c.id, "reason": c.reason, "detail": c.detail, "share %": 100 * c.macs / total}
        for c in graph.calls
        if c.reason
    ]
    if left:
        say.table(left, title="left in float")
    quantized = sum(c.macs for c in graph.calls if not c.reason) / total
    difference = switched_off_difference(loaded.model, graph, x)
    problems = [c.id for c in graph.calls if not c.sites and not c.reason]
    problems += [s.id for s in graph.sites.values() if not s.role]
    others = len(graph.with_roles(OTHER_IN))
    say.result(
        f"{100 * quantized:.2f} % of the multiply-accumulates have sites; {len(graph.blocks)} blocks; "
        f"{len(graph.pairs)} LayerNorms whose channel scales can be folded; {others} sites of no special role; "
        f"quantizers switched off change the output by {difference:.1e} of its magnitude"
    )
    if not graph.has_attention:
        say.result("no attention was found: the model is quantized all the same, as linears and convolutions")
    ok = not problems and difference <= TOLERANCE
    summary = {
        "model": model,
        "quantized_share": quantized,
        "off_difference": rounded_small(difference),
        "ok": ok,
        "left": left,
    }
    write_json(json, summary | {"has_attention": graph.has_attention} | graph.to_json())
    if not ok:
        for name in problems:
            say.error(f"error: {name} has neither a role nor a reason to stay in float")
        if not difference <= TOLERANCE:
            say.error(
                f"error: quantizers that are switched off change the output by {difference:.1e} of its magnitude; does "
                f"the model compute the same twice, and does it ask for the exact class of a layer?"
            )
        raise typer.Exit(1)


@torch.no_grad()
def switched_off_difference(model: nn.Module, graph: Graph, x: torch.Tensor) -> float:
    """Largest change of the output with every quantizer in place and off, relative to the output's magnitude."""
    if not graph.sites:
        raise InputError("nothing to quantize: the model computes no matrix product from its input")
    before = model(x)
    after = insert(copy.deepcopy(model), graph, resolve("minmax", "w8a8"))(x)
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    changes = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs]
    return math.inf if any(math.isnan(c) for c in changes) else max(changes, default=0.0)


def _tensors(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
