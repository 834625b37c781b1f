"""What the official ERQ code and ours make of the same tensors: results/parity_erq.csv.

    git clone https://github.com/zysxmu/ERQ && git -C ERQ checkout 2f5b4ce
    python benchmarks/parity_erq.py --official ERQ --shared ../shared

The official script runs on the shared DeiT-Tiny and calibration photos, adapted from outside only where it would not
run here (no GPU, today's timm, constant channels: _official.py). Its inputs, weights and scales are then given to ours:

absorb    Aqer: our regression with its strength, and a damped bias as it has, against the weights it found: the change
          itself, and what of the gain they miss (a head has 32 rows for 192 inputs, so float32 solves it badly);
halves    Wqer without flips and with one scale per channel: our codes with its strength against its codes, up to the
          last columns, where it cuts into halves otherwise (it counts the bias as a column);
refine    Wqer with flips and one scale per channel: the error of the output on calibration photos and on others
          (split `ablate`), in parts of that of nearest rounding, of its codes and of ours with our own settings;
free run  top-1 of its whole, with the two scales per channel that it has for some weights, and of ours.

Exit code 1 if `absorb` or `halves` differ by more than float32 sums explain.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _common import MODEL, Shared, Steps, parser, predict, provenance, results_folder
from _official import OfficialError, _accept_keywords, _neutral_step_for_constants, _without_identity_norms
from torch import Tensor, nn

import vitq
from vitq.calibrate.moments import ErrorMoments
from vitq.core.format import Bits, Format
from vitq.data.images import open_images
from vitq.passes.round.absorb import absorbed
from vitq.passes.round.halves import RoundHalves, halves
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import build_quantizer
from vitq.report.table import append_rows

FILES = ("test_quant_expand.py", "quant/quantizer.py", "quant/quant_model.py", "utils/build_model.py")
CHECKOUT = "git clone https://github.com/zysxmu/ERQ && git -C ERQ checkout 2f5b4ce"
WQER = "replace_W_afterquant_vector_twopart"
FLIPS = 100  # as the official code has it
COE = 10_000  # what its README runs DeiT with
KEY = ("model", "bits", "part", "weight")
ABSORB, CODES = 1e-3, 0.995  # largest part of the gain that is missed, share of codes that must be equal
LAST_COLUMNS = 3
OTHERS = 32  # photos that nothing was fitted on


class Official:
    """The official package, imported from a checkout."""

    def __init__(self, path: Path) -> None:
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise OfficialError(f"{path} is not a checkout of ERQ: it lacks {', '.join(missing)}. Get it: {CHECKOUT}")
        sys.path.insert(0, str(path.resolve()))
        self.script: Any = importlib.import_module("test_quant_expand")
        self.building: Any = importlib.import_module("utils.build_model")
        self.modules: Any = importlib.import_module("quant.quant_modules")
        self.source = (path / FILES[0]).read_text(encoding="utf-8")
        _neutral_step_for_constants(self.modules.UniformQuantizer)
        _accept_keywords(self.building)

    def linears(self, model: nn.Module) -> dict[str, Any]:
        """Its linears and convolutions by name."""
        kinds = (self.modules.QuantLinear, self.modules.QuantConv2d)
        return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}

    def run(self, model: nn.Module, images: Tensor, bits: Bits) -> Iterator[Any]:
        """Its own main(); gives the model before Aqer, after it, and at the end. The working folder holds its cache."""
        stages: list[Any] = []
        original = self.script.set_quant_state
        calls: list[None] = []

        def set_state(q_model: nn.Module, **state: bool) -> None:
            original(q_model, **state)
            calls.append(None)
            if len(calls) in (4, 5):  # before Aqer, and before the weight scales are chosen
                stages.append(copy.deepcopy(q_model))

        def validate(args: Any, loader: Any, q_model: nn.Module, criterion: Any, device: Any) -> tuple[float, ...]:
            stages.append(q_model)
            return 0.0, 0.0, 0.0

        asked = {"model": "deit_tiny", "device": "cpu", "w_bits": bits.weight, "a_bits": bits.act, "coe": COE}
        words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        self.building.timm = SimpleNamespace(create_model=lambda name, pretrained: _without_identity_norms(model))
        args = self.script.get_args_parser().parse_args([*words, "--calib-batchsize", str(len(images))])
        data = [(images, torch.zeros(len(images)))]
        replaced = {"args": args, "build_dataset": lambda args: (data, None), "validate": validate}
        vars(self.script).update(replaced | {"set_quant_state": set_state})
        try:
            self.script.main()
        finally:
            self.script.set_quant_state = original
        return iter(stages)

    def wqer(self, flips: int) -> Callable[..., None]:
        """Its Wqer, which is a function inside main(), with another bound on the number of flips."""
        found = next(n for n in ast.walk(ast.parse(self.source)) if isinstance(n, ast.FunctionDef) and n.name == WQER)
        for node in ast.walk(found):
            if isinstance(node, ast.Compare) and ast.unparse(node) == f"count < {FLIPS}":
                node.comparators = [ast.Constant(flips)]
        made: dict[str, Any] = {}
        exec(compile(ast.fix_missing_locations(ast.Module([found], [])), FILES[0], "exec"), vars(self.script), made)
        function: Callable[..., None] = made[WQER]
        return function


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors stay where they are; the official code's prints and its cache go elsewhere."""
    original, here = Tensor.cuda, Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
        Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign, assignment]
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)
            Tensor.cuda = original  # type: ignore[method-assign]


