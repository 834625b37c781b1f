"""Rounding half by half on quantized inputs: against slow float64 forms of its definitions; what each part is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitq
from vitq.calibrate.linears import Linear, linears, quantized
from vitq.calibrate.moments import ErrorMoments
from vitq.calibrate.search import Search
from vitq.core.errors import CompositionError, DataError
from vitq.core.format import Bits, Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, resolve_recipe
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.round.absorb import absorbed
from vitq.passes.round.halves import RoundHalves, halves
from vitq.quantizers.base import Quantizer
from vitq.quantizers.registry import build_quantizer

each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])
DAMP = 0.1


def fitted(w: Tensor, bits: int, per: str = "channel") -> Quantizer:
    quantizer = build_quantizer(Format("uniform", bits, per), ("channel", "in"), tuple(w.shape))
    Search("mse", exact=True).fit(quantizer, w)
    quantizer.state = "on"
    return quantizer


def mixed(rows: int, size: int, seed: int) -> Tensor:
    """Inputs whose channels have much to do with one another, and a mean."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=draw) @ torch.randn(size, size, generator=draw) / size**0.5
    return x + torch.randn(size, generator=draw)


def coarse(x: Tensor) -> Tensor:
    """Inputs as quantized ones are: whole steps, and clipped."""
    return (x * 2).round().clamp(-3, 4) / 2


# -- absorb ------------------------------------------------------------------------------------------------


