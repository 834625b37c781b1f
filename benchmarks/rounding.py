"""How strongly to damp when weight codes are chosen column by column: results/rounding.csv.

DeiT-Tiny with real weights, repq_vit at w4a4 on 32 calibration photos. For each linear, and each strength of damping
(`damp` of pass `round_columns`), codes are chosen on its inputs, and the error of its output is taken on photos that
they were not chosen on (split `ablate`), in parts of the error of nearest rounding. Inputs are those of the model with
nearest rounding.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from _common import MODEL, Shared, Steps, parser, results_folder
from torch import Tensor

import vitq
from vitq.calibrate.linears import Linear, as_used, linears
from vitq.calibrate.moments import Moments
from vitq.core.qmodel import QuantModel
from vitq.passes.round.columns import choose
from vitq.quantizers.base import Quantizer
from vitq.report.table import append_rows

DAMPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
KEY = ("model", "bits", "weight", "damp")
BITS = "w4a4"


def moments(qmodel: QuantModel, images: Tensor) -> dict[str, tuple[Linear, Moments]]:
    """Of the inputs of every linear, by weight site."""
    found: dict[str, tuple[Linear, Moments]] = {}
    for linear in linears(qmodel):
        weight, quantizer = qmodel.weight(linear.weight), qmodel.quantizers[linear.input]
        assert weight is not None
        gathered = Moments(weight[0].numel(), weight.device)
        found[linear.weight.id] = linear, gathered

        def look(_: object, x: Tensor, gathered: Moments = gathered, linear: Linear = linear) -> None:
            gathered.add(linear.rows(qmodel.model, as_used(qmodel.quantizers[linear.input], x)))

        quantizer.observer = look
    with torch.no_grad():
        qmodel(images)
    for linear, _ in found.values():
        qmodel.quantizers[linear.input].observer = None
    return found


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/rounding.py --quick")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    out, loaded = results_folder(args), shared.model()
    calibration, others, where = shared.photos(2 if args.quick else 32, loaded)
    qmodel = vitq.quantize(loaded.model, "repq_vit", BITS, calibration, freeze=False)
    seen, unseen = moments(qmodel, calibration), moments(qmodel, others)
    steps, rows = Steps(len(seen)), list[dict[str, Any]]()
    for site, (_, gathered) in seen.items():
        weight, quantizer = qmodel.weight(site), qmodel.quantizers[site]
        assert weight is not None
        assert isinstance(quantizer, Quantizer)
        w, h = weight.data, unseen[site][1].matrix

        def error(q: Tensor, w: Tensor = w, h: Tensor = h) -> float:
            wrong = (w - q).flatten(1).double()
            return float(((wrong @ h) * wrong).sum())

        nearest = error(quantizer(w))
        for damp in DAMPS:
            ratio = error(choose(w, gathered.matrix, quantizer, damp)[0]) / nearest
            row = {"model": MODEL, "bits": BITS, "weight": site, "rows": gathered.count, "damp": damp}
            rows.append(row | {"error_of_nearest": f"{ratio:.4f}"} | where)
        steps.step(site)
    append_rows(out / "rounding.csv", rows, KEY)
    for damp in DAMPS:
        ratios = [float(row["error_of_nearest"]) for row in rows if row["damp"] == damp]
        steps.say(f"damp {damp}: mean {sum(ratios) / len(ratios):.4f}, worst {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
