"""Balancing channels: the formula in float64, the same function, a smaller error, what nothing can take up."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.linears import linears
from vitq.calibrate.search import Search
from vitq.core import roles
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.format import Bits
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, resolve_recipe
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph import integer
from vitq.graph.trace import trace
from vitq.passes.fit import Fit
from vitq.passes.reparam.balance import AFTER_NORM, ELSEWHERE, BalanceChannels, _error, _steps_of_columns, _Target
from vitq.passes.reparam.input_scale import CHILD, DivideInputRewrite
from vitq.pipeline import insert, resolve
from vitq.quantizers.base import Quantizer
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

ALL = {"fc2": True}
each_model = pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])


def outlying(name: str, dead: bool = False) -> nn.Module:
    """A zoo model with a few channels many times larger than the rest, wherever channels are balanced."""
    model = build_zoo(name)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[::16] *= 12.0
                if dead:
                    module.weight[3], module.bias[3] = 0.0, 2.5
            if path.endswith("qkv"):
                values = module.weight.shape[0] // 3 * 2  # type: ignore[union-attr, operator]
                module.weight[values::16] *= 8.0  # type: ignore[index]
            if path.endswith("fc1"):
                module.weight[::16] *= 4.0  # type: ignore[index]
    return model


def fitted(model: nn.Module, images: Tensor, bits: str = "w4a4", **options: Any) -> QuantModel:
    """Quantized as uq_vit does, up to the balancing."""
    plan = resolve("uq_vit", bits, options=options.pop("options", ALL), **options)
    qmodel = insert(copy.deepcopy(model), trace(model, images[:1]), plan)
    Fit("percentile_mse", "percentile_mse", flow="prefix").run(qmodel, Batches.of(images), Silent())
    return qmodel


def balanced(qmodel: QuantModel, images: Tensor, **settings: Any) -> dict[str, Any]:
    BalanceChannels(**settings).run(qmodel, Batches.of(images), Silent())
    return qmodel.log["balance_channels"]  # type: ignore[no-any-return]


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


# -- the formula ---------------------------------------------------------------------------------------------


def target(after_norm: bool, dead: tuple[int, ...] = (), bits: int = 4, channels: int = 6) -> _Target:
    generator = torch.Generator().manual_seed(7)
    quantizer = UniformQuantizer(bits, Layout((-1,), (channels,), 1))
    low, high = -torch.rand(channels, generator=generator) * 3, torch.rand(channels, generator=generator) * 5 + 0.1
    quantizer.set_params(quantizer.range_to_params(low, high))
    alive = torch.tensor([channel not in dead for channel in range(channels)])
    weight_quantizer = UniformQuantizer(bits, Layout((-2,), (9,), 2))
    weights: list[tuple[Tensor, Quantizer | None]] = [
        (torch.randn(9, channels, generator=generator) * torch.rand(channels, generator=generator), weight_quantizer)
    ]
    rows = [torch.randn(40, channels, generator=generator) * torch.arange(1.0, channels + 1)]
    return _Target(["site"], quantizer, weights, lambda ratio, shift: None, alive, after_norm, rows=rows)


@pytest.mark.parametrize("alpha", AFTER_NORM)
@pytest.mark.parametrize("dead", [(), (1, 4)])
def test_ratio_and_shift_after_a_norm_are_those_of_the_reference_text(alpha: float, dead: tuple[int, ...]) -> None:
    one, steps = target(True, dead), [0.3, 0.1, 0.2, 0.7, 0.4, 0.25]
    scale = [float(s) for s in one.quantizer.scale.flatten()]
    zero = [float(z) for z in one.quantizer.zero_point.flatten()]
    live = [c for c in range(6) if c not in dead]
    mean_scale, mean_step = sum(scale[c] for c in live) / len(live), sum(steps[c] for c in live) / len(live)
    mean_low = sum(-zero[c] * scale[c] for c in live) / len(live)
    ratio, shift = one.ratio(alpha, torch.tensor(steps))
    for c in live:
        wanted = (scale[c] / mean_scale) ** (1 - alpha) / (steps[c] / mean_step) ** alpha
        assert float(ratio[c]) == pytest.approx(wanted, rel=1e-5)
        # x / r - b with b = low / r - mean low
        assert float((2.0 + shift[c]) / ratio[c]) == pytest.approx(
            2.0 / wanted + zero[c] * scale[c] / wanted + mean_low, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("alpha", [a for a in ELSEWHERE if a is not None])
def test_the_ratio_elsewhere_is_that_of_the_official_code(alpha: float) -> None:
    one, steps = target(False), [0.3, 0.1, 0.2, 0.7, 0.4, 0.25]
    scale, zero = (one.quantizer.params()[name].flatten().tolist() for name in ("scale", "zero_point"))
    largest = [max(z * s, (15 - z) * s) for s, z in zip(scale, zero, strict=True)]
    middle = sum(largest) / 6
    ratio, shift = one.ratio(alpha, torch.tensor(steps))
    assert not shift.any()
    for c in range(6):
        part = max(largest[c] / middle, 1.0) ** (1 - alpha) / (steps[c] / (sum(steps) / 6)) ** alpha
        assert float(ratio[c]) == pytest.approx(max(part, 1.0), rel=1e-5)


def test_steps_of_columns_are_symmetric_ranges() -> None:
    w = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1, 0.0])
    steps = _steps_of_columns(w, Search("minmax"))
    torch.testing.assert_close(steps[:3] / steps[0], w.abs().amax(0)[:3] / w[:, 0].abs().max())
    assert 0 < float(steps[3]) < 1e-3 * float(steps[0])


def naive_error(x: Tensor, w: Tensor, bits: int) -> float:
    """Both uniformly quantized from minimum to maximum, the weight per row, in float64."""

    def grid(v: Tensor) -> Tensor:
        step = (v.max() - v.min()) / (2**bits - 1)
        zero = (-v.min() / step).round()
        return ((v / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step

    seen, used = grid(x), torch.stack([grid(row) for row in w])
    return float((seen @ used.T - x @ w.T).square().sum())


@pytest.mark.parametrize("after_norm", [True, False])
def test_the_alpha_is_the_best_of_a_slow_search_in_float64(after_norm: bool) -> None:
    one, seen = target(after_norm), []
    search = Search("minmax", exact=True)
    one.change = lambda ratio, shift: seen.append((ratio, shift))
    alpha = one.balance(search)
    x, w = one.rows[0].double(), one.weights[0][0].double()
    steps = _steps_of_columns(w.float(), search)
    errors = {}
    for tried in AFTER_NORM if after_norm else ELSEWHERE:
        ratio, shift = (value.double() for value in one.ratio(tried, steps))
        errors[tried] = naive_error((x + shift) / ratio, w * ratio, 4)
    assert errors[alpha] <= min(errors.values()) * (1 + 1e-3)
    assert max(errors.values()) > 1.1 * errors[alpha]
    ratio, shift = one.ratio(alpha, steps)
    assert seen == [] if alpha is None else torch.equal(seen[0][0], ratio.double())


def test_weights_in_float_are_left_all_the_work() -> None:
    for after_norm in (True, False):
        one = target(after_norm)
        one.weights = [(w, None) for w, _ in one.weights]
        assert one.balance(Search("minmax")) in (0.0, None)


def test_the_error_counts_every_weight() -> None:
    x, w = torch.randn(20, 6), torch.randn(9, 6)
    like, search = UniformQuantizer(4), Search("minmax")
    single = _error(x, [(w, None)], like, search)
    assert _error(x, [(w, None), (w, None)], like, search) == pytest.approx(2 * single)


# -- in models -----------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("dead", [False, True])
def test_the_float_output_stays_and_all_channels_have_one_scale(name: str, dead: bool) -> None:
    # In float64, so that nothing but the arithmetic of the rewrites shows.
    images, model = seeded_images(4).double(), outlying(name, dead).double()
    qmodel = fitted(model, images)
    channels = [s for s in qmodel.formats if qmodel.formats[s].per == "channel" and qmodel.weight(s) is None]
    log = balanced(qmodel, images)
    assert log["kept"] == 0
    assert set(log["alphas"]) == set(channels)
    assert any(alpha not in (None, 0.0) for alpha in log["alphas"].values())
    changed = sum(alpha is not None for alpha in log["alphas"].values())
    assert len(qmodel.rewrites) == changed
    assert {r.name for r in qmodel.rewrites} == {"fold_norm_scale", "fold_value_scale", "divide_input"}
    assert {qmodel.formats[site].per for site in channels} == {"tensor"}
    assert not any(qmodel.quantizers[s].fitted for s in channels)
    qmodel.set_state("off")
    others = seeded_images(4, seed=5).double()
    expected = run(model, others)
    assert (run(qmodel, others) - expected).abs().max() <= 1e-10 * expected.abs().max()


def output_errors(qmodel: QuantModel, images: Tensor) -> dict[str, list[float]]:
    """Role -> squared error of the outputs of the linears behind it, on what the float model gives them.

    Balanced or not, the outputs are the same functions, so errors compare as they are.
    """
    found: dict[str, list[float]] = {}

    def look(site: Any, weight: Tensor, weight_quantizer: Any, quantizer: Any, x: Tensor) -> None:
        wrong = quantizer.quantized(x) @ weight_quantizer.quantized(weight).T - x @ weight.T
        found.setdefault(site.role, []).append(float(wrong.square().sum()))

    for linear in linears(qmodel):
        weight = qmodel.weight(linear.weight)
        assert weight is not None
        if linear.input.op == "linear":
            fixed = (linear.input, weight.data.clone(), qmodel.quantizers[linear.weight])
            qmodel.quantizers[linear.input].observer = partial(look, *fixed)
    qmodel.set_state("off")
    run(qmodel, images)
    return found


@each_model
def test_mechanism_balanced_channels_lower_the_error_of_every_kind_of_linear(name: str) -> None:
    """Behind the norms, the attention and the activation function; each compared with the same recipe without it."""
    images, model = seeded_images(8), outlying(name)
    quantized = partial(vitq.quantize, model, "uq_vit", "w4a4", images, freeze=False)
    plain, whole = (output_errors(quantized(options=o), images) for o in ({"norm_quant": False}, ALL))
    for role in (roles.QKV_IN, roles.FC1_IN, roles.PROJ_IN, roles.FC2_IN):
        assert sum(whole[role]) < 0.8 * sum(plain[role]), role


@pytest.mark.parametrize(
    ("options", "without"),
    [({"proj": False}, "fold_value_scale"), ({"fc2": False}, "divide_input"), ({}, "divide_input")],
)
def test_each_part_can_be_left_out(options: dict[str, bool], without: str) -> None:
    images = seeded_images(2)
    options = ALL | options if options else {}
    qmodel = vitq.quantize(outlying("seeded_vit"), "uq_vit", "w4a4", images, options=options)
    made = {rewrite.name for rewrite in qmodel.rewrites}
    assert without not in made
    assert "fold_norm_scale" in made


def test_the_mechanisms_can_be_switched_off() -> None:
    plain = resolve_recipe("uq_vit", Bits(4, 4), {"demax": False, "norm_quant": False})
    assert [spec.name for spec in plain.passes] == ["fit"]
    assert {rule.format.kind for rule in plain.formats if rule.format} == {"uniform"}
    assert {rule.format.per for rule in plain.formats if rule.format and rule.roles != (roles.WEIGHT,)} == {"tensor"}


@pytest.mark.parametrize("bits", ["w4a16", "w16a4"])
def test_one_side_in_float(bits: str) -> None:
    images = seeded_images(2)
    qmodel = vitq.quantize(outlying("seeded_vit"), "uq_vit", bits, images, options=ALL)
    alphas = qmodel.log["balance_channels"]["alphas"]
    assert bool(alphas) == (bits == "w16a4")
    assert all(alpha in (None, 0.0) for alpha in alphas.values())
    assert bool(run(qmodel, images).isfinite().all())


def test_without_images_activations_are_refused_and_weights_are_not() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(2)
    qmodel = insert(copy.deepcopy(model), trace(model, images[:1]), resolve("uq_vit", "w4a4"))
    with pytest.raises(DataError, match="balancing"):
        BalanceChannels().check(qmodel, None)
    assert vitq.quantize(model, "uq_vit", "w4a16", example=images[:1]).frozen


def test_micro_batches_do_not_change_the_choice() -> None:
    images, model = seeded_images(32), outlying("seeded_vit")
    logs = []
    for data in (images, list(images.split(8)), list(images.split(5))):
        qmodel = fitted(model, images)
        BalanceChannels(rows=64).run(qmodel, Batches.of(data), Silent())
        logs.append(qmodel.log["balance_channels"])
    assert logs[0] == logs[1] == logs[2]


def test_excluded_inputs_stay_float_and_a_wider_key_gets_one_scale_as_well() -> None:
    images, model = seeded_images(2), outlying("seeded_vit")
    excluded = vitq.quantize(model, "uq_vit", "w4a4", images, exclude=("role=QKV_IN", "blocks.0.attn.proj"))
    assert not any("qkv" in r.args.get("norm", "") + str(r.args.get("weights")) for r in excluded.rewrites)
    assert len(excluded.log["balance_channels"]["alphas"]) == 5
    wider = vitq.quantize(model, "uq_vit", "w4a4", images, overrides=("blocks.1.attn.qkv:w8a8",))
    assert wider.formats["blocks.1.attn.qkv:linear0.input"].bits == 8
    assert wider.log["balance_channels"]["kept"] == 0


class Gated(nn.Module):
    """Attention whose output is gated: no ratio can be moved into the values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.gate, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(input=y * self.gate(x).sigmoid())  # type: ignore[no-any-return]


