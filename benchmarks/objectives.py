"""What objectives with gradients are worth in a metric that none of them sees: results/objectives.csv.

DeiT-Tiny with real weights, formats and passes of `ptq4vit` in one round, w4a4. A row says, for an objective and the
share of all weight that is even (products.EVEN), the squared error of the outputs of the linears in blocks, each
quantized alone, weighed by Fisher information: the mean of squared gradients over labels drawn from the probabilities
of the model, which are other draws than those of the probe. Summed over linears and images; on the photos that scales
were searched on ("seen"), and on as many others of split `ablate`.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from _common import MODEL, Shared, Steps, parser, results_folder, text
from torch import Tensor, nn

import vitq
from vitq.calibrate import products
from vitq.calibrate.capture import switched_off
from vitq.core.qmodel import QuantModel
from vitq.report.table import append_rows

KEY = ("model", "recipe", "bits", "objective", "even", "on")
RECIPE, BITS = "ptq4vit", "w4a4"
DRAWS = 24
EVENS = (0.0, 0.25, 0.75)  # of `hessian`, beside what there is
OTHERS = ("fisher", "blockwise", "perturbation_hessian")

Found = dict[str, Tensor]


class Metric:
    """Float outputs of linears on some images, and how much errors in them matter."""

    def __init__(self, model: nn.Module, names: list[str], images: Tensor, draws: int) -> None:
        self.names, self.images = names, images
        wanted, logits = self.outputs(model, gradients=True)
        self.weight = {name: torch.zeros_like(x) for name, x in wanted.items()}
        p, log_p = logits.softmax(1).detach(), logits.log_softmax(1)
        for draw in range(draws):
            label = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(draw))
            loss = log_p.gather(1, label).sum()
            squares = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
            for name, g in zip(wanted, squares, strict=True):
                self.weight[name] += g.square() / draws
        self.wanted = {name: x.detach() for name, x in wanted.items()}

    def outputs(self, model: nn.Module, *, gradients: bool = False) -> tuple[Found, Tensor]:
        """Of the linears, and of the model."""
        found: Found = {}

        def keep(name: str) -> Any:
            return lambda module, args, out: found.__setitem__(name, out)

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in self.names]
        with torch.set_grad_enabled(gradients):
            logits = model(self.images.clone().requires_grad_(gradients))
        for handle in handles:
            handle.remove()
        return found, logits

    def error(self, qmodel: QuantModel) -> float:
        """Weighed error, one linear quantized at a time."""
        total = 0.0
        with switched_off(qmodel, []):
            for call in qmodel.graph.calls:
                if call.owner in self.names:
                    sites = [qmodel.graph.sites[site] for site in call.sites]
                    qmodel.set_state("on", sites)
                    got = self.outputs(qmodel.model)[0][call.owner]
                    qmodel.set_state("off", sites)
                    error = (got - self.wanted[call.owner]).square() * self.weight[call.owner]
                    total += float(error.sum(dtype=torch.float64))
        return total


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/objectives.py --images 8")
    options.add_argument("--images", type=int, default=8, help="photos that are searched on, and as many others")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    loaded, count = shared.model(), 2 if args.quick else args.images
    seen, others, where = shared.photos(count, loaded)
    names = [n for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")]
    draws = 2 if args.quick else DRAWS
    metrics = {on: Metric(loaded.model, names, x, draws) for on, x in (("seen", seen), ("others", others[:count]))}
    runs = [("mse", products.EVEN), ("hessian", products.EVEN), *(("hessian", even) for even in EVENS)]
    runs += [(name, products.EVEN) for name in OTHERS]
    file, steps, base = results_folder(args) / "objectives.csv", Steps(len(runs)), dict.fromkeys(metrics, 1.0)
    for objective, even in runs:
        with mock.patch.object(products, "EVEN", even):
            chosen = {"objective": objective, "rounds": 1}
            qmodel = vitq.quantize(loaded.model, RECIPE, BITS, seen, options=chosen, freeze=False)
        errors = {on: metric.error(qmodel) for on, metric in metrics.items()}
        if objective == "mse":
            base = errors
        row = {"model": MODEL, "recipe": RECIPE, "bits": BITS, "objective": objective}
        row["even"] = "" if objective == "mse" else text(even)
        rows = [
            row | {"on": on, "images": count, "error": text(error), "ratio_to_mse": text(error / base[on])} | where
            for on, error in errors.items()
        ]
        append_rows(file, rows, KEY)
        shown = ", ".join(f"{on} {error:.3g}" for on, error in errors.items())
        steps.step(f"{objective} {row['even']}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
