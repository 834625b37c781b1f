"""Shows that parity mode of `repq_vit` computes what the official RepQ-ViT code computes.

    git clone https://github.com/zkkli/RepQ-ViT && git -C RepQ-ViT checkout a160561
    python benchmarks/repq_parity.py --official RepQ-ViT/classification --shared ../shared

The official script runs on the shared DeiT-Tiny and the calibration files that the stored peer predictions were
made with. Every tensor that one of its quantizers sees is also given to our quantizer of the same site, so one
difference cannot hide or cause others:

(a) fit       our search and format on the official tensor: scale, zero-point, codes and values of every site;
(b) fold      our reparameterization, given the official channel scales: gamma, beta, weight, bias, merged scale;
(c) final     after reparameterization and second forward, layer by layer in execution order: again every site;
    free run  `vitq.quantize(..., options={"parity": True})` on the same images, and both models' predictions on
              `ablate`. There one flipped code changes everything behind it, so this is reported, not required.

Writes one CSV row per site and stage. The codes of the official code are recovered from its outputs. Exit code 1
if a requirement fails. Adaptations of the official code: benchmarks/_official.py.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _official import Official, OfficialError, Side, official_side
from torch import Tensor, nn

from vitq import quantize
from vitq.core import roles
from vitq.core.errors import VitqError
from vitq.core.format import Bits
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site
from vitq.data.images import ImageSet, open_images
from vitq.data.source import LoadedModel, load_model
from vitq.evaluate.predictions import Predictions, align, read_predictions
from vitq.graph.trace import trace
from vitq.passes.fit import Fit
from vitq.pipeline import insert, resolve
from vitq.quantizers.base import Quantizer

MODEL = "deit_tiny_patch16_224"
CODES = 0.999  # share of codes that must be equal
SCALES = 1e-6  # largest relative difference of a scale: a few float32 roundings
FOLD = 1e-5  # of folded parameters, relative to the largest of the tensor: sums over channels in float32
OPERANDS = {
    "input": "input_quantizer",
    "weight": "weight_quantizer",
    "query": "matmul1.quantizer_A",
    "key": "matmul1.quantizer_B",
    "softmax": "matmul2.quantizer_A",
    "value": "matmul2.quantizer_B",
}


@dataclass
class Row:
    """One site (or folded parameter) at one stage; differences are ours against official."""

    bits: str
    stage: str
    site: str
    official: str
    kind: str
    scale_rel_diff: float | None = None
    scales_equal_share: float | None = None
    zero_point_diff: float | None = None
    codes_equal_share: float | None = None
    value_rel_diff: float | None = None
    n: int = 0
    free_scale_rel_diff: float | None = None
    free_zero_point_diff: float | None = None


@dataclass
class Parity:
    """Compares site by site while the official code runs.

    Attributes:
        ours: our model of parity mode, unfitted when the run starts.
        names: official quantizer -> our site.
        scales: channel scales and zero-points that the official code found, by site.
        official: its last scale and zero-point, by site.
        norm_inputs: what the official model's folded norms were given last, by norm.
    """

    bits: str
    ours: QuantModel
    fit: Fit
    fold: Any
    names: dict[str, Site]
    rows: list[Row] = field(default_factory=list)
    scales: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    official: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    norm_inputs: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, stage: str, name: str, theirs: nn.Module, x: Tensor, out: Tensor) -> None:
        """Compare one quantizer on the tensor that the official one has just quantized."""
        site = self.names[name]
        quantizer = self._quantizer(site)
        if site.role == roles.WEIGHT:
            self.fit.weight_search.fit(quantizer, x)
        elif stage == "calibrate":
            self.fit.search.fit(quantizer, x)
        elif not quantizer.fitted:
            raise OfficialError(f"{name} is used for the first time after the reparameterization")
        official = official_side(theirs, out)
        kind = _kind(site, quantizer)
        self.rows.append(_compared(Row(self.bits, stage, site.id, name, kind), _our_side(quantizer, x), official))
        self.official[site.id] = (official.scale, official.zero_point)
        if stage == "calibrate" and self.ours.formats[site.id].per == "channel" and official.zero_point is not None:
            self.scales[site.id] = (official.scale, official.zero_point)
        if stage == "final":
            self._folded_codes(site, official)

    def folded(self, theirs: nn.Module) -> None:
        """Fold the official channel scales with our pass, and compare every changed parameter."""
        for pair in self._pairs():
            for site in pair.inputs:
                scale, zero_point = self.scales[site]
                self._quantizer(self.ours.graph.sites[site]).set_params({"scale": scale, "zero_point": zero_point})
        self.fold.run(self.ours, None, Silent())
        for pair in self._pairs():
            names = [("gamma", f"{pair.norm}.weight"), ("beta", f"{pair.norm}.bias")]
            names += [("weight", str(self.ours.graph.sites[w].param)) for w in pair.weights]
            names += [("bias", str(b)) for b in pair.biases]
            theirs.get_submodule(pair.norm).register_forward_hook(partial(self._note_input, pair.norm))
            for kind, name in names:
                mine, other = self.ours.model.get_parameter(name).data, theirs.get_parameter(name).data
                largest = float((mine - other).abs().max() / other.abs().max())
                row = Row(self.bits, "fold", name, name, f"folded {kind}", value_rel_diff=largest, n=mine.numel())
                self.rows.append(row)

    def free(self, qmodel: QuantModel) -> None:
        """Note how far the scales of our own, free run are from the official ones."""
        for row in self.rows:
            if row.stage == "final":
                quantizer = qmodel.quantizers[row.site]
                assert isinstance(quantizer, Quantizer)
                scale, zero_point = self.official[row.site]
                row.free_scale_rel_diff = _relative(quantizer.params()["scale"].reshape(-1), scale)
                if zero_point is not None:
                    difference = quantizer.params()["zero_point"].reshape(-1) - zero_point
                    row.free_zero_point_diff = float(difference.abs().max())

    def take_folded(self, qmodel: QuantModel, theirs: nn.Module) -> None:
        """Copy the official folded norms and biases into our model: the one thing that is rounded differently."""
        for pair in self._pairs():
            for name in (f"{pair.norm}.weight", f"{pair.norm}.bias", *map(str, pair.biases)):
                qmodel.model.get_parameter(name).data.copy_(theirs.get_parameter(name).data)

    def _pairs(self) -> list[Any]:
        return [p for p in self.ours.graph.pairs if set(p.inputs) <= set(self.scales)]

    def _note_input(self, norm: str, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self.norm_inputs[norm] = args[0]

    @torch.no_grad()
    def _folded_codes(self, site: Site, official: Side) -> None:
        """Codes of what comes out of our folded norm, and of the weight we folded, against those of theirs."""
        quantizer, x = self._quantizer(site), self.ours.weight(site)
        for pair in self._pairs():
            if site.id in pair.inputs:
                normed = self.ours.model.get_submodule(pair.norm)(self.norm_inputs[pair.norm])
                row = Row(self.bits, "fold", site.id, pair.norm, "folded norm output")
                self.rows.append(_compared(row, _our_side(quantizer, normed), official))
            elif site.id in pair.weights and x is not None:
                quantizer = copy.deepcopy(quantizer)
                self.fit.weight_search.fit(quantizer, x.data)
                row = next(r for r in self.rows if r.stage == "fold" and r.site == site.param)
                largest = row.value_rel_diff
                _compared(row, _our_side(quantizer, x.data), official).value_rel_diff = largest

    def _quantizer(self, site: Site) -> Quantizer:
        quantizer = self.ours.quantizers[site]
        assert isinstance(quantizer, Quantizer)
        return quantizer


def _our_side(quantizer: Quantizer, x: Tensor) -> Side:
    params = quantizer.params()
    zero_point = params.get("zero_point")
    with torch.no_grad():
        codes = quantizer.encode(x)
        values = quantizer.simulate_with(x, params)
    return Side(params["scale"].reshape(-1), None if zero_point is None else zero_point.reshape(-1), codes, values)


def _compared(row: Row, ours: Side, official: Side) -> Row:
    row.scale_rel_diff = _relative(ours.scale, official.scale)
    row.scales_equal_share = float((ours.scale == official.scale).double().mean())
    if official.zero_point is not None and ours.zero_point is not None:
        row.zero_point_diff = float((ours.zero_point - official.zero_point).abs().max())
    # A fractional zero-point makes fractional codes; recovering them costs a few roundings.
    equal = (ours.codes - official.codes).abs() < 0.01
    row.codes_equal_share = float(equal.double().mean())
    size = official.values.abs().clamp(min=torch.finfo(torch.float32).tiny)
    # Where codes are equal: a flipped code differs by a whole step, and is counted above.
    row.value_rel_diff = float(((ours.values - official.values).abs() / size)[equal].max()) if equal.any() else None
    row.n = equal.numel()
    return row


def _relative(mine: Tensor, theirs: Tensor) -> float:
    return float(((mine - theirs).abs() / theirs.abs()).max())


def _kind(site: Site, quantizer: Quantizer) -> str:
    name = type(quantizer).__name__.removesuffix("Quantizer").lower()
    per = "per channel" if quantizer.layout.keep else "per tensor"
    return f"{'weight' if site.role == roles.WEIGHT else 'activation'} {name} {per}"


def start(loaded: LoadedModel, bits: str, images: Tensor, seed: int) -> Parity:
    """Our unfitted model of parity mode, and which of its sites is which official quantizer."""
    plan = resolve("repq_vit", bits, options={"parity": True}, seed=seed)
    graph = trace(loaded.model, images[:1])
    ours = insert(copy.deepcopy(loaded.model), graph, plan)
    passes = [spec.build() for spec in plan.passes]
    fit = passes[0]
    assert isinstance(fit, Fit)
    names = {f"{site.owner}.{OPERANDS[site.operand]}": site for site in ours.sites()}
    return Parity(bits, ours, fit, passes[1], names)


@torch.no_grad()
def predict(model: nn.Module, images: ImageSet, loaded: LoadedModel) -> Predictions:
    """Top-1 classes."""
    model.eval()
    found = [model(batch.images).argmax(-1) for batch in images.batches(loaded.preprocess, 50)]
    assert images.labels is not None
    return Predictions(images.ids, images.labels, torch.cat(found))


def agreement(a: Predictions, b: Predictions) -> str:
    """Top-1 of both and how often they agree, in words."""
    both = align([a, b])
    one, two = both.predicted
    top1 = [100 * float((p == both.labels).double().mean()) for p in (one, two)]
    same = int((one == two).sum())
    return f"top-1 {top1[0]:.2f} and {top1[1]:.2f} %, same class on {same} of {len(both.ids)} images"


def summarize(rows: list[Row]) -> bool:
    """Print what was required and whether it holds."""
    every = True
    for stage, title in (("calibrate", "(a) fit"), ("final", "(c) final, layer by layer")):
        for kind in sorted({r.kind for r in rows if r.stage == stage}):
            chosen = [r for r in rows if r.stage == stage and r.kind == kind]
            scale, zero = _worst(chosen, "scale_rel_diff", max), _worst(chosen, "zero_point_diff", max)
            codes, exact = _worst(chosen, "codes_equal_share", min), _worst(chosen, "scales_equal_share", min)
            n, flips = sum(r.n for r in chosen), sum(round((1 - (r.codes_equal_share or 0)) * r.n) for r in chosen)
            passed = codes >= CODES and scale <= SCALES and zero <= SCALES * 255
            every &= passed
            print(f"{_word(passed)}  {title}: {kind}, {len(chosen)} sites")
            print(f"        scales differ by at most {scale:.1e} (at least {exact:.1%} equal to the bit), ", end="")
            print(f"zero-points by {zero:.1e}; values of equal codes by {_worst(chosen, 'value_rel_diff', max):.1e}")
            print(f"        codes: {flips} of {n} differ, worst site {codes:.4%} equal")
    for kind in ("gamma", "beta", "weight", "bias", "norm output"):
        chosen = [r for r in rows if r.stage == "fold" and r.kind == f"folded {kind}"]
        largest = _worst(chosen, "value_rel_diff", max)
        coded = [r for r in chosen if r.codes_equal_share is not None]
        codes = _worst(coded, "codes_equal_share", min) if coded else 1.0
        passed = bool(chosen) and largest <= FOLD and codes >= CODES
        every &= passed
        also = f"; codes of ours and theirs: worst {codes:.4%} equal" if coded else ""
        print(f"{_word(passed)}  (b) folded {kind}, {len(chosen)} tensors: differ by at most {largest:.1e}{also}")
    return every


def report_free(rows: list[Row]) -> None:
    """Print how far a free run goes with the official one; nothing is required."""
    final = [r for r in rows if r.stage == "final"]
    apart = [r for r in final if (r.free_scale_rel_diff or 0) > SCALES or (r.free_zero_point_diff or 0) > SCALES * 255]
    worst = max(r.free_scale_rel_diff or 0 for r in final)
    first = f"; the first: {apart[0].site}" if apart else ""
    print(f"      free run: scales of {len(apart)} of {len(final)} sites differ, by at most {worst:.1e}{first}")


def _worst(rows: list[Row], name: str, choose: Callable[[list[float]], float]) -> float:
    values = [getattr(r, name) for r in rows if getattr(r, name) is not None] or [0.0]
    return choose(values) if all(map(math.isfinite, values)) else math.nan  # no requirement holds for NaN


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def run(official: Official, shared: Path, bits: str, seed: int, count: int) -> tuple[list[Row], bool]:
    """Both implementations at one bit width; prints the summary.

    Returns:
        (rows, whether every requirement holds).
    """
    sample = shared / "data" / "imagenet_sample"
    peers = shared / "reference" / "peer_predictions"
    loaded = load_model(MODEL, shared / "models" / f"{MODEL}.safetensors")
    files = open_images(peers / f"calibration_seed{seed}.txt", root=sample)
    if count > len(files):
        raise OfficialError(f"{count} images asked, the calibration list of seed {seed} has {len(files)}")
    images = files.subset(range(count)).tensor(loaded.preprocess)
    widths = Bits.parse(bits)
    assert widths.weight is not None
    assert widths.act is not None

    print(f"{bits}, seed {seed}, {count} images, {MODEL}", flush=True)
    parity = start(loaded, bits, images, seed)
    model = copy.deepcopy(loaded.model)
    theirs = official.run(model, images, widths.weight, widths.act, seed, parity.watch, parity.folded)
    seen = {(r.stage, r.official) for r in parity.rows}
    unseen = {name for name in parity.names if not {("calibrate", name), ("final", name)} <= seen}
    if unseen:
        raise OfficialError(f"sites without an official counterpart: {', '.join(sorted(unseen))}")
    ours = quantize(loaded.model, "repq_vit", bits, [images], options={"parity": True}, seed=seed)
    parity.free(ours)
    passed = summarize(parity.rows)
    report_free(parity.rows)
    ablate = open_images(sample / "ablate")
    a, b = predict(ours, ablate, loaded), predict(theirs, ablate, loaded)
    print(f"      free run on ablate, ours and official: {agreement(a, b)}")
    parity.take_folded(ours, theirs)
    a = predict(ours, ablate, loaded)
    print(f"      the same with their rounding of folded betas and biases in ours: {agreement(a, b)}")
    stored = peers / "ablate" / f"repq-vit_{bits}_seed{seed}.csv"
    if stored.exists() and count == len(files):
        print(f"      official here and the stored peer predictions: {agreement(b, read_predictions(stored))}")
    print(f"{_word(passed)}  {bits}: all requirements")
    return parity.rows, passed


def write(path: Path, rows: list[Row]) -> None:
    """One line per site and stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            texts = {k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(texts)


def main() -> int:
    """Entry point; 0 if every requirement holds."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="example: python benchmarks/repq_parity.py --official RepQ-ViT/classification --bits w4a4 w6a6",
    )
    parser.add_argument("--official", type=Path, required=True, help="classification folder of a RepQ-ViT checkout")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models/, data/, reference/")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w6a6"], help="one or several, such as w4a4 w6a6")
    parser.add_argument("--seed", type=int, default=0, help="which calibration list, 0 to 2")
    parser.add_argument("--images", type=int, default=32, help="calibration images, from the start of that list")
    parser.add_argument("--out", type=Path, default=Path("results/repq_parity.csv"), help="where the table goes")
    args = parser.parse_args()
    if not (args.shared / "models").is_dir():
        parser.error(f"{args.shared} has no models/; give the shared folder with --shared")
    try:
        official = Official(args.official)
        results = [run(official, args.shared, bits, args.seed, args.images) for bits in args.bits]
    except (OfficialError, VitqError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for found, _ in results for row in found]
    write(args.out, rows)
    print(f"{args.out}: {len(rows)} rows")
    return int(not all(passed for _, passed in results))


if __name__ == "__main__":
    sys.exit(main())