def test_what_nothing_can_take_up_gets_one_scale_and_is_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 5, 8)
    qmodel = vitq.quantize(model, "uq_vit", "w4a4", x)
    behind = [s.id for s in qmodel.sites(roles.PROJ_IN)]
    if behind:  # whether a gated output is one of an attention is for the trace to say
        assert qmodel.log["balance_channels"]["kept"] == len(behind)
    assert all(fmt.per != "channel" or qmodel.weight(site) is not None for site, fmt in qmodel.formats.items())
    assert bool(run(qmodel, x).isfinite().all())


@pytest.mark.parametrize("bad", [{"rows": 0}, {"rows": -3}, {"flow": "sideways"}])
def test_arguments_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(CompositionError, match="balance_channels"):
        PassSpec.of("balance_channels", **bad).build()


# -- division at run time ------------------------------------------------------------------------------------


def test_a_division_is_undone_by_the_weight_however_the_linear_is_called() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)
    expected, ratio = run(model, x), torch.rand(6) * 4 + 0.5
    rewrite = DivideInputRewrite({"module": "0"}, {"ratio": ratio})
    rewrite.prepare(model)
    rewrite.apply(model)
    linear = model[0]
    for out in (linear(x), linear(input=x)):
        torch.testing.assert_close(out, expected)
    assert rewrite.extra_bits() == 32 * 6
    assert f"0.{CHILD}.ratio" not in model.state_dict()


