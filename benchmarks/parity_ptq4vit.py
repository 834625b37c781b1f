"""What the official PTQ4ViT code and ours make of the same tensors: results/parity_ptq4vit.csv.

    git clone https://github.com/hahnyuan/PTQ4ViT && git -C PTQ4ViT checkout b42c790
    python benchmarks/parity_ptq4vit.py --official PTQ4ViT --shared ../shared

Operands, results and gradients of one block and the head of the shared DeiT-Tiny on calibration photos, the gradients
those of our probe, are given to both:

format   share of values that are equal at the same steps. GELU: all. Softmax: away from the split, and without what the
         official code adds to them (the split, or what its upper range makes of it); how much that is stands beside;
search   the weighted error of the product on all rows, reached by the official search on all rows and by ours on its
         sample of them, with one scale per weight as there, and with the recipe's one per output channel; CPU seconds.

Each side has its own arithmetic: the official one adds the split, and leaves V in float while it searches for it. Exit
code 1 if a format differs elsewhere, or if our search is worse by over 10 % on a product.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import MODEL, Shared, Steps, parser, provenance, results_folder, text
from _official import OfficialError
from torch import Tensor

import vitq
from vitq.calibrate.judge import Judge
from vitq.calibrate.objective import OBJECTIVES
from vitq.calibrate.products import Product, Samples, products
from vitq.core.batches import Batches
from vitq.core.format import Bits
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import Recipe, resolve_recipe
from vitq.passes.fit_products import FitProducts
from vitq.quantizers.twin_uniform import SPLITS, TwinGeluQuantizer, TwinSoftmaxQuantizer
from vitq.report.table import append_rows

FILES = ("quant_layers/linear.py", "quant_layers/matmul.py")
CHECKOUT = "git clone https://github.com/hahnyuan/PTQ4ViT && git -C PTQ4ViT checkout b42c790"
BLOCK = "blocks.5"
WORSE = 1.1  # largest ratio of our error to theirs
EVERYTHING = {"rows": 0, "entries": 0, "per_entry": 0}
KEY = ("model", "bits", "part", "what", "scales")


@dataclass
class Whole:
    """One product on all images: everything that both searches are given."""

    product: Product
    samples: Samples
    left: Tensor
    right: Tensor
    made: Tensor
    gradient: Tensor


class Official:
    """The official layers, imported from a checkout, on the CPU."""

    def __init__(self, path: Path) -> None:
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise OfficialError(
                f"{path} is not a checkout of PTQ4ViT: it lacks {', '.join(missing)}. Get it: {CHECKOUT}"
            )
        sys.path.insert(0, str(path.resolve()))
        self.linear: Any = importlib.import_module("quant_layers.linear")
        self.matmul: Any = importlib.import_module("quant_layers.matmul")

    def layer(self, whole: Whole, bits: int, gelu: bool, bias: Tensor | None) -> Any:
        """The layer of its configuration for such a product, with what it caches before its search."""
        search = {"metric": "hessian", "eq_alpha": 0.01, "eq_beta": 1.2, "eq_n": 100, "search_round": 3}
        if whole.product.kind == "linear":
            kind = "PostGeluPTQSLBatchingQuantLinear" if gelu else "PTQSLBatchingQuantLinear"
            out, inside = whole.right.shape
            layer = getattr(self.linear, kind)(inside, out, bias is not None, w_bit=bits, a_bit=bits, **search)
            layer.weight.data = whole.right
            if bias is not None:
                layer.bias.data = bias
            layer.raw_input = whole.left
        else:
            kind = "PTQSLBatchingQuantMatMul" if whole.product.kind == "scores" else "SoSPTQSLBatchingQuantMatMul"
            layer = getattr(self.matmul, kind)(A_bit=bits, B_bit=bits, **search)
            layer.raw_input = [
                whole.left,
                whole.right.mT.contiguous() if whole.product.kind == "scores" else whole.right,
            ]
        layer.raw_out, layer.raw_grad = whole.made, whole.gradient
        return layer

    def searched(self, layer: Any) -> float:
        """Run its search; CPU seconds."""
        with on_cpu(), torch.no_grad():
            return cpu_seconds(layer.calibration_step2)


@contextmanager
def on_cpu() -> Iterator[None]:
    """The official code moves tensors to a GPU by name."""
    original = Tensor.cuda
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = original  # type: ignore[method-assign]


def cpu_seconds(work: Any) -> float:
    """Of this process: other work on the machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def gathered(qmodel: QuantModel, images: Tensor) -> list[Whole]:
    """The products of the block and the head, with all rows of all images and the gradients of our probe."""
    found = [p for p in products(qmodel) if p.module.startswith(BLOCK) or p.module == "head"]
    step = FitProducts("hessian", **EVERYTHING)
    wholes = []
    for samples in step.sampled(qmodel, found, Batches.of(images), Silent()):
        product = samples.product
        (chunk,) = samples.chunks
        right = chunk.right
        if right is None:
            assert product.right.param is not None
            right = qmodel.model.get_parameter(product.right.param).data
        assert chunk.weight is not None
        left, made, gradient = chunk.left, chunk.made, chunk.weight.sqrt()
        if product.kind == "linear":
            left, made, gradient = (t.unflatten(0, (len(images), -1)) for t in (left, made, gradient))
        if product.kind == "scores":  # fused attention scales its scores within; the official code does so behind
            made = left @ right.mT
        wholes.append(Whole(product, samples, left, right, made, gradient))
    return wholes


