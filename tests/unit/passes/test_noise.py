"""Noise in front of linears: the theorem of the paper, the inference form in float64, and what cannot take noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitq
from vitq.core.errors import CompositionError, DataError
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import FC2_IN, WEIGHT
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.noise import AddNoise, Judge, Rows, _groups, pick, step_of
from vitq.quantizers.base import Quantizer
from vitq.quantizers.log import LogSqrt2Quantizer
from vitq.quantizers.uniform import UniformQuantizer

each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])


def uniform(step: float, bits: int = 8) -> UniformQuantizer:
    quantizer = UniformQuantizer(bits, symmetric=True)
    quantizer.set_params({"scale": torch.tensor(step), "zero_point": torch.tensor(2.0 ** (bits - 1))})
    quantizer.state = "on"
    return quantizer


def choose(images: Tensor, model: nn.Module, recipe: str = "minmax+noisy", bits: str = "w4a4") -> QuantModel:
    return vitq.quantize(model, recipe, bits, images, freeze=False)


def give(qmodel: QuantModel) -> dict[str, Tensor]:
    """Noise of half a step for every linear that can take it, whatever was chosen."""
    for _, places in _groups(qmodel):
        first = places[0].quantizer(qmodel)
        noise = (torch.rand(places[0].input.shape[-1]) - 0.5) * step_of(first)
        for place in places:
            place.quantizer(qmodel).noise = noise.half().float()
    return noises(qmodel)


def noises(qmodel: QuantModel) -> dict[str, Tensor]:
    """Input site -> its noise, of a model that is not frozen."""
    return {site: q.noise for site, q in ((s, quantizer(qmodel, s)) for s in qmodel.quantizers) if q.noise is not None}


def quantizer(qmodel: QuantModel, site: str) -> Quantizer:
    found = qmodel.quantizers[site]
    assert isinstance(found, Quantizer)
    return found


@pytest.mark.parametrize(("x", "n"), [(0.0, 0.5), (0.1, 0.4), (0.3, 0.3), (0.3, 0.9), (0.45, 0.6), (0.9, 1.0)])
def test_theorem_1_gives_the_change_of_the_squared_error(x: float, n: float) -> None:
    """D(x, n) = n^2 / 3 - (b / n) (n - x)^2 for levels at +-b, noise in (-n, n), and x <= n <= 2b - x."""
    b = 1.0
    expected = n**2 / 3 - b / n * (n - x) ** 2
    noisy, draws = uniform(2 * b), 2_000_000
    value = torch.full((draws,), 4 * b + b + x)  # the middle between two levels is an odd multiple of b
    noisy.noise = n * (2 * torch.rand(draws, generator=torch.Generator().manual_seed(1)) - 1)
    change = (noisy(value) - value).double().square() - (b - x) ** 2
    assert float(change.mean()) == pytest.approx(expected, abs=5 * float(change.std()) / draws**0.5)
    assert (expected < 0) == (x < n - (n**3 / (3 * b)) ** 0.5)


class Small(nn.Module):
    """A LayerNorm with two linears behind it, one without bias, and a linear behind an activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = self.last(F.gelu(self.a(y)) * self.b(y))
        return out


