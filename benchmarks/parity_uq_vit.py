"""Compares the parts of `uq_vit` with the official UQ-ViT code on the same tensors: results/parity_uq_vit.csv.

    git clone https://github.com/jiujiuwei/UQ-ViT && git -C UQ-ViT checkout 3d7d4bb
    python benchmarks/parity_uq_vit.py --official UQ-ViT/classification --shared ../shared

On the shared DeiT-Tiny and its calibration photos:

demax  both formats on the attention probabilities of every block of the float model;
ratio  both ratios, and shifts, of every linear's input for one alpha, on what the float model gives it. As a percentile
       the code takes the nearest value, ours interpolates;
alpha  the official script runs with its own criterion, the error of the block's output. For every linear: the alpha it
       chooses, the one that ours chooses by the linear's own output, and the block's error with each of them, by the
       official code. This is what the cheaper criterion costs.
whole  the official script quantizes for every seed, and so do we; both models on the same photos: top-1, divergence
       from the float model, and the paired differences, ours minus theirs, with 95 % intervals over images.

Adapted from outside where the code would not run here: images and weights are given, the device is the CPU, and timm
passes keywords to attention today. Its scale search over channels, one after the other in Python, is replaced by the
same search over all of them at once, after both have given the same on random tensors. Exit code 1 if values or ratios
differ by more than rounding and percentiles explain.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _common import MODEL, Shared, Steps, bootstrap, parser, provenance, results_folder, top
from torch import Tensor, nn

import vitq
from vitq.calibrate.search import Search
from vitq.core import roles
from vitq.core.batches import Batches
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.data.images import open_images
from vitq.data.source import LoadedModel
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.metrics import logit_kl
from vitq.graph.trace import trace
from vitq.passes.fit import Fit
from vitq.passes.reparam.balance import _steps_of_columns, _targets
from vitq.pipeline import insert, resolve
from vitq.quantizers.demax import DeMaxQuantizer
from vitq.report.table import append_rows

KEY = ("part", "model", "bits", "site", "alpha", "calibration_seed", "evaluation")
PARTS = ("demax", "ratio", "alpha", "whole")
SPLITS = ("ablate", "report")
BITS, WEIGHT_BITS, ACT_BITS = "w4a4", 4, 4
TRIED = {True: 0.2, False: 0.4}  # after a norm, elsewhere: the alpha of part "ratio"
CODES = 0.9999  # share of DeMax values that must be equal: float32 may round to the other side of a threshold
RATIO = 0.05  # median relative difference of a ratio: percentiles of few values differ by their interpolation
GELU_MIN = -0.16997122764587402  # the code's, to the bit
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Official:
    """The official code, imported from the classification folder of a checkout."""

    def __init__(self, path: Path) -> None:
        if not (path / "test.py").is_file() or not (path / "quant" / "quantizer.py").is_file():
            raise SystemExit(f"{path} is not the classification folder of UQ-ViT; see the head of this file")
        sys.path.insert(0, str(path.resolve()))
        self.modules: Any = importlib.import_module("quant.quant_modules")
        self.building: Any = importlib.import_module("utils.build_model")
        spec = importlib.util.spec_from_file_location("official_script", path / "test.py")  # "test" is one of Python's
        assert spec is not None
        assert spec.loader is not None
        self.script: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.search_alph: Any = self.script.search_alph
        _all_channels_at_once(self.modules.UniformQuantizer)
        original = self.building.attention_forward
        self.building.attention_forward = lambda self, x, **keywords: original(self, x)

    def demax(self, x: Tensor) -> Tensor:
        found: Tensor = self.modules.UniformQuantizer_DeMax(ACT_BITS)(x)
        return found

    @torch.inference_mode()
    def ratio(self, x: Tensor, linear: nn.Linear, alpha: float, after_norm: bool) -> tuple[Tensor, Tensor]:
        """Ratio and offset (C,) of x / r - b."""
        cls = self.modules.QuantLinear if after_norm else self.modules.QuantLinear_no_b
        given, weights = {"n_bits": ACT_BITS, "channel_wise": True}, {"n_bits": WEIGHT_BITS, "channel_wise": True}
        layer = cls(linear.in_features, linear.out_features, given, weights, norm_quant=True)
        layer.weight.data, layer.bias, layer.alph = linear.weight.data, linear.bias, alpha
        layer.set_quant_state(True, True)
        layer(x)
        return layer.r, torch.as_tensor(layer.b)

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        ours: dict[str, float],
        every: int,
        steps: Steps,
        look: Callable[[nn.Module], None] | None = None,
    ) -> list[dict[str, object]]:
        """Quantize as the script does, and try our alphas beside its own; other blocks than every so many take ours.

        Args:
            look: is given the quantized model.
        """
        rows: list[dict[str, object]] = []

        def validate(args: Any, loader: Any, quantized: nn.Module, *more: Any) -> tuple[float, float, float]:
            if look is not None:
                look(quantized)
            return 0.0, 0.0, 0.0

        script, original = self.script, self.search_alph

        def search(
            grid: Any, block: nn.Module, x: Tensor, target: Tensor, name: str, linear: nn.Module, modules: Any
        ) -> None:
            def error() -> float:
                with torch.inference_mode():
                    return float((block(x) - target).square().mean())

            layer = next(layer for layer in LAYERS if block.get_submodule(layer) is linear)
            site, row = f"blocks.{name}.{layer}:linear0.input", {}
            if site in ours and len(grid) > 1:
                original([ours[site]], block, x, target, name, linear, modules)
                row = {"ours": ours[site], "block_error_ours": error()}
                if int(name) % every:
                    return
            original(grid, block, x, target, name, linear, modules)
            if row:
                rows.append({"site": site, "official": linear.alph, "block_error_official": error()} | row)
            steps.step(site)

        self.building.timm = SimpleNamespace(create_model=lambda name, pretrained: copy.deepcopy(model))
        words = ["--model", "deit_tiny", "--device", "cpu", "--w_bits", str(WEIGHT_BITS), "--a_bits", str(ACT_BITS)]
        words += ["--calib-batchsize", str(len(images)), "--calibrate", str(len(images))]
        vars(script).update(
            args=script.get_args_parser().parse_args(words),
            build_dataset=lambda args: ([(images, torch.zeros(len(images)))], None),
            search_alph=search,
            validate=validate,
        )
        with contextlib.redirect_stdout(sys.stderr):
            script.main()
        return rows


def _all_channels_at_once(cls: Any) -> None:
    """The scale search of the code over channels, without its loop.

    Raises:
        SystemExit: it is not the same.
    """
    affine, symmetric = cls.init_quantization_scale, cls.init_quantization_scale_symmetric

    def search(self: Any, x: Tensor, both_ends: bool) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2).T if x.ndim == 3 else x.flatten(1)
        best = torch.full(rows.shape[:1], torch.inf)
        chosen = torch.zeros(2, len(rows))
        for share in (0.999, 0.9999, 0.99999):
            high, low = (rows.quantile(p, dim=1, interpolation="nearest") for p in (share, 1 - share))
            if both_ends:
                flat = high - low < 1e-5
                high, low = high.masked_fill(flat, 0.0), low.masked_fill(flat, GELU_MIN)
                step = (high - low) / (2**self.n_bits - 1)
                zero, bottom = (-low / step).round(), 0.0
            else:
                step = 2 * torch.maximum(high.abs(), low.abs()) / (2**self.n_bits - 1)
                zero, bottom = torch.zeros_like(step), -self.n_levels / 2
            code = ((rows / step[:, None]).round() + zero[:, None]).clamp(bottom, bottom + self.n_levels - 1)
            error = ((code - zero[:, None]) * step[:, None] - rows).square().mean(1)
            chosen = torch.where(error < best, torch.stack([step, zero]), chosen)
            best = torch.minimum(error, best)
        shape = (1, 1, -1) if x.ndim == 3 else (-1, *[1] * (x.ndim - 1))
        return chosen[0].view(shape), chosen[1].view(shape)

    def one(self: Any, x: Tensor, channel_wise: bool = False) -> Any:
        return search(self, x, True) if channel_wise else affine(self, x, channel_wise)

    def other(self: Any, x: Tensor, channel_wise: bool = False, head_num: Any = None) -> Any:
        return search(self, x, False)[0] if channel_wise else symmetric(self, x, channel_wise)

    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 700, 5), (6, 900), (4, 3, 16, 16)):
        x, quantizer = torch.randn(shape, generator=generator), cls(ACT_BITS, True)
        pairs = zip(affine(quantizer, x, True), one(quantizer, x, True), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        same &= torch.equal(symmetric(quantizer, x.clone(), True), other(quantizer, x, True))
        if not same:
            raise SystemExit("the scale search over all channels at once is not that of the official code")
    cls.init_quantization_scale, cls.init_quantization_scale_symmetric = one, other


def inputs(qmodel: QuantModel, images: Tensor, *wanted: str) -> dict[str, Tensor]:
    """Site -> what the float model gives it, for sites of these roles."""
    found: dict[str, Tensor] = {}
    sites = qmodel.sites(*wanted)
    qmodel.set_state("off")
    for site in sites:
        qmodel.quantizers[site].observer = lambda q, x, name=site.id: found.__setitem__(name, x.detach().clone())
    with torch.no_grad():
        qmodel(images)
    for site in sites:
        qmodel.quantizers[site].observer = None
    return found


def compare_demax(official: Official, qmodel: QuantModel, images: Tensor) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for site, x in inputs(qmodel, images, roles.SOFTMAX_OUT).items():
        mine, theirs = DeMaxQuantizer(ACT_BITS)(x), official.demax(x)
        equal = (mine - theirs).abs() <= 1e-6 * theirs.abs()
        rows.append({"site": site, "equal_share": float(equal.double().mean()), "n": x.numel()})
    return rows


def compare_ratios(official: Official, qmodel: QuantModel, images: Tensor) -> list[dict[str, object]]:
    """Our scales are fitted by the float model's values, as the official ones here."""
    data = Batches.of(images)
    Fit("percentile_mse", "percentile_mse", exact=True).run(qmodel, data, Silent())
    seen = inputs(qmodel, images, roles.QKV_IN, roles.PROJ_IN, roles.FC1_IN, roles.FC2_IN)
    rows: list[dict[str, object]] = []
    for target in _targets(qmodel, data):
        site, alpha = target.inputs[0], TRIED[target.after_norm]
        linear = qmodel.model.get_submodule(site.partition(":")[0])
        assert isinstance(linear, nn.Linear)
        theirs, offset = official.ratio(seen[site], linear, alpha, target.after_norm)
        steps = _steps_of_columns(target.weights[0][0] * target.alive, Search("percentile_mse", exact=True))
        mine, shift = target.ratio(alpha, steps)
        # Dead channels have no ratio in ours; the code gives them one, which changes the mean of the others a little.
        off = (mine / theirs - 1).abs()[target.alive]
        row: dict[str, object] = {"site": site, "alpha": alpha, "n": int(target.alive.sum())}
        row |= {"median_rel_diff": float(off.median()), "largest_rel_diff": float(off.max())}
        if target.after_norm:
            # They may differ by one constant, which the zero-point takes up. In steps: a zero-point rounds to one.
            between = (-shift / mine - offset)[target.alive]
            apart = (between - between.median()).abs() / target.quantizer.params()["scale"].mean()
            row |= {"median_shift_steps": float(apart.median()), "largest_shift_steps": float(apart.max())}
        rows.append(row)
    return rows