def our_search(qmodel: QuantModel, recipe: Recipe, whole: Whole) -> tuple[float, float]:
    """(weighted error on all rows, CPU seconds) of the pass of the recipe on one product; its sampling counts."""
    step = recipe.passes[-1].build()
    assert isinstance(step, FitProducts)
    both = whole.samples.quantizers
    sampled = Samples(whole.product, both, step.rows, step.entries, step.per_entry, len(whole.left))
    right = None if whole.product.right.param else whole.right
    sampled.ranges = whole.samples.ranges

    def work() -> None:
        for seen in range(0, len(whole.left), 4):
            part = slice(seen, seen + 4)
            here = None if right is None else right[part]
            made, gradient = whole.made[part], whole.gradient[part]
            sampled._take(whole.left[part], here, made, gradient, seen, len(made))
        sampled.merge()
        step._fit(Judge(qmodel.model, whole.product, sampled.chunks, both, step.objective), sampled)

    seconds = cpu_seconds(work)
    judge = Judge(qmodel.model, whole.product, whole.samples.chunks, both, OBJECTIVES["hessian"])
    return judge.error(), seconds


def softmax_rows(official: Official, whole: Whole, bits: int) -> Iterator[dict[str, Any]]:
    """The twin format of probabilities at every split, and what the official one adds."""
    a, layer = whole.left, official.matmul.SoSPTQSLBatchingQuantMatMul(A_bit=bits, B_bit=bits)
    for shift in range(1, SPLITS):
        ours = TwinSoftmaxQuantizer(bits, unit=True)
        params = ours.range_to_params(torch.zeros(1), torch.ones(1))
        ours.set_params(params | {"shift": torch.tensor([float(shift)])})
        split, top = 2.0**-shift, layer.A_qmax - 1
        layer.split, layer.A_interval = split, split / top
        theirs, mine = layer.quant_input_A(a), ours.decode(ours.encode(a))
        below = round(split * top) / top  # torch.round and round take halves to even
        added = torch.where(a >= split, split, below)
        fine, coarse = split / top, 1 / top
        border = (a > (top - 1) * fine) & (a < split + coarse)
        ties = ((a / torch.where(a < split, fine, coarse)).frac() - 0.5).abs() < 1e-3
        plain = ~border & ~ties
        equal = ((theirs - added - mine).abs() < 1e-6)[plain]
        error = [float(((q - a) @ whole.right).square().mul(whole.gradient.square()).mean()) for q in (theirs, mine)]
        high, difference = a >= split, theirs - mine
        yield {
            "part": "format",
            "what": f"softmax, split 2^-{shift}",
            "scales": "",
            "equal_share": text(float(equal.double().mean())),
            "compared_share": text(float(plain.double().mean())),
            "added_above": text(float(difference[high & plain].mean())),
            "added_below": text(float(difference[~high & plain].mean())),
            "official_error": text(error[0]),
            "error": text(error[1]),
            "ratio": text(error[1] / error[0]),
        }


def gelu_row(official: Official, whole: Whole, bits: int) -> dict[str, Any]:
    """The twin format of what GELU makes, at the same steps."""
    ours, x = TwinGeluQuantizer(bits), whole.left
    ours.set_params(ours.range_to_params(x.min()[None], x.max()[None]))
    layer = official.layer(whole, bits, gelu=True, bias=None)
    layer.a_interval = ours.params()["scale"].reshape(1, 1)
    equal = layer.quant_input(x) == ours.decode(ours.encode(x))
    return {"part": "format", "what": "gelu", "scales": "", "equal_share": text(float(equal.double().mean()))}