def test_a_frozen_model_computes_the_inference_form() -> None:
    """float64, from the artifact's weights and scales: W Q(x + N) + B - W N."""
    model, x = Small().eval(), torch.randn(64, 7, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qmodel = choose(x, model)
    found = give(qmodel)
    assert set(found) == {"a:linear0.input", "b:linear0.input", "last:linear0.input"}
    assert torch.equal(found["a:linear0.input"], found["b:linear0.input"])  # one norm, one noise
    qmodel.freeze()
    assert [r.args for r in qmodel.rewrites] == [
        {"norm": "norm", "modules": ["a", "b"]},
        {"norm": None, "modules": ["last"]},
    ]

    def form(name: str, value: Tensor) -> Tensor:
        q, weight = quantizer(qmodel, f"{name}:linear0.input"), qmodel.model.get_parameter(f"{name}.weight").double()
        noise = found[f"{name}:linear0.input"].double()
        steps = ((value + noise) / q.scale.double()).round() + q.zero_point  # type: ignore[operator]
        levels = (steps.clamp(0, 2**q.bits - 1) - q.zero_point) * q.scale.double()  # type: ignore[operator]
        return (levels - noise) @ weight.T + before.get(f"{name}.bias", torch.zeros(len(weight))).double()

    y = F.layer_norm(x.double(), (16,), before["norm.weight"].double(), before["norm.bias"].double())
    expected = form("last", F.gelu(form("a", y)) * form("b", y))
    with torch.no_grad():
        got = qmodel(x)
    # A value on the border of two codes may fall on either side of it in float32.
    close = (got - expected).abs() < 1e-4
    assert float(close.double().mean()) > 0.99


@pytest.mark.parametrize("recipe", ["repq_vit+noisy", "repq_vit+gptq+noisy+qwt", "minmax+noisy+gptq+bias_correction"])
@each_model
def test_freezing_moves_the_noise_into_the_model(recipe: str, model: str) -> None:
    images = seeded_images(16)
    qmodel = choose(images, build_zoo(model), recipe)
    found = noises(qmodel)
    with torch.no_grad():
        expected = qmodel(images)
        got = qmodel.freeze()(images)
    # The two differ by float noise, which may flip codes of an image and so change what is behind them.
    same = (got - expected).abs().amax(1) < 1e-3
    assert int(same.sum()) >= 13
    assert noises(qmodel) == {}
    moved = [r for r in qmodel.rewrites if r.name == "add_noise"]
    assert sum(len(r.args["modules"]) for r in moved) == len(found) == qmodel.log["add_noise"]["with_noise"]
    for rewrite in moved:
        noise = rewrite.tensors["noise"].double()
        for number, module in enumerate(rewrite.args["modules"]):
            # The final codes, also where a later pass has chosen them.
            weight = qmodel.model.get_parameter(f"{module}.weight").double()
            torch.testing.assert_close(rewrite.tensors[str(number)].double(), -weight @ noise, rtol=1e-5, atol=1e-6)
            assert torch.equal(noise.float(), found[f"{module}:linear0.input"])


@each_model
def test_switched_off_before_freezing_it_is_the_float_model(model: str) -> None:
    images, float_model = seeded_images(8), build_zoo(model)
    qmodel = choose(images, float_model)
    qmodel.set_state("off")
    with torch.no_grad():
        assert torch.equal(qmodel(images), float_model(images))


@each_model
def test_a_product_sees_no_more_values_than_there_are_codes(model: str) -> None:
    images = seeded_images(8)
    qmodel = choose(images, build_zoo(model))
    sites = list(noises(qmodel))
    qmodel.freeze()
    counts: dict[str, int] = {}
    for site in sites:
        quantizer(qmodel, site).register_forward_hook(
            lambda q, args, out, site=site: counts.__setitem__(site, out.unique().numel())
        )
    with torch.no_grad():
        qmodel(images)
    assert set(counts) == set(sites) != set()
    assert all(count <= 2**4 for count in counts.values())


def test_the_error_that_is_judged_is_that_of_the_output() -> None:
    x, weight, noise = torch.randn(401, 8).pow(3), torch.randn(6, 8), torch.rand(8).half().float() / 4
    judge, noisy = Judge(uniform(0.5, 4), x, weight), uniform(0.5, 4)
    noisy.noise = noise
    wrong = ((noisy(x) - x) @ weight.T).double().square().sum(1)
    expected = torch.stack([wrong[:201].sum(), wrong[201:].sum()])
    torch.testing.assert_close(judge.errors(noise), expected, rtol=1e-4, atol=0)
    wide = Judge(uniform(0.5, 4), x, torch.cat([weight, weight]))  # more outputs than inputs
    torch.testing.assert_close(wide.errors(noise), 2 * expected, rtol=1e-4, atol=0)
    assert bool(judge.errors(1e7 * noise).isinf().all())  # more than 16 bits hold


def test_what_does_not_gain_on_the_other_half_of_the_rows_is_not_picked() -> None:
    none = torch.tensor([10.0, 10.0])
    assert pick([none, torch.tensor([9.0, 8.0]), torch.tensor([8.5, 9.5])]) == 1
    assert pick([none, torch.tensor([4.0, 12.0]), torch.tensor([13.0, 5.0])]) == 0
    assert pick([none, none]) == 0
    assert pick([torch.tensor([0.0, 10.0]), torch.tensor([0.0, 5.0])]) == 0  # one row: there is no other half


def test_values_on_the_levels_get_no_noise() -> None:
    """Nothing can be gained there, and noise would cost (theorem 1 at x = b)."""
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    x = torch.randint(0, 16, (32, 8)).float()
    x[0, 0], x[0, 1] = 0, 15
    qmodel = choose(x, model)
    assert noises(qmodel) == {}
    assert qmodel.log["add_noise"]["without"] == 1
    assert qmodel.freeze().rewrites == []


class Odd(nn.Module):
    """Linears that cannot take noise: a tied bias, a forward of its own, and a product inside a function."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.bias = self.one.bias
        self.doubled, self.plain = Odd.Doubled(16, 16), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        x = torch.relu(F.linear(torch.relu(self.doubled(x)), self.weight))
        out: Tensor = self.plain(x)
        return out


def test_what_cannot_take_noise_is_left_and_counted() -> None:
    x = torch.randn(64, 16)
    qmodel = choose(x, Odd().eval())
    assert set(give(qmodel)) == {"plain:linear0.input"}
    assert qmodel.log["add_noise"]["kept"] == 4
    with torch.no_grad():
        expected = qmodel(x)
        torch.testing.assert_close(qmodel.freeze()(x), expected)


class Twice(nn.Module):
    """One linear that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))
        return out