def compare_whole(
    official: Official, shared: Shared, loaded: LoadedModel, seed: int, quick: bool, steps: Steps
) -> list[dict[str, object]]:
    """Both models on the same photos."""
    images = shared.calibration(seed).tensor(loaded.preprocess)[: 4 if quick else None]
    model, rows = loaded.model, list[dict[str, object]]()
    models: list[nn.Module] = []
    official.run(model, images, {}, 1, steps, models.append)
    models += [vitq.quantize(model, "uq_vit", BITS, images, seed=seed)]
    for split in SPLITS:
        photos = open_images(shared.sample / split, num_classes=loaded.num_classes)
        photos = photos.subset(range(8 if quick else len(photos)))
        batches = list(photos.batches(loaded.preprocess, 50))
        reference = evaluate_classifier(model, batches, keep_logits=True)
        both = [evaluate_classifier(each, batches, keep_logits=True) for each in models]
        rows += paired(reference, both, {"calibration_seed": seed, "evaluation": f"{len(photos)} of {split}"})
    return rows


def paired(reference: ClassifyResult, both: list[ClassifyResult], where: dict[str, Any]) -> list[dict[str, object]]:
    """A row for the official model and for ours."""
    found = dict(zip(("official", "ours"), both, strict=True))
    rows: list[dict[str, object]] = []
    theirs, their_kl = found["official"], divergence(reference, found["official"])
    for name, each in found.items():
        kl = divergence(reference, each)
        right = each.predictions.correct.double() - theirs.predictions.correct.double()
        row = where | {"site": name, "n": len(kl)} | top(each)
        row |= {"top1_float": reference.top1, "logit_kl": round(float(kl.mean()), 4)}
        nats = (kl - their_kl).double() / 100
        differences = {"top1_minus_official": bootstrap(right[None]), "kl_minus_official": bootstrap(nats[None])}
        for label, values in differences.items():
            row |= dict(zip((label, f"{label}_low", f"{label}_high"), values, strict=True))
        rows.append(row)
    return rows