def searches(official: Official, whole: Whole, qmodel: QuantModel, bits: int) -> dict[str, Any]:
    """The official search on one product."""
    gelu = isinstance(whole.samples.quantizers[0], TwinGeluQuantizer)
    found = dict(qmodel.model.named_parameters())
    bias = found.get(f"{whole.product.module}.bias")
    layer = official.layer(whole, bits, gelu, None if bias is None else bias.data)
    inputs = [whole.left] if whole.product.kind == "linear" else layer.raw_input
    seconds = official.searched(layer)
    with torch.no_grad():
        error = float(
            (layer.quant_forward(*inputs) - whole.made).square().mul(whole.gradient.square()).mean(dtype=torch.float64)
        )
    return {"official_error": error, "official_cpu_seconds": seconds}


def main() -> int:
    """Entry point; 1 if a format differs or our search is worse."""
    options = parser(__doc__, "example: python benchmarks/parity_ptq4vit.py --official PTQ4ViT --bits w4a4")
    options.add_argument("--official", type=Path, required=True, help="a checkout of PTQ4ViT")
    options.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4"], help="equal widths, such as w4a4")
    options.add_argument("--images", type=int, default=16, help="calibration images, from the start of seed 0's list")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be compared: {shared.missing}")
    try:
        official = Official(args.official)
    except (OfficialError, ImportError) as error:
        options.error(str(error))
    out, count = results_folder(args), 2 if args.quick else args.images
    loaded = shared.model()
    images = shared.calibration(0).subset(range(count)).tensor(loaded.preprocess)
    where = (
        {"images": count, "calibration": f"{count} of calibration_seed0.txt", "seed": 0}
        | shared.weights()
        | provenance()
    )
    rows: list[dict[str, Any]] = []
    steps, passed = Steps(len(args.bits) * 2 * 7), True
    for bits in args.bits:
        width = Bits.parse(bits).act
        assert width is not None
        reached: dict[str, dict[str, Any]] = {}
        for weights in ("tensor", "channel"):
            recipe = resolve_recipe("ptq4vit", Bits.parse(bits), {"weights": weights})
            ranges = Recipe(recipe.name, recipe.paper, recipe.formats, recipe.passes[:1])
            qmodel = vitq.quantize(loaded.model, ranges, bits, images, freeze=False)
            for whole in gathered(qmodel, images):
                name = f"{whole.product.module} {whole.product.kind}"
                if weights == "tensor":
                    reached[name] = searches(official, whole, qmodel, width)
                    if whole.product.kind == "rows":
                        rows += [{"bits": bits} | row for row in softmax_rows(official, whole, width)]
                    if isinstance(whole.samples.quantizers[0], TwinGeluQuantizer):
                        rows.append({"bits": bits} | gelu_row(official, whole, width))
                error, seconds = our_search(qmodel, recipe, whole)
                theirs = reached[name]
                ratio = error / theirs["official_error"]
                passed &= ratio <= WORSE
                numbers = theirs | {"error": error, "ratio": ratio, "cpu_seconds": seconds}
                numbers["time_ratio"] = seconds / theirs["official_cpu_seconds"]
                row = {"bits": bits, "part": "search", "what": name, "scales": weights}
                rows.append(row | {key: text(value) for key, value in numbers.items()})
                steps.step(f"{bits} {name}, {weights}: error {ratio:.3f}, time {numbers['time_ratio']:.3f} of theirs")
    append_rows(out / "parity_ptq4vit.csv", [{"model": MODEL} | row | where for row in rows], KEY)
    shares = [float(row["equal_share"]) for row in rows if row["part"] == "format"]
    print(f"formats: at least {min(shares):.4%} equal where they are comparable")
    for weights in ("tensor", "channel"):
        found = [row for row in rows if row["part"] == "search" and row["scales"] == weights]
        for key in ("ratio", "time_ratio"):
            values = [float(row[key]) for row in found]
            mean, largest = sum(values) / len(values), max(values)
            print(f"search, one scale per {weights}: {key} mean {mean:.4f}, largest {largest:.4f}")
    return int(not (passed and min(shares) > 0.9999))


if __name__ == "__main__":
    sys.exit(main())
