"""Add a fixed vector to the input of a linear before it is quantized, and take its share off the bias.

Shapes:  x (n, in) inputs    N (in,) noise    W (out, in), B (out,) weight and bias    Q_W, Q_A their quantizers
Formula: y = Q_W(W) Q_A(x + N) + B', B' = B - Q_W(W) N; N = (shift + amplitude * u) * step, u uniform in (-1, 1)
Source:  NoisyQuant, arXiv 2211.16056, section 3.2; the shift: its code, which the paper does not describe
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from vitq.calibrate.capture import watch_prefix
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.core.rewrite import REWRITES, Rewrite
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.graph.insert import QuantizedOwner
from vitq.quantizers.base import Quantizer

CHILD = "noise"
BITS = 16
GOLDEN = (5**0.5 - 1) / 2  # multiples of it spread evenly, so that a sample of rows follows no period of tokens


class Noise(nn.Module):
    """Adds a vector. It is the rewrite's, not the model's."""

    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x + N, in x's dtype."""
        return x + self.vector.to(x.dtype)


def _add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Forward hook in front of a linear."""
    return (module.get_submodule(CHILD)(*args),)


@REWRITES.register("add_noise")
@final
class AddNoiseRewrite(Rewrite):
    """Noise enters linears, and what their weights make of it leaves their biases.

    args: `modules`, nn.Linear each; `norm`, the LayerNorm whose bias takes the noise, or None where it is added to the
    linears' input. tensors: noise (in,) float16; one (out,) to add to each bias, in the order of the modules, as "0" ….
    """

    name = "add_noise"

    def prepare(self, model: nn.Module) -> None:
        """Give a zero bias to linears that have none, and hang the noise in front of them."""
        for name in self.args["modules"]:
            module = model.get_submodule(name)
            if module.bias is None:
                weight = module.weight
                assert isinstance(weight, Tensor)
                module.bias = nn.Parameter(weight.new_zeros(len(weight)))
            if self.args["norm"] is None:
                module.add_module(CHILD, Noise(self.tensors["noise"]))
                module.register_forward_pre_hook(_add)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Change the biases in place; float32 sums, rounded once."""
        if self.args["norm"] is not None:
            _shift(model.get_submodule(self.args["norm"]), self.tensors["noise"])
        for number, name in enumerate(self.args["modules"]):
            _shift(model.get_submodule(name), self.tensors[str(number)])

    def extra_bits(self) -> int:
        """Of noise that no bias of a LayerNorm holds."""
        copies = len(self.args["modules"]) if self.args["norm"] is None else 0
        return BITS * copies * self.tensors["noise"].numel()


def _shift(module: nn.Module, by: Tensor) -> None:
    bias = module.bias
    assert isinstance(bias, Tensor)
    bias.data = (bias.data.float() + by.float()).to(bias.dtype)


@dataclass(frozen=True)
class _Place:
    """A linear whose input can take noise."""

    input: Site
    weight: Site

    @property
    def module(self) -> str:
        return self.input.owner

    def quantizer(self, qmodel: QuantModel) -> Quantizer:
        found = qmodel.quantizers[self.input]
        assert isinstance(found, Quantizer)
        return found

    def used(self, qmodel: QuantModel) -> Tensor:
        """(out, in) weight as the product sees it."""
        weight = qmodel.weight(self.weight)
        assert weight is not None
        return qmodel.quantizers[self.weight](weight.data) if self.weight.id in qmodel.quantizers else weight.data


def _places(qmodel: QuantModel) -> dict[str, _Place]:
    """By input site, the linears that can take noise, in execution order."""
    uses = Counter(id(module._parameters.get("bias")) for module in qmodel.model.modules())
    found: dict[str, _Place] = {}
    for call in qmodel.graph.calls:
        owner = qmodel.model.get_submodule(call.owner)
        sites = {name: qmodel.graph.sites[s] for name, s in zip(call.operands, call.sites, strict=True)}
        if call.op != "linear" or call.reason is not None or not _plain(owner) or "weight" not in sites:
            continue
        place = _Place(sites["input"], sites["weight"])
        if place.input.id not in qmodel.quantizers or qmodel.weight(place.weight) is not owner.weight:
            continue
        if place.quantizer(qmodel).layout.keep in ((), (-1,)) and (owner.bias is None or uses[id(owner.bias)] == 1):
            found.setdefault(place.input.id, place)
    return found


def _plain(module: nn.Module) -> bool:
    """A linear that multiplies its input as it comes: nobody has given it a forward of its own."""
    if not isinstance(module, nn.Linear) or (isinstance(module, QuantizedOwner) and module._vitq_forward is not None):
        return False
    own = next(c for c in type(module).__mro__ if "forward" in vars(c) and c is not QuantizedOwner)
    return own is nn.Linear