def divergence(reference: ClassifyResult, found: ClassifyResult) -> Tensor:
    assert reference.logits is not None
    assert found.logits is not None
    return logit_kl(reference.logits, found.logits)


def main() -> int:
    """Run the parts that were asked for."""
    made: argparse.ArgumentParser = parser(__doc__, "Takes about ten minutes on one free core.")
    made.add_argument("--official", type=Path, required=True, help="folder UQ-ViT/classification of a checkout")
    made.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0], help="of part whole")
    made.add_argument("--every", type=int, default=1, help="part alpha: search in every so many blocks (default: all)")
    args = made.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        print(shared.missing, file=sys.stderr)
        return 2
    folder, where = results_folder(args), provenance()
    official, loaded = Official(args.official), shared.model()
    images = shared.calibration(0).tensor(loaded.preprocess)[: 4 if args.quick else None]
    graph = trace(loaded.model, images[:1])
    searched = math.ceil(len(graph.blocks) / args.every) * len(LAYERS)
    every_linear = len(graph.blocks) * len(LAYERS) * len(args.seeds)
    steps = Steps(len(args.parts) + searched * ("alpha" in args.parts) + every_linear * ("whole" in args.parts))
    plan = resolve("uq_vit", BITS, options={"fc2": True})
    common = {
        "model": MODEL,
        "bits": BITS,
        "alpha": "",
        "evaluation": "",
        "images": len(images),
        "calibration_seed": 0,
        **shared.weights(),
        **where,
    }
    good = True
    for part in args.parts:
        if part == "whole":
            rows = []
            for seed in args.seeds:
                rows += compare_whole(official, shared, loaded, seed, args.quick, steps)
            for row in rows:
                print(f"whole: {row}")
        elif part == "alpha":
            found = vitq.quantize(loaded.model, "uq_vit", BITS, images).log["balance_channels"]["alphas"]
            rows = official.run(
                loaded.model, images, {s: -1.0 if a is None else a for s, a in found.items()}, args.every, steps
            )
            ratios = [float(str(r["block_error_ours"])) / float(str(r["block_error_official"])) for r in rows]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"alpha: ours make the error of the block {mean:.4f} times theirs (mean), at most {max(ratios):.4f}")
        else:
            qmodel = insert(copy.deepcopy(loaded.model), graph, plan)
            compare = compare_demax if part == "demax" else compare_ratios
            rows = compare(official, qmodel, images)
            if part == "demax":
                worst = min(float(str(r["equal_share"])) for r in rows)
                print(f"demax: at least {100 * worst:.4f} % of the values of every site are equal")
                good &= worst >= CODES
            else:
                worst = max(float(str(r["median_rel_diff"])) for r in rows)
                print(f"ratio: median difference at most {100 * worst:.2f} % for every linear")
                good &= worst <= RATIO
            steps.step(part)
        append_rows(folder / "parity_uq_vit.csv", [{"part": part} | common | row for row in rows], KEY)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
