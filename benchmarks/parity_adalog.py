"""AdaLog beside its official code, part by part on the same tensors: results/parity_adalog.csv.

DeiT-Tiny with real weights, float activations of calibration photos. Official classes are imported from a checkout and
run unchanged on the CPU; recipe `adalog` runs in parity mode, which has their extra zero level.

format  the same scale and base on both sides: how many values are equal
search  each product of some blocks searched by both, one quantized at a time: error of its result in parts of the
        result, on the photos that were searched on ("seen") and on others, with the CPU seconds that the search took
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from _common import MODEL, Shared, Steps, parser, provenance, results_folder, text
from torch import Tensor, nn

import vitq
from vitq.core.qmodel import QuantModel
from vitq.core.site import Call
from vitq.quantizers.adaptive_log import SHIFT, AdaptiveLogQuantizer
from vitq.report.table import append_rows

CHECKOUT = "git clone https://github.com/GoatWu/AdaLog && git -C AdaLog checkout 75a57d2"
KEY = ("part", "site", "bits", "q", "on")
CANDIDATES, STEPS = 128, 6
BASES = (12, 20, 37, 60)
GRAPHICS_MEMORY = 2**32  # bytes: how many candidates the official code takes at a time follows from it
ORDER = ("qkv", "scores", "rows", "proj", "fc1", "fc2")

Made = dict[str, tuple[Tensor, Tensor, Tensor]]  # of each product: its operands and its result


class Official:
    """The official layers. Raises SystemExit where there is no checkout."""

    def __init__(self, path: Path) -> None:
        if not (path / "quant_layers" / "linear.py").is_file():
            raise SystemExit(f"{path} is not a checkout of AdaLog; get it with: {CHECKOUT}")
        sys.path.insert(0, str(path.resolve()))
        self.linear: Any = importlib.import_module("quant_layers.linear")
        self.matmul: Any = importlib.import_module("quant_layers.matmul")
        self.formats: Any = importlib.import_module("quantizers.logarithm")

    def search(self, name: str, block: nn.Module, made: tuple[Tensor, Tensor, Tensor], bits: int, rounds: int) -> Any:
        """The official layer for a product, after its search."""
        left, right, result = made
        common = {"search_round": rounds, "eq_n": CANDIDATES, "fpcs": True, "steps": STEPS}
        common |= {"calib_batch_size": len(left)}
        if name in ("scores", "rows"):
            cls = (
                "PostSoftmaxAsymmetricallyBatchingQuantMatMul"
                if name == "rows"
                else "AsymmetricallyBatchingQuantMatMul"
            )
            layer = getattr(self.matmul, cls)(A_bit=bits, B_bit=bits, num_heads=left.shape[1], **common)
            layer.raw_input, layer.raw_out = [left, right], result
        else:
            layer = self._linear(name, block, bits, common)
            layer.raw_input, layer.raw_out = left, result
        with _on_the_cpu(), torch.no_grad():
            layer.hyperparameter_searching()
            if name in ("qkv", "fc1"):
                layer.reparam()
        return layer

    def _linear(self, name: str, block: Any, bits: int, common: dict[str, Any]) -> Any:
        of = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}[name]
        kinds = {"fc2": "PostGeluLogBased", "proj": "Asymmetrically"}
        cls = getattr(self.linear, f"{kinds.get(name, 'AsymmetricallyChannelWise')}BatchingQuantLinear")
        layer = cls(of.in_features, of.out_features, w_bit=bits, a_bit=bits, n_V=3 if name == "qkv" else 1, **common)
        layer.load_state_dict(of.state_dict(), strict=False)
        if name in ("qkv", "fc1"):
            layer.prev_layer = copy.deepcopy(block.norm1 if name == "qkv" else block.norm2)
        return layer


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    memory = SimpleNamespace(total_memory=GRAPHICS_MEMORY)
    with (
        mock.patch.object(Tensor, "cuda", lambda self: self),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=memory),
    ):
        yield


def calls(qmodel: QuantModel, block: str) -> dict[str, tuple[Call, str, str]]:
    """Product -> its call, and the ids of its operands."""
    graph, found = qmodel.graph, {}
    for call in graph.calls:
        ids = dict(zip(call.operands, call.sites, strict=True))
        if not call.owner.startswith(f"{block}."):
            continue
        if "query" in ids:
            found["scores"] = call, ids["query"], ids["key"]
            found["rows"] = call, ids["softmax"], ids["value"]
        else:
            found[call.owner.rpartition(".")[2]] = call, ids["input"], ids["weight"]
    return found


def products(qmodel: QuantModel, block: str, images: Tensor, on: str = "") -> Made:
    """Operands and results of the products of a block; that of `on` has quantized operands."""
    found: dict[str, list[Tensor]] = {}
    every = calls(qmodel, block)
    qmodel.set_state("off")
    for name, (_, left, right) in every.items():
        kept = found.setdefault(name, [])
        for site in (left, right):
            qmodel.quantizers[site].observer = lambda q, x, kept=kept: kept.append(x)
        qmodel.quantizers[left].product_observer = lambda x, kept=kept: kept.append(x)
    if on:
        qmodel.set_state("on", [qmodel.graph.sites[site] for site in every[on][1:]])
    with torch.no_grad():
        qmodel(images)
    for quantizer in qmodel.quantizers.values():
        quantizer.observer = quantizer.product_observer = None
    return {name: (kept[0], kept[1], kept[2]) for name, kept in found.items()}


def norm_inputs(model: nn.Module, block: str, images: Tensor) -> dict[str, Tensor]:
    """What enters the LayerNorms before qkv and fc1."""
    found: dict[str, Tensor] = {}
    norms = {"qkv": f"{block}.norm1", "fc1": f"{block}.norm2"}
    handles = [
        model.get_submodule(norm).register_forward_pre_hook(lambda m, x, name=name: found.__setitem__(name, x[0]))
        for name, norm in norms.items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    """Squared error in parts of the squares."""
    return float((got - wanted).double().square().sum() / wanted.double().square().sum())


def official_result(layer: Any, name: str, made: tuple[Tensor, Tensor, Tensor], norms: dict[str, Tensor]) -> Tensor:
    """What the official layer makes of float operands."""
    left, right, _ = made
    with torch.no_grad():
        if name in ("scores", "rows"):
            out: Tensor = layer.quant_forward(left, right)
        else:
            out = layer.quant_forward(layer.prev_layer(norms[name]) if name in norms else left)
        return out


def compare_formats(official: Official, seen: Made, bits: int) -> Iterator[dict[str, Any]]:
    """Both formats with the same scale and base on the same tensors."""
    for name, shifted in (("rows", False), ("fc2", True)):
        x = seen[name][0]
        for q in BASES:
            theirs = getattr(official.formats, "ShiftAdaLogQuantizer" if shifted else "AdaLogQuantizer")(n_bits=bits)
            scale = (x.max() + SHIFT if shifted else torch.ones(())).reshape(1)
            theirs.scale, theirs.inited = nn.Parameter(scale), True
            theirs.q.data.fill_(q)
            theirs.update_table()
            if shifted:
                theirs.shift.data.fill_(SHIFT)
            ours = AdaptiveLogQuantizer(bits, shifted=shifted, extra_zero_level=True)
            ours.set_params({"scale": scale, "q": torch.tensor([float(q)])})
            with torch.no_grad():
                a, b = ours.decode(ours.encode(x)), theirs(x)
            equal = float(((a - b).abs() <= 1e-6 * b.abs() + 1e-7).double().mean())
            yield {
                "part": "format",
                "site": name,
                "q": q,
                "on": "seen",
                "equal_share": text(equal),
                "values": x.numel(),
            }


def swapped(made: tuple[Tensor, Tensor, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """As the official product takes it: keys transposed, and scores without the scale that ours has in the queries."""
    left, right, result = made
    return (left, right.mT, left @ right.mT) if name == "scores" else (left, right, result)


def compare_searches(
    official: Official, model: nn.Module, block: str, seen: Tensor, others: Tensor, bits: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Every product of a block, searched by both."""
    start = time.process_time()
    options = {"parity": True, "fold_shift": False, "rounds": rounds}
    qmodel = vitq.quantize(model, "adalog", f"w{bits}a{bits}", seen, scope=block, options=options, freeze=False)
    seconds = time.process_time() - start
    stock, sets = model.get_submodule(block), {"seen": seen, "others": others}
    plain = vitq.quantize(model, "minmax", "w8a8", seen[:1], scope=block, freeze=False)
    wanted = {on: products(plain, block, x) for on, x in sets.items()}
    norms = {on: norm_inputs(model, block, x) for on, x in sets.items()}
    for name in ORDER:
        start = time.process_time()
        layer = official.search(name, stock, swapped(wanted["seen"][name], name), bits, rounds)
        took = time.process_time() - start
        for on, images in sets.items():
            result = wanted[on][name][2]
            ours = relative(products(qmodel, block, images, name)[name][2], result)
            made = swapped(wanted[on][name], name)
            theirs = relative(official_result(layer, name, made, norms[on]), made[2])
            row = {"part": "search", "site": f"{block}.{name}", "on": on}
            row |= {"error": text(ours), "official_error": text(theirs), "ratio": text(ours / theirs)}
            yield row | {"seconds_of_block": text(seconds), "official_seconds": text(took)}


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/parity_adalog.py --official AdaLog --bits 4 3")
    options.add_argument("--official", type=Path, required=True, help="checkout of GoatWu/AdaLog")
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="of weights and activations")
    options.add_argument("--blocks", type=int, nargs="+", default=[0, 5, 11], help="which blocks are searched")
    options.add_argument("--images", type=int, default=8, help="photos that are searched on, and as many others")
    options.add_argument("--rounds", type=int, default=1, help="how often both operands are searched")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    out, loaded, count = results_folder(args), shared.model(), 2 if args.quick else args.images
    blocks = [f"blocks.{number}" for number in (args.blocks[:1] if args.quick else args.blocks)]
    photos = shared.calibration(0).subset(range(2 * count)).tensor(loaded.preprocess)
    official = Official(args.official)
    fixed = {"model": MODEL, "rounds": args.rounds, "images": count, "calibration": "calibration_seed0.txt", "seed": 0}
    steps = Steps(len(args.bits) * len(blocks))
    for bits in args.bits:
        plain = vitq.quantize(loaded.model, "minmax", "w8a8", photos[:1], freeze=False)
        rows = [*compare_formats(official, products(plain, blocks[0], photos[:count]), bits)]
        for block in blocks:
            rows += compare_searches(official, loaded.model, block, photos[:count], photos[count:], bits, args.rounds)
            steps.step(f"w{bits}a{bits} {block}")
        for row in rows:
            print("  ".join(str(value) for value in row.values()), file=sys.stderr)
        also = {"bits": bits} | fixed | shared.weights() | provenance()
        append_rows(out / "parity_adalog.csv", [{"q": ""} | row | also for row in rows], KEY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