def rows_of(module: Any, x: Tensor) -> Tensor:
    """Inputs as rows that the weight, as a matrix, is multiplied with."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def inputs(official: Official, model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear -> its float inputs and what its quantizer makes of them, as rows with a one at their end."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    official.script.set_quant_state(model, input_quant=False, weight_quant=False)
    handles = []
    for name, module in official.linears(model).items():

        def see(module: Any, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
            used = module.input_quantizer(args[0]) if hasattr(module, "input_quantizer") else args[0]
            pair = (rows_of(module, t) for t in (args[0], used))
            exact, used = (torch.cat([t, t.new_ones(len(t), 1)], dim=1) for t in pair)
            found[name] = exact, used

        handles.append(module.register_forward_hook(see))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def moments(pair: tuple[Tensor, Tensor]) -> ErrorMoments:
    """Of the rows, their ones included."""
    gathered = ErrorMoments(pair[0].shape[1], pair[0].device)
    gathered.add(*pair)
    return gathered


def side_by_side(module: Any) -> Tensor:
    """(out, in + 1) weight and bias, float64."""
    return torch.cat([module.weight.flatten(1), module.bias[:, None]], dim=1).double()


def our_quantizer(module: Any, bits: int) -> Quantizer:
    """Uniform, per channel, with the scales that the official one found."""
    made = build_quantizer(Format("uniform", bits, "channel"), ("channel", "in"), module.weight.flatten(1).shape)
    theirs = module.weight_quantizer
    made.set_params({"scale": theirs.delta.reshape(-1), "zero_point": theirs.zero_point.reshape(-1)})
    made.state = "on"
    return made


def strength(module: Any, rows: int, *, regression: bool) -> float:
    """The official ridge, per row."""
    if isinstance(module, nn.Conv2d):
        return float(COE) / rows
    return (0.1 if regression and module.out_features == 1000 else 0.1 * COE) / rows


def without_bias(h: Tensor, ridge: float) -> Tensor:
    """(in, in): the metric left when a damped bias, which is never rounded, has made up for what it can."""
    damped = h + ridge * torch.eye(len(h)).to(h)
    return damped[:-1, :-1] - damped[:-1, -1:] @ damped[-1:, :-1] / damped[-1, -1]


def error(w: Tensor, q: Tensor, h: Tensor) -> float:
    """Of the output, its mean apart."""
    wrong = (w - q).double()
    return float(((wrong @ h) * wrong).sum())


def compare_aqer(before: dict[str, Any], after: dict[str, Any], seen: dict[str, ErrorMoments]) -> list[dict[str, Any]]:
    """Our regression with the official strength against what the official one made of weight and bias."""
    rows = []
    for name, m in before.items():
        if isinstance(m, nn.Conv2d):  # the official code leaves it out
            continue
        h, w = seen[name].used.matrix, side_by_side(m)
        ridge = strength(m, seen[name].used.count, regression=True) / float(h.diagonal().mean())
        theirs = side_by_side(after[name]) - w
        ours = absorbed(w, h, seen[name].matrix, ridge) - w
        strong = h + ridge * h.diagonal().mean() * torch.eye(len(h)).to(h)
        rows.append(
            {
                "part": "absorb",
                "weight": name,
                "rel_diff": float((ours - theirs).abs().max() / theirs.abs().max()),
                "left_over": error(ours, theirs, strong) / error(ours, torch.zeros_like(ours), strong),
            }
        )
    return rows


def compare_wqer(
    aimed: dict[str, Any],
    rounded: dict[int, dict[str, Any]],
    seen: dict[str, ErrorMoments],
    unseen: dict[str, ErrorMoments],
    bits: int,
) -> list[dict[str, Any]]:
    """Our codes against the official ones, on the same weights and scales."""
    rows, ours = [], RoundHalves()
    for name, m in aimed.items():
        w, quantizer, used = m.weight.flatten(1), our_quantizer(rounded[0][name], bits), seen[name].used
        nearest = quantizer(w)
        metric = without_bias(used.matrix, strength(m, used.count, regression=False))
        codes = halves(w, metric, quantizer, 0.0, flips=0)[0]
        same = (codes - quantizer(rounded[0][name].weight.flatten(1))).abs() < quantizer.params()["scale"] / 2
        rows.append({"part": "halves", "weight": name, "codes_equal": float(same[:, :-LAST_COLUMNS].double().mean())})
        theirs = quantizer(rounded[FLIPS][name].weight.flatten(1))
        h, other = (found[name].used.covariance[:-1, :-1] for found in (seen, unseen))
        mine = halves(w, h, quantizer, ours.damp, flips=ours.flips)[0]
        row = {"part": "refine", "weight": name}
        for label, h_of in (("seen", h), ("unseen", other)):
            base = error(w, nearest, h_of)
            row |= {f"official_{label}": error(w, theirs, h_of) / base, f"ours_{label}": error(w, mine, h_of) / base}
        rows.append(row)
    return rows


def run(official: Official, shared: Shared, bits: str, count: int, steps: Steps) -> list[dict[str, Any]]:
    """Every part at one bit width."""
    loaded, widths = shared.model(), Bits.parse(bits)
    assert widths.weight is not None
    images = shared.calibration(0).subset(range(count)).tensor(loaded.preprocess)
    split = open_images(shared.sample / "ablate", num_classes=loaded.num_classes)
    others = split.subset(range(0, len(split), -(-len(split) // min(count, OTHERS)))).tensor(loaded.preprocess)
    with on_cpu(), torch.no_grad():
        before, after, final = official.run(copy.deepcopy(loaded.model), images, widths)
        steps.step(f"{bits}: official run")
        cache = next(Path("fp_output").iterdir())
        seen = {name: moments(pair) for name, pair in inputs(official, copy.deepcopy(before), images).items()}
        unseen = {name: moments(pair) for name, pair in inputs(official, copy.deepcopy(before), others).items()}
        rounded: dict[int, dict[str, Any]] = {}
        for flips in (0, FLIPS):
            model = copy.deepcopy(after)
            for m in official.linears(model).values():
                m.weight_quantizer.two_part = False
                m.weight_quantizer(m.weight)  # chooses its scales
            official.wqer(flips)(model, str(cache), official.script.args)
            rounded[flips] = official.linears(model)
            steps.step(f"{bits}: official Wqer with {flips} flips")
    aimed = official.linears(after)
    rows = compare_aqer(official.linears(before), aimed, seen)
    rows += compare_wqer(aimed, rounded, seen, unseen, widths.weight)
    steps.step(f"{bits}: compared")
    assert split.labels is not None
    x, labels = split.tensor(loaded.preprocess), split.labels
    ours = vitq.quantize(loaded.model, "erq", bits, images)
    official.script.set_quant_state(model, input_quant=True, weight_quant=True)
    sides = {"official": final, "official_one_scale": model, "ours": ours, "float": loaded.model}
    with on_cpu():
        found = {
            n: sum(int((predict(m, a) == b).sum()) for a, b in zip(x.split(50), labels.split(50), strict=True))
            for n, m in sides.items()
        }
    rows.append({"part": "free run", "weight": ""} | {f"top1_{n}": 100 * hits / len(x) for n, hits in found.items()})
    steps.step(f"{bits}: free run on {len(x)} photos")
    return rows


def summary(rows: list[dict[str, Any]], bits: str) -> bool:
    """Print what was found, and whether it is what it must be."""
    far = max(r["left_over"] for r in rows if r["part"] == "absorb")
    same = min(r["codes_equal"] for r in rows if r["part"] == "halves")
    print(f"{'pass' if far <= ABSORB else 'FAIL'}  {bits} absorb: theirs misses at most {far:.1e} of the gain")
    print(f"{'pass' if same >= CODES else 'FAIL'}  {bits} halves: at least {same:.4%} of a weight's codes are equal")
    for label in ("seen", "unseen"):
        means = [
            sum(r[f"{side}_{label}"] for r in rows if r["part"] == "refine") / sum(r["part"] == "refine" for r in rows)
            for side in ("official", "ours")
        ]
        print(f"      {bits} refine, {label} photos: {means[0]:.4f} of the error of nearest, ours {means[1]:.4f}")
    print(f"      {bits} free run:", {k: round(v, 2) for k, v in rows[-1].items() if k.startswith("top1")})
    return far <= ABSORB and same >= CODES


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/parity_erq.py --official ERQ --bits w4a4")
    options.add_argument("--official", type=Path, required=True, help="a checkout of ERQ")
    options.add_argument("--bits", nargs="+", default=["w4a4"], help="one or several, such as w4a4 w3a3")
    args = options.parse_args()
    shared = Shared(args.shared.resolve())
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    out, count = results_folder(args), 4 if args.quick else 32
    where = (
        {"seed": 0, "calibration": f"{count} of calibration_seed0.txt", "coe": COE} | shared.weights() | provenance()
    )
    try:
        official = Official(args.official)
    except OfficialError as error_:
        options.error(str(error_))
    steps, passed = Steps(5 * len(args.bits)), True
    for bits in args.bits:
        rows = run(official, shared, bits, count, steps)
        passed &= summary(rows, bits)
        texts = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        append_rows(out / "parity_erq.csv", [{"model": MODEL, "bits": bits} | t | where for t in texts], KEY)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