@pytest.mark.parametrize("count", [20, 40])
def test_a_linear_that_is_called_twice_has_one_noise(count: int) -> None:
    x = torch.randn(count, 5, 16)
    qmodel = choose(x, Twice().eval())
    assert "shared:linear0.input" in give(qmodel)
    with torch.no_grad():
        expected = qmodel(x)
        torch.testing.assert_close(qmodel.freeze()(x), expected, rtol=1e-4, atol=1e-5)


def test_linears_behind_a_norm_that_quantize_differently_have_noise_of_their_own() -> None:
    x = torch.randn(64, 7, 16)
    qmodel = vitq.quantize(Small().eval(), "minmax+noisy", "w4a4", x, overrides=["b:a3"], freeze=False)
    assert len(give(qmodel)) == len(qmodel.freeze().rewrites) == 3
    assert all(r.args["norm"] is None and len(r.args["modules"]) == 1 for r in qmodel.rewrites)
    assert qmodel.log["add_noise"]["norms"] == 0


def test_a_linear_left_float_keeps_its_norm_as_it_is() -> None:
    x, model = torch.randn(64, 7, 16), Small().eval()
    qmodel = vitq.quantize(model, "minmax+noisy", "w4a4", x, exclude=["b"], freeze=False)
    assert set(give(qmodel)) == {"a:linear0.input", "last:linear0.input"}
    qmodel.freeze()
    assert torch.equal(qmodel.model.get_parameter("norm.bias"), model.norm.bias)
    assert qmodel.model.get_submodule("b").bias is None


def test_weights_in_float_have_noise_in_front_of_them_too() -> None:
    images = seeded_images(8)
    qmodel = choose(images, build_zoo("seeded_vit"), bits="w16a4")
    assert give(qmodel)
    with torch.no_grad():
        expected = qmodel(images)
        torch.testing.assert_close(qmodel.freeze()(images), expected, rtol=1e-4, atol=1e-4)


def test_noise_is_counted_in_16_bits_where_no_norm_holds_it() -> None:
    x = torch.randn(64, 7, 16)
    plain, helped = (choose(x, Small().eval(), recipe) for recipe in ("minmax", "minmax+noisy"))
    give(helped)
    plain.freeze(), helped.freeze()
    parameters = [sum(p.numel() for p in q.model.parameters()) for q in (plain, helped)]
    bits = [q.effective_bits()["model"] * n for q, n in zip((plain, helped), parameters, strict=True)]
    assert parameters[1] - parameters[0] == 24  # the bias that b did not have
    assert bits[1] - bits[0] == pytest.approx(24 * 32 + 24 * 16, abs=0.1)


def test_a_scale_that_is_fitted_again_forgets_the_noise() -> None:
    q = uniform(0.5)
    q.noise = torch.ones(4)
    assert torch.equal(q.decode(q.encode(torch.zeros(4))), torch.zeros(4))
    q.set_params(q.params())
    assert q.noise is None
    q.noise = torch.ones(4)
    q.unfit()
    assert q.noise is None


def test_noise_follows_the_device_and_keeps_its_type() -> None:
    q = uniform(0.5)
    q.noise = torch.tensor([0.123456])
    q.to(torch.bfloat16)
    assert q.noise.dtype == torch.float32
    assert float(q.noise) == pytest.approx(0.123456)