def test_what_a_division_costs_is_counted() -> None:
    images, model = seeded_images(4), outlying("seeded_vit")
    off, on = (vitq.quantize(model, "uq_vit", "w4a4", images, options={"fc2": fc2}) for fc2 in (False, True))
    divided = [r for r in on.rewrites if r.name == "divide_input"]
    assert divided
    fc2 = on.sites(roles.FC2_IN)[0]
    assert on.log["balance_channels"]["extra_multiplications"] == len(divided) * fc2.shape[1] * fc2.shape[2]
    assert off.log["balance_channels"]["extra_multiplications"] == 0
    assert on.effective_bits()["model"] > off.effective_bits()["model"]


# -- what must survive ---------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("bits", ["w4a4", "w3a3"])
def test_an_artifact_a_copy_a_pickle_and_float_weights_compute_the_same(name: str, bits: str, tmp_path: Path) -> None:
    images, model = seeded_images(4), outlying(name, dead=True)
    qmodel = vitq.quantize(model, "uq_vit", bits, images, options=ALL)
    expected = run(qmodel, images)
    vitq.save(qmodel, tmp_path / "out")
    made = {
        "loaded": vitq.load(tmp_path / "out", model=copy.deepcopy(model)),
        "copied": copy.deepcopy(qmodel),
        "pickled": pickle.loads(pickle.dumps(qmodel)),
    }
    for what, other in made.items():
        assert torch.equal(run(other, images), expected), what
    soft = vitq.quantize(model, "uq_vit", bits, images, options=ALL, freeze=False).freeze(bake=False)
    assert torch.equal(run(soft, images), expected)
    kept = vitq.load(tmp_path / "out", float_model=copy.deepcopy(model))
    torch.testing.assert_close(run(kept, images), expected, rtol=1e-3, atol=1e-3)
    kept.set_state("off")
    wanted = run(model, images)
    assert (run(kept, images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_balanced_model_is_exported_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_AVAILABLE", False)  # products of codes agree to float precision only
    images = seeded_images(4)
    qmodel = vitq.quantize(outlying("seeded_vit"), "uq_vit", "w4a4", images, options=ALL).requires_grad_(False)
    expected = run(qmodel, images)
    assert torch.equal(run(torch.export.export(qmodel, (images,)).module(), images), expected)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(qmodel, fullgraph=True, backend="eager"), images), expected)