def _groups(qmodel: QuantModel) -> list[tuple[str | None, list[_Place]]]:
    """Linears that are given the same noise: those behind one LayerNorm, which is named, if they quantize alike."""
    places = _places(qmodel)
    found: dict[str, tuple[str | None, list[_Place]]] = {site: (None, [place]) for site, place in places.items()}
    for pair in qmodel.graph.pairs:
        if not all(site in places for site in pair.inputs):
            continue
        group = [places[site] for site in dict.fromkeys(pair.inputs)]
        first, *others = (place.quantizer(qmodel) for place in group)
        beta = qmodel.model.get_parameter(f"{pair.norm}.bias")
        if beta.dtype == torch.float32 and all(_alike(first, other) for other in others):
            found[group[0].input.id] = pair.norm, group
            for place in group[1:]:
                del found[place.input.id]
    return list(found.values())


def _alike(a: Quantizer, b: Quantizer) -> bool:
    """Whether two quantizers give the same values, noise included."""
    same = type(a) is type(b) and (a.bits, a.layout, a.settings()) == (b.bits, b.layout, b.settings())
    if not same or (a.noise is None) != (b.noise is None):
        return False
    pairs = [(value, b.params()[name]) for name, value in a.params().items()]
    pairs += [(a.noise, b.noise)] if a.noise is not None and b.noise is not None else []
    return all(torch.equal(one, other) for one, other in pairs)


@PASSES.register("add_noise")
@final
class AddNoise(Pass):
    """Choose the noise of every linear's input by the error of its output, each on what the ones before it give.

    Args:
        largest: the amplitudes that are tried go from 0 to this, in steps of the input's quantizer …
        amplitudes: … in so many equal parts.
        shift: first choose one number to add to all channels, from -1 to 1 steps in as many parts.
        rows: how many inputs are looked at, evenly spread over images and tokens.

    There is none where two folds over the inputs do not gain by it, or where there are fewer of these than channels (a
    head behind a class token, with few images).

    Until `freeze`, the quantizer adds the noise and takes it off its values, so that every other pass sees what the
    product sees, and quantizers switched off leave the float model. `freeze` moves it into the model: B' is made from
    the final codes, whatever pass chose them. Linears behind one LayerNorm share their noise: its bias takes it, and
    nothing is left to add at inference.

    Convolutions, products inside functions, linears that share a bias or have a forward of their own, and inputs with
    scales per token or group stay as they are; the log says how many.
    """

    name = "add_noise"
    slot = "fit"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    cost = "one forward of the calibration images (about three with more than 32), and the search"

    def __init__(self, largest: float = 2.0, amplitudes: int = 20, shift: bool = False, rows: int = 2048) -> None:
        if largest <= 0 or amplitudes < 1 or rows < 1:
            raise CompositionError("pass 'add_noise': largest must be above 0; amplitudes and rows at least 1")
        self.amplitudes = torch.linspace(0, largest, amplitudes + 1)[1:].tolist()
        self.shifts = torch.linspace(-1, 1, amplitudes + 1).tolist() if shift else []
        self.rows = rows

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images, or twice."""
        if data is None or data.count == 0:
            raise DataError("choosing noise needs calibration images; give data= (or --calib)")
        if sum(spec.name == self.name for spec in qmodel.plan.passes) > 1:
            raise CompositionError(f"{qmodel.plan.recipe.name!r} adds noise twice; leave one out")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Choose every noise."""
        assert data is not None
        groups = {places[0].input.id: places for _, places in _groups(qmodel)}
        draws = {name: 2 * torch.rand(places[0].input.shape[-1]) - 1 for name, places in groups.items()}
        found: list[_Choice] = []

        def make(site: Site) -> _Choice:
            found.append(_Choice(qmodel, groups[site.id], draws[site.id], self, data.count))
            return found[-1]

        watch_prefix(qmodel, [places[0].input for places in groups.values()], make, data, progress)
        qmodel.pending.append(settle_noise)
        every = [place for places in groups.values() for place in places]
        chosen = [choice for choice in found if choice.quantizers[0].noise is not None]
        count = sum(len(choice.quantizers) for choice in chosen)
        qmodel.log[self.name] = {
            "with_noise": count,
            "without": len(every) - count,
            "kept": len(qmodel.graph.with_roles(WEIGHT)) - len({place.weight.id for place in every}),
            "amplitude": round(sum(choice.amplitude for choice in chosen) / max(len(chosen), 1), 4),
            "error_of_before": round(sum(choice.ratio for choice in found) / max(len(found), 1), 4),
        }


