"""Compares the parts of `noisyquant` with the official NoisyQuant code on the same tensors.

    git clone https://github.com/kriskrisliu/NoisyQuant && git -C NoisyQuant checkout ba544d1
    python benchmarks/parity_noisyquant.py --official NoisyQuant --shared ../shared

The tensors are the float inputs of the linears of one block of DeiT-Tiny on calibration photos. For each linear, the
official `quant_forward` searches a shift and an amplitude on them; ours gets the same step, weights, base noise, rows
and candidates:

(a) form       our rewrite with the vector that the official code found: its outputs and ours;
(b) shift      what the official search chose and what ours does, and by how much the error of ours is larger
               ("difference"; "error_of_none" is the official choice's error in parts of that without noise);
(c) amplitude  likewise, around the official shift.

Requires outputs to be equal but for rounding, and errors of our choices within 0.1 % of those of the official ones:
noise of 16 bits moves the minimum of a flat curve. The official base noise `randn * 2 - 1` is Gaussian around -1, where
the paper and the authors' other code draw uniformly from (-1, 1); here `torch.rand_like` stands in for
`torch.randn_like`. The clip search is not compared: it leaves its scale unset where the largest clip is best.

Writes results/parity_noisyquant.csv. Exit code 1 if a requirement fails.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from _common import MODEL, Shared, Steps, parser, provenance, results_folder
from torch import Tensor, nn

from vitq.passes.noise import AddNoiseRewrite, Judge
from vitq.quantizers.uniform import UniformQuantizer
from vitq.report.table import append_rows

KEY = ("model", "bits", "linear", "part")
BITS = 6
BLOCK = "blocks.6"
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
OUTPUTS = 1e-5  # largest difference in parts of the largest output: float32 sums in another order
ERRORS = 1e-3


def official_module(folder: Path) -> ModuleType:
    """fast_quant.py, without its progress bars, and with uniform noise."""
    spec = importlib.util.spec_from_file_location("fast_quant", folder / "fast_quant.py")
    if spec is None or spec.loader is None or not (folder / "fast_quant.py").is_file():
        raise SystemExit(f"{folder} is no checkout of NoisyQuant: it has no fast_quant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["tqdm"] = _Bar
    return module


class _Bar:
    """In place of tqdm."""

    def __init__(self, items: Any, **ignored: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)

    def set_postfix(self, **ignored: Any) -> None:
        return


def inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Float inputs of the linears."""
    found: dict[str, Tensor] = {}
    for name in LINEARS:
        model.get_submodule(f"{BLOCK}.{name}").register_forward_hook(
            lambda module, args, out, name=name: found.__setitem__(name, args[0].clone())
        )
    with torch.no_grad():
        model(images)
    return found


def searched(official: ModuleType, linear: nn.Linear, x: Tensor, step: Tensor, *, noise: bool) -> tuple[Tensor, Tensor]:
    """(vector, output) of the official search on a linear whose weight is quantized already."""
    vars(linear).update(
        own_name="linear", bit=BITS, act_scale=step, clip_search=False, noisy_search=True, with_noisy_quant=True,
        search_mean=True, search_noisy=noise, add_noise=False,
    )  # fmt: skip
    original = torch.randn_like
    torch.randn_like = torch.rand_like
    try:
        torch.manual_seed(0)
        out: Tensor = official.quant_forward(linear, x)
    finally:
        torch.randn_like = original
    return torch.as_tensor(linear.noisy_bias).flatten().expand(x.shape[-1]), out


