"""Compares formats on real attention maps: results/softmax_formats.csv, docs/methods/softmax_formats.png.

DeiT-Tiny with real weights. Every format is fitted to each layer's probabilities on calibration photos by the error of
the product with the values (pass `fit_attention`), the rest of the model stays in float, and the errors are taken on
photos that it was not fitted on (split `ablate`), over all heads, rows and columns:

error_av     |(Q(A) - A) V|^2 / |A V|^2: what the layer's output sees
error_a      |Q(A) - A|^2 / |A|^2
error_top    what probabilities above 0.1 contribute: |(Q(A) - A) 1[A > 0.1] V|^2 / |A V|^2
used         how many of the 2**bits codes occur

The plot has the levels of one layer, and error_av of all layers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from _common import MODEL, ROOT, Shared, Steps, parser, results_folder
from torch import Tensor

import vitq
from vitq.core import roles
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.quantizers.base import Quantizer
from vitq.report.table import append_rows

KINDS = ("tan", "logsqrt2", "log2", "uniform")
WIDTHS = (3, 4, 6)
KEY = ("model", "format", "bits", "layer")
PLOT = ROOT / "docs" / "methods" / "softmax_formats.png"
SHOWN = (4, 6)  # bits and layer of the levels that are drawn


def fitted(shared: Shared, kind: str, bits: int, images: Tensor) -> QuantModel:
    """Probabilities in this format, all else in float."""
    rules = (Rule(Format(kind, bits), (roles.SOFTMAX_OUT,)), Rule(Format("uniform", 16), (roles.VALUE,)))
    passes = (PassSpec.of("fit"), PassSpec.of("fit_attention"))
    return vitq.quantize(shared.model().model, Recipe("probe", "none", rules, passes), f"w16a{bits}", images)


def operands(qmodel: QuantModel, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Probabilities and values of every layer, of the float model."""
    seen: dict[str, list[Tensor]] = {}
    qmodel.set_state("off")
    for site in qmodel.graph.with_roles(roles.SOFTMAX_OUT, roles.VALUE):
        qmodel.quantizers[site].observer = lambda q, x, owner=site.owner: seen.setdefault(owner, []).append(x)
    with torch.no_grad():
        qmodel(images)
    for site in qmodel.sites():
        qmodel.quantizers[site].observer = None
    return [(both[0], both[1]) for both in seen.values()]


def errors(quantizer: Quantizer, a: Tensor, v: Tensor) -> dict[str, Any]:
    """Relative errors of one layer, and how much of the code is in use."""
    code = quantizer.encode(a)
    wrong = quantizer.decode(code) - a
    out = (a @ v).double().square().sum()
    found = {
        "error_av": (wrong @ v).double().square().sum() / out,
        "error_a": wrong.double().square().sum() / a.double().square().sum(),
        "error_top": ((wrong * (a > 0.1)) @ v).double().square().sum() / out,
    }
    return {name: f"{float(value):.5g}" for name, value in found.items()} | {"used": code.unique().numel()}


def draw(file: Path, levels: dict[str, Tensor], top: float, rows: list[dict[str, Any]], bits: int) -> None:
    """Levels of one layer on a log scale, and the error of A V layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    colors = {kind: f"C{number}" for number, kind in enumerate(levels)}
    for height, (kind, values) in enumerate(reversed(levels.items())):
        shown = values[values > 0]
        left.plot(shown, torch.full_like(shown, float(height)), "|", markersize=16, color=colors[kind])
    left.set_yticks(range(len(levels)), list(reversed(levels)))
    left.set(xscale="log", xlim=(1e-4, 1.2), xlabel="probability", title=f"levels at {bits} bits, layer {SHOWN[1]}")
    left.axvline(top, color="grey", linewidth=0.5)
    for kind in levels:
        chosen = [row for row in rows if row["format"] == kind and row["bits"] == bits]
        right.plot(
            [row["layer"] for row in chosen],
            [float(row["error_av"]) for row in chosen],
            "o-",
            label=kind,
            color=colors[kind],
        )
    right.set(yscale="log", xlabel="layer", title=f"relative squared error of A V at {bits} bits")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": ""})
    pyplot.close(figure)


def main() -> int:
    """Entry point."""
    args_parser = parser(__doc__, "example: python benchmarks/softmax_formats.py --quick")
    args = args_parser.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        args_parser.error(f"nothing can be measured: {shared.missing}")
    if importlib.util.find_spec("matplotlib") is None:
        args_parser.error("the plot needs matplotlib; install it with vitq's extra `report`")
    out = results_folder(args)
    calibration, evaluation, where = shared.photos(4 if args.quick else 32, shared.model())
    steps = Steps(len(KINDS) * len(WIDTHS))
    rows: list[dict[str, Any]] = []
    levels: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor]] = []
    for bits in WIDTHS:
        for kind in KINDS:
            qmodel = fitted(shared, kind, bits, calibration)
            seen = seen or operands(qmodel, evaluation)
            quantizers = [qmodel.quantizers[s] for s in qmodel.graph.with_roles(roles.SOFTMAX_OUT)]
            for layer, (quantizer, (a, v)) in enumerate(zip(quantizers, seen, strict=True)):
                assert isinstance(quantizer, Quantizer)
                row = {"model": MODEL, "format": kind, "bits": bits, "layer": layer} | errors(quantizer, a, v)
                rows.append(row | {n: f"{float(value):.5g}" for n, value in quantizer.params().items()} | where)
                if (bits, layer) == SHOWN:
                    levels[kind] = quantizer.lower().levels[0]
            mean = sum(float(row["error_av"]) for row in rows[-len(seen) :]) / len(seen)
            steps.step(f"{kind} at {bits} bits: mean relative error of A V {mean:.4g}")
    fields = dict.fromkeys(name for row in rows for name in row)
    append_rows(out / "softmax_formats.csv", [{name: row.get(name, "") for name in fields} for row in rows], KEY)
    top = float(seen[SHOWN[1]][0].max())
    draw(PLOT if args.out is None and not args.quick else out / PLOT.name, levels, top, rows, SHOWN[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