@pytest.mark.parametrize("sizes", [(100,), (60, 40), (1,) * 100])
@pytest.mark.parametrize("wanted", [64, 5000])
def test_the_sample_of_rows_does_not_depend_on_the_micro_batches(sizes: tuple[int, ...], wanted: int) -> None:
    tokens = 17
    every = torch.arange(100 * tokens, dtype=torch.float32)[:, None]
    whole, parts = Rows(wanted, 100), Rows(wanted, 100)
    whole.add(every, 100)
    for rows, images in zip(every.split([size * tokens for size in sizes]), sizes, strict=True):
        parts.add(rows, images)
    found = parts.gathered()
    assert torch.equal(found, whole.gathered())
    assert len(found) == min(wanted, len(every)) == len(found.unique())
    assert len((found[:, 0].long() % tokens).unique()) == tokens  # no token is left out


def test_a_step_is_the_mean_distance_of_levels() -> None:
    assert float(step_of(uniform(0.25))) == pytest.approx(0.25)
    log = LogSqrt2Quantizer(4)
    log.set_params({"scale": torch.tensor(3.0)})
    assert float(step_of(log)) == pytest.approx(3.0 / 15)


def test_any_static_format_can_take_noise() -> None:
    """A logarithmic one, per channel."""
    rules = (Rule(Format("log2", 4, "channel")), Rule(Format("uniform", 8, "channel"), (WEIGHT,)))
    recipe = Recipe("logs", "none", rules, (PassSpec.of("fit"), PassSpec.of("add_noise")))
    x = torch.rand(64, 5, 16)
    qmodel = vitq.quantize(Twice().eval(), recipe, "w8a4", x, freeze=False)
    assert give(qmodel)
    with torch.no_grad():
        expected = qmodel(x)
        torch.testing.assert_close(qmodel.freeze()(x), expected, rtol=1e-4, atol=1e-5)


@each_model
def test_bias_correction_on_top_gives_the_means_of_the_float_model(model: str) -> None:
    images, float_model = seeded_images(32), build_zoo(model)
    names = [n for n, m in float_model.named_modules() if isinstance(m, nn.Linear)]
    wanted = output_means(float_model, names, images)
    off: dict[str, float] = {}
    for recipe in ("minmax+noisy", "minmax+noisy+bias_correction"):
        got = output_means(choose(images, float_model, recipe).model, names, images)
        off[recipe] = max(float((got[n] - wanted[n]).abs().max()) for n in names)
    assert off["minmax+noisy+bias_correction"] < 2e-3
    assert off["minmax+noisy"] > 0.05


def output_means(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Mean output of linears over images and tokens."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: found.__setitem__(name, out.flatten(0, -2).double().mean(0))
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_mechanism_noise_lowers_the_error_of_the_output_on_other_images() -> None:
    """Behind GELU, of the layer on the same inputs, with noise and without."""
    images, others = seeded_images(32), seeded_images(64)[32:]
    qmodel = choose(images, build_zoo("seeded_vit"), "repq_vit+noisy")
    found = noises(qmodel)
    errors = []
    for site in (s for s in qmodel.graph.with_roles(FC2_IN) if s.id in found):
        q, weight = quantizer(qmodel, site.id), qmodel.model.get_parameter(f"{site.owner}.weight")
        seen: list[Tensor] = []
        q.observer = lambda quantizer, x, seen=seen: seen.append(x)
        with torch.no_grad():
            qmodel(others)
            q.observer = None
            noisy = q(seen[0]) - seen[0]
            q.noise = None
            plain = q(seen[0]) - seen[0]
            q.noise = found[site.id]
            errors.append([float((e @ weight.T).square().sum()) for e in (noisy, plain)])
    assert errors
    assert sum(a for a, _ in errors) < sum(b for _, b in errors)


def test_there_is_no_noise_where_fewer_inputs_than_channels_were_seen() -> None:
    """A head that sees one token of each image: what is gained on these few is lost on others."""
    qmodel = choose(seeded_images(16), build_zoo("seeded_vit"), "repq_vit+noisy")
    assert "head:linear0.input" not in noises(qmodel)
    assert qmodel.log["add_noise"]["without"] >= 1


def test_it_refuses_to_add_noise_twice() -> None:
    with pytest.raises(CompositionError, match="adds noise twice"):
        vitq.quantize(build_zoo("seeded_vit"), "noisyquant+noisy", "w4a4", seeded_images(4))


def test_it_refuses_to_work_without_images() -> None:
    with pytest.raises(DataError, match="choosing noise needs calibration images"):
        vitq.quantize(build_zoo("seeded_vit"), "minmax+noisy", "w4a16", example=seeded_images(1))


@pytest.mark.parametrize("wrong", [{"largest": 0.0}, {"amplitudes": 0}, {"rows": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(CompositionError, match="largest must be above 0; amplitudes and rows at least 1"):
        AddNoise(**wrong)  # type: ignore[arg-type]