def frozen(linear: nn.Linear, quantizer: UniformQuantizer, vector: Tensor, x: Tensor) -> Tensor:
    """Our output in the inference form."""
    holder = nn.ModuleDict({"linear": nn.Linear(linear.in_features, linear.out_features)})
    made = holder["linear"]
    assert isinstance(made, nn.Linear)
    made.load_state_dict({"weight": linear.weight, "bias": linear.bias})
    shift = -(linear.weight.double() @ vector.double()).float()
    rewrite = AddNoiseRewrite({"norm": None, "modules": ["linear"]}, {"noise": vector, "0": shift})
    rewrite.prepare(holder)
    rewrite.apply(holder)
    return F.linear(quantizer(made.get_submodule("noise")(x)), made.weight, made.bias)


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/parity_noisyquant.py --official NoisyQuant")
    options.add_argument("--official", type=Path, required=True, help="checkout of kriskrisliu/NoisyQuant")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be compared: {shared.missing}")
    out, loaded, count = results_folder(args), shared.model(), 1 if args.quick else 2
    official = official_module(args.official)
    seen = inputs(loaded.model, shared.calibration(0).subset(range(count)).tensor(loaded.preprocess))
    where = {"calibration": f"{count} of calibration_seed0.txt", "seed": 0, "official_commit": "ba544d1"}
    where |= shared.weights() | provenance()
    rows, failed, steps = list[dict[str, Any]](), False, Steps(len(LINEARS))
    for name in LINEARS:
        for found in compare(official, loaded.model.get_submodule(f"{BLOCK}.{name}"), seen[name]):
            failed |= not found["passed"]
            rows.append({"model": MODEL, "bits": f"w{BITS}a{BITS}", "linear": f"{BLOCK}.{name}"} | found | where)
            steps.say(f"{'pass' if found['passed'] else 'FAIL'} {name} {found}")
        steps.step(name)
    append_rows(out / "parity_noisyquant.csv", rows, KEY)
    return int(failed)


@torch.no_grad()
def compare(official: ModuleType, linear: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Rows of one linear."""
    assert isinstance(linear, nn.Linear)
    linear.weight.data = official.quant_weight(linear.weight.data, BITS)
    step = x.abs().max() / (2 ** (BITS - 1) - 1)
    quantizer = UniformQuantizer(BITS, symmetric=True)
    quantizer.set_params({"scale": step, "zero_point": torch.tensor(2.0 ** (BITS - 1))})
    quantizer.state = "on"
    judge = Judge(quantizer, x.reshape(-1, x.shape[-1]), linear.weight.data)

    def error(noise: Tensor) -> float:
        return float(judge.errors(noise).sum())

    shift, _ = searched(official, linear, x, step, noise=False)
    vector, theirs = searched(official, linear, x, step, noise=True)
    torch.manual_seed(0)
    draw = torch.rand_like(x[:1, :1, :]).flatten() * 2 - 1
    tried = {
        "shift": (shift, [torch.full_like(draw, n / 200) * step for n in range(-200, 200)]),
        "amplitude": (vector, [shift + draw * step * n / 1000 for n in range(2000)]),
    }
    ours = frozen(linear, quantizer, vector, x)
    far = float((ours - theirs).abs().max() / ours.abs().max())
    nothing = dict.fromkeys(("official", "ours", "error_of_none"), "")
    found: list[dict[str, Any]] = [{"part": "form"} | nothing | {"difference": f"{far:.1e}", "passed": far < OUTPUTS}]
    for part, (chosen, candidates) in tried.items():
        best = min(candidates, key=error)
        excess = error(best) / error(chosen) - 1
        middle, strength = float((best / step).mean()), float(((best - shift) / step).abs().max())
        row = {"part": part, "official": _told(chosen, shift, step), "ours": f"{middle:.3f} +- {strength:.3f}"}
        row |= {"error_of_none": f"{error(chosen) / error(0 * draw):.4f}", "difference": f"{excess:.1e}"}
        found.append(row | {"passed": abs(excess) < ERRORS})
    return found


def _told(vector: Tensor, shift: Tensor, step: Tensor) -> str:
    return f"{float((vector / step).mean()):.3f} +- {float(((vector - shift) / step).abs().max()):.3f}"


if __name__ == "__main__":
    sys.exit(main())