def test_absorbing_is_the_ridge_regression_of_the_paper() -> None:
    """δ[W, b] = (A'A + λI)^-1 A'(Y - A [W, b]'), A the quantized inputs beside a one, Y the exact outputs."""
    x, w, b = mixed(300, 12, seed=0), torch.randn(5, 12).double(), torch.randn(5).double()
    strength = 7.0
    a = torch.cat([coarse(x), torch.ones(300, 1)], 1).double()
    both = torch.cat([w, b[:, None]], 1)
    left = x.double() @ w.T + b - a @ both.T
    expected = both + (torch.linalg.inv(a.T @ a + strength * torch.eye(13).double()) @ a.T @ left).T
    moments = ErrorMoments(13, torch.device("cpu"))
    moments.add(torch.cat([x, torch.ones(300, 1)], 1), a.float())
    h = moments.used.matrix
    got = absorbed(both, h, moments.matrix, strength / 300 / float(h.diagonal().mean()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # moments are sums of float32 products


def test_with_covariances_the_bias_is_free_and_the_weight_damped() -> None:
    x, w, ridge = mixed(400, 10, seed=1), torch.randn(3, 10).double(), 0.5
    moments = ErrorMoments(10, torch.device("cpu"))
    for part in (slice(0, 130), slice(130, 400)):  # any micro-batches
        moments.add(x[part], coarse(x)[part])
    q = coarse(x).double()
    damp = (400 * ridge * q.var(0, unbiased=False).mean()).sqrt() * torch.eye(10).double()
    rows = torch.cat([torch.cat([q, torch.ones(400, 1)], 1), torch.cat([damp, torch.zeros(10, 1)], 1)])
    change = torch.linalg.lstsq(rows, torch.cat([(x.double() - q) @ w.T, torch.zeros(10, 3).double()])).solution
    got = absorbed(w, moments.used.covariance, moments.covariance, ridge)
    torch.testing.assert_close(got, w + change[:-1].T, rtol=1e-5, atol=1e-6)


# -- halves ------------------------------------------------------------------------------------------------


def left_over(delta: Tensor, now: slice, later: slice, h: Tensor) -> tuple[float, Tensor]:
    """The error of one row when its later columns make up for delta at the present ones, and how they do."""
    reply = -delta @ h[now, later] @ torch.linalg.inv(h[later, later])
    error = delta @ h[now, now] @ delta + 2 * reply @ h[later, now] @ delta + reply @ h[later, later] @ reply
    return float(error), reply


def definition(w: Tensor, h: Tensor, quantizer: Quantizer, flips: int, *, compensate: bool) -> Tensor:
    """Row by row: try every flip, keep the one that leaves least, until none leaves less."""
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h)).double()
    aim, chosen = w.double().clone(), w.double().clone()
    start, size = 0, w.shape[1]
    while start < size:
        stop = start + max(1, (size - start) // 2)
        now, later = slice(start, stop), slice(stop, size if compensate else stop)
        code = quantizer.encode(aim.float())
        nearest = quantizer.decode(code)
        towards = torch.where(nearest < aim.float(), code + 1, code - 1).clamp(0, 2**quantizer.bits - 1)
        both = torch.stack([nearest, quantizer.decode(towards)]).double()[:, :, now]
        for row, target in enumerate(aim[:, now]):
            best = torch.zeros(stop - start, dtype=torch.int64)  # 0 nearest, 1 the other
            for _ in range(flips):
                tried = [best, *(best ^ one for one in torch.eye(stop - start, dtype=torch.int64))]
                errors = [left_over(both[:, row].gather(0, t[None])[0] - target, now, later, h)[0] for t in tried]
                if min(errors) >= errors[0] - 1e-7:
                    break
                best = tried[errors.index(min(errors))]
            chosen[row, now] = both[:, row].gather(0, best[None])[0]
            aim[row, later] += left_over(chosen[row, now] - target, now, later, h)[1]
        start = stop
    return chosen.float()


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("flips", [0, 1, 100])
@pytest.mark.parametrize("per", ["channel", "tensor", "group:4"])
def test_the_codes_are_those_of_the_definition(per: str, flips: int, compensate: bool) -> None:
    x = mixed(200, 12, seed=2).double()
    h = x.T @ x / 200
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    quantizer = fitted(w, 3, per)
    got, _ = halves(w, h, quantizer, DAMP, flips=flips, compensate=compensate)
    expected, nearest = definition(w, h, quantizer, flips, compensate=compensate), quantizer(w)
    damped = h + DAMP * h.diagonal().mean() * torch.eye(12).double()
    errors = [(((w - q).double() @ damped) * (w - q).double()).sum(1) for q in (expected, nearest)]
    better = errors[0] < errors[1]
    assert bool((expected != nearest).any()) == (flips > 0 or compensate)
    assert torch.equal(got[better], expected[better])
    assert torch.equal(got[~better], nearest[~better])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_never_worse_than_nearest_and_on_the_grid(rows: int, size: int, bits: int, seed: int) -> None:
    x = mixed(rows, size, seed).double()  # often singular: fewer rows than channels
    x[:, 0] = 0  # a channel that is always zero
    w = torch.randn(5, size, generator=torch.Generator().manual_seed(seed))
    quantizer = fitted(w, bits)
    got, ratio = halves(w, x.T @ x / rows, quantizer, DAMP, flips=100)
    assert torch.equal(quantizer(got), got)
    assert ratio <= 1 + 1e-6


def test_inputs_that_are_all_zero_change_nothing() -> None:
    w, zero = torch.randn(4, 6), torch.zeros(6, 6).double()
    assert torch.equal(absorbed(w.double(), zero, zero, 1.0), w.double())
    quantizer = fitted(w, 4)
    assert torch.equal(halves(w, zero, quantizer, DAMP, flips=100)[0], quantizer(w))


# -- the pass ----------------------------------------------------------------------------------------------


def made(model: nn.Module, images: Tensor, bits: str = "w4a4", **options: float | bool | str) -> QuantModel:
    """A plain fit, then the pass."""
    base = resolve_recipe("minmax", Bits.parse(bits))
    passes = (*base.passes, PassSpec.of("round_halves", **options))
    return vitq.quantize(model, replace(base, passes=passes), bits, images, freeze=False)


def errors(qmodel: QuantModel, float_model: nn.Module, images: Tensor) -> dict[str, float]:
    """Of each linear's output on float inputs that are quantized there, in parts of the output's spread."""
    found: dict[str, float] = {}
    handles = []
    for linear in linears(qmodel):
        name = str(linear.module)
        module, ours = float_model.get_submodule(name), qmodel.model.get_submodule(name)
        if not isinstance(module, nn.Linear) or not isinstance(ours, nn.Linear):
            continue

        def look(
            module: nn.Module,
            args: tuple[Tensor],
            out: Tensor,
            name: str = name,
            linear: Linear = linear,
            ours: nn.Linear = ours,
        ) -> None:
            used = quantized(qmodel.quantizers[linear.input], args[0])
            got = nn.functional.linear(used, qmodel.quantizers[linear.weight](ours.weight), ours.bias)
            found[name] = float((got - out).square().mean() / (out - out.flatten(0, -2).mean(0)).square().mean())

        handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        float_model(images)
    for handle in handles:
        handle.remove()
    return found


def mean(found: dict[str, float], name: str = "blocks") -> float:
    chosen = [value for key, value in found.items() if name in key]
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize(
    ("off", "bits"), [({"absorb": 0.0}, "w8a3"), ({"flips": 0}, "w3a8"), ({"compensate": False}, "w3a8")]
)
@each_model
def test_mechanisms_lower_the_error_of_the_outputs_on_other_images(
    model: str, off: dict[str, float], bits: str
) -> None:
    float_model, images, others = build_zoo(model), seeded_images(32), seeded_images(64)[32:]
    with_it, without = (errors(made(float_model, images, bits, **o), float_model, others) for o in ({}, off))
    assert mean(with_it) < 0.97 * mean(without), (mean(with_it), mean(without))


@each_model
def test_on_the_calibration_images_every_linear_has_the_mean_of_the_float_model(model: str) -> None:
    float_model, images = build_zoo(model), seeded_images(40)  # two micro-batches
    qmodel = made(float_model, images, "w3a3")
    means: dict[str, list[Tensor]] = {}
    for linear in linears(qmodel):
        module, ours = (m.get_submodule(str(linear.module)) for m in (float_model, qmodel.model))
        if isinstance(module, nn.Linear) and qmodel.quantizers[linear.weight].rounded is not None:

            def note(
                module: nn.Module, args: tuple[Tensor], out: Tensor, linear: Linear = linear, ours: nn.Module = ours
            ) -> None:
                assert isinstance(ours, nn.Linear)
                used = quantized(qmodel.quantizers[linear.input], args[0])
                got = nn.functional.linear(used, qmodel.quantizers[linear.weight](ours.weight), ours.bias)
                means[linear.weight.id] = [t.flatten(0, -2).double().mean(0) for t in (got, out)]

            module.register_forward_hook(note)
    with torch.no_grad():
        float_model(images)
    assert len(means) >= 12
    for site, (got, wanted) in means.items():
        assert float((got - wanted).abs().max()) < 1e-4, site


def test_the_float_weights_stay_and_biases_come_with_a_rewrite() -> None:
    float_model = build_zoo("seeded_swin")
    qmodel = made(float_model, seeded_images(8))
    added = qmodel.rewrites[-1].args["modules"]
    for name, value in float_model.named_parameters():
        if not name.endswith("bias"):
            assert torch.equal(qmodel.model.get_parameter(name), value), name
    bare = [n for n, m in float_model.named_modules() if isinstance(m, nn.Linear) and m.bias is None]
    assert bare  # Swin's merging
    assert set(bare) <= set(added)
    assert all(bool((qmodel.model.get_submodule(n).get_parameter("bias") != 0).any()) for n in bare)


class Twice(nn.Module):
    """One linear that is called two times, one whose weight serves two linears, and one on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.tied, self.also, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.also.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        out: Tensor = self.last(torch.relu(self.also(torch.relu(self.tied(x)))))
        return out


@pytest.mark.parametrize("flow", ["parallel", "prefix"])
@pytest.mark.parametrize("images", [8, 40])
def test_weights_that_serve_several_calls_are_left_alone(images: int, flow: str) -> None:
    model = Twice().eval()
    qmodel = made(model, torch.randn(images, 5, 16), "w3a3", flow=flow)
    assert qmodel.log["round_halves"]["rounded"] == 1
    assert qmodel.log["round_halves"]["kept"] == 2
    assert qmodel.rewrites[-1].args["modules"] == ["last"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(qmodel.model.get_parameter(n), p)}
    assert changed == {"last.bias"}


def test_the_flow_decides_which_inputs_are_looked_at() -> None:
    float_model, images = build_zoo("seeded_vit"), seeded_images(32)
    parallel, prefix = (made(float_model, images, "w3a3", flow=flow) for flow in ("parallel", "prefix"))
    first, second = linears(parallel)[:2]
    # The first linear sees the images in both; the second, what a quantized first one gives.
    for site, same in ((first.weight, True), (second.weight, False)):
        values = [qmodel.quantizers[site].rounded for qmodel in (parallel, prefix)]
        assert isinstance(values[0], Tensor)
        assert isinstance(values[1], Tensor)
        assert torch.equal(*values) is same


def test_micro_batches_give_nearly_the_same_codes() -> None:
    """Scales differ in their last bit, and so do values; on other images, a quarter of the codes differ."""
    images = seeded_images(32)
    runs = [made(build_zoo("seeded_vit"), data) for data in (images, list(images.split(8)), seeded_images(64)[32:])]

    def codes(qmodel: QuantModel) -> Tensor:
        weights = [qmodel.quantizers[linear.weight] for linear in linears(qmodel)]
        return torch.cat([q.encode(q.rounded).flatten() for q in weights if q.rounded is not None])

    whole, parts, others = (codes(qmodel) for qmodel in runs)
    assert float((whole != parts).double().mean()) < 0.01
    assert float((whole != others).double().mean()) > 0.1


def test_with_few_images_the_head_keeps_its_codes_and_with_many_it_does_not() -> None:
    for count, rounded in ((32, 13), (160, 14)):  # the head has 64 inputs
        log = made(build_zoo("seeded_vit"), seeded_images(count)).log["round_halves"]
        assert log["rounded"] == rounded
        assert log["rounded"] + log["kept"] == 14
        assert 0 < log["error_of_nearest"] < 1


def test_weights_left_in_float_stay_as_they_are() -> None:
    float_model = build_zoo("seeded_vit")
    qmodel = vitq.quantize(float_model, "erq", "w16a4", seeded_images(8))
    assert qmodel.log["round_halves"]["rounded"] == 0
    assert torch.equal(qmodel.model.get_parameter("blocks.0.attn.proj.bias"), float_model.blocks[0].attn.proj.bias)


@pytest.mark.parametrize(
    "option", [{"absorb": -1.0}, {"flips": -1}, {"damp": 0.0}, {"flow": "sideways"}], ids=lambda o: next(iter(o))
)
def test_options_that_cannot_be_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(CompositionError, match=next(iter(option))):
        RoundHalves(**option)


def test_without_images_it_says_what_it_needs() -> None:
    with pytest.raises(DataError, match="needs calibration images"):
        vitq.quantize(build_zoo("seeded_vit"), "erq", "w4a16", example=seeded_images(1))


def test_two_that_round_do_not_go_together() -> None:
    with pytest.raises(CompositionError, match="'round' of 'erq' is already filled by 'erq'"):
        resolve_recipe("erq+gptq", Bits(4, 4))