class _Choice:
    """Gathers inputs of linears that share them, then chooses their noise."""

    def __init__(self, qmodel: QuantModel, places: list[_Place], draw: Tensor, settings: AddNoise, images: int) -> None:
        self.quantizers = [place.quantizer(qmodel) for place in places]
        self.weight = torch.cat([place.used(qmodel).float() for place in places])
        self.draw, self.settings = draw.to(self.weight.device), settings
        self.rows = Rows(settings.rows, images)
        self.amplitude, self.ratio = 0.0, 1.0

    def observe(self, x: Tensor, images: int) -> None:
        self.rows.add(x.reshape(-1, x.shape[-1]), images)

    def finish(self) -> None:
        if self.rows.seen < len(self.draw):
            return
        draw, step = self.draw, step_of(self.quantizers[0])
        judge = Judge(self.quantizers[0], self.rows.gathered(), self.weight)
        self.rows.parts.clear()
        shifts, amplitudes = [0.0, *self.settings.shifts], [0.0, *self.settings.amplitudes]
        shift = shifts[pick([judge.errors(torch.full_like(draw, s) * step) for s in shifts])]
        self.amplitude = amplitudes[pick([judge.errors((shift + a * draw) * step) for a in amplitudes])]
        chosen = ((shift + self.amplitude * draw) * step).half().float()
        if bool(chosen.any()):
            self.ratio = float(judge.errors(chosen).sum() / judge.errors(torch.zeros_like(draw)).sum())
            for quantizer in self.quantizers:
                quantizer.noise = chosen


class Rows:
    """A sample of rows, gathered over micro-batches in bounded memory, whatever these are.

    Args:
        wanted: how many; all if there are no more.
        images: how many images will be seen in all.
    """

    def __init__(self, wanted: int, images: int) -> None:
        self.wanted, self.images = wanted, images
        self.seen = 0
        self.parts: list[Tensor] = []
        self.at: Tensor | None = None

    def add(self, rows: Tensor, images: int) -> None:
        """Take in the rows (n, C) of so many images."""
        if self.at is None:
            total = len(rows) * self.images // images
            number = torch.arange(min(self.wanted, total), dtype=torch.float64)
            spread = number + number * GOLDEN % 1 if total > self.wanted else number
            self.at = (spread * max(total / self.wanted, 1.0)).long()
        here = self.at[(self.at >= self.seen) & (self.at < self.seen + len(rows))] - self.seen
        self.parts.append(rows[here.to(rows.device)].detach().float())
        self.seen += len(rows)

    def gathered(self) -> Tensor:
        """(m, C) float32, m at most as many as wanted."""
        return torch.cat(self.parts)


class Judge:
    """The squared error of a linear's output, for noise that may be added to its input.

    Args:
        quantizer: of the input, fitted.
        x: (n, in) inputs.
        weight: (out, in) as the product sees it.
    """

    def __init__(self, quantizer: Quantizer, x: Tensor, weight: Tensor) -> None:
        self.quantizer, self.x = quantizer, x
        # Only |W e| matters: the triangle of W has as much to say, and no more rows than columns.
        self.weight = torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight

    def errors(self, noise: Tensor) -> Tensor:
        """(2,) sums of squares over the outputs of each half of the rows, with the noise as it will be stored."""
        noise = noise.half().float()
        if not bool(noise.isfinite().all()):
            return torch.full((2,), math.inf, dtype=torch.float64, device=noise.device)
        wrong = self.quantizer.simulate_with(self.x + noise, self.quantizer.params()) - noise - self.x
        rows = (wrong @ self.weight.T).square().sum(1, dtype=torch.float64)
        return torch.stack([half.sum() for half in rows.tensor_split(2)])


def pick(errors: list[Tensor]) -> int:
    """Which has the least error; the first, unless what each half of the rows would pick gains on the other half."""
    halves = torch.stack(errors)
    first, second = halves.argmin(0).tolist()
    gains = bool(halves[first, 1] + halves[second, 0] < halves[0].sum())
    return int(halves.sum(1).argmin()) if gains else 0


def step_of(quantizer: Quantizer) -> Tensor:
    """(groups,) mean distance of neighbouring levels."""
    groups, count = quantizer.layout.groups, quantizer.code_count
    params = {name: value.reshape(groups, 1) for name, value in quantizer.params().items()}
    codes = torch.arange(count, dtype=torch.float32, device=next(iter(params.values())).device)
    low, high = torch.aminmax(quantizer.decode_with(codes.expand(groups, count), params), dim=1)
    return (high - low) / (count - 1)


def settle_noise(qmodel: QuantModel) -> None:
    """Move the noise of quantizers into the model, when all codes are final."""
    folded = 0
    for norm, places in _groups(qmodel):
        noise = places[0].quantizer(qmodel).noise
        if noise is None:
            continue
        shifts = {str(n): -(place.used(qmodel).double() @ noise.double()).float() for n, place in enumerate(places)}
        args = {"norm": norm, "modules": [place.module for place in places]}
        qmodel.apply_rewrite(AddNoiseRewrite(args, {"noise": noise.half(), **shifts}))
        folded += norm is not None
        for place in places:
            place.quantizer(qmodel).noise = None
    qmodel.log[AddNoise.name] |= {"norms": folded}
