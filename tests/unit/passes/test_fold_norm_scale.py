"""Folding channel scales into a LayerNorm: the same function, the same codes, one scale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.format import Bits, Format
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule, resolve_recipe
from vitq.core.roles import HEAD_IN
from vitq.core.site import NormLinear
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.passes.fit import Fit
from vitq.passes.reparam.norm_scale import FoldNormScale, FoldNormScaleRewrite
from vitq.pipeline import insert, quantize, resolve
from vitq.quantizers.uniform import UniformQuantizer

IMAGES = 6
each_model = pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])


def folded(qmodel: QuantModel) -> list[NormLinear]:
    """The pairs whose inputs repq_vit gives channel scales: all but the head's."""
    return [pair for pair in qmodel.graph.pairs if qmodel.graph.sites[pair.inputs[0]].role != HEAD_IN]


def killed(name: str, channels: tuple[int, ...] = (3, 7)) -> nn.Module:
    """A zoo model some of whose channels are constant after every folded LayerNorm, not at zero."""
    model = build_zoo(name)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            for place, channel in enumerate(channels):
                module.weight.data[channel] = 0.0
                module.bias.data[channel] = (2.5, -0.7)[place % 2]
    return model


def fitted(model: nn.Module, bits: str = "w4a4", overrides: tuple[str, ...] = (), parity: bool = False) -> QuantModel:
    """Quantized as repq_vit does, up to the fold."""
    images = seeded_images(IMAGES)
    plan = resolve("repq_vit", bits, overrides=overrides, options={"parity": parity})
    qmodel = insert(copy.deepcopy(model), trace(model, images[:1]), plan)
    Fit("percentile_mse", "percentile_mse", flow="parallel", exact=True).run(qmodel, Batches.of(images), Silent())
    return qmodel


def fold(qmodel: QuantModel, aggregate: str = "mean", parity: bool = False) -> None:
    FoldNormScale(aggregate, parity).run(qmodel, None, Silent())


def float_output(qmodel: QuantModel, images: Tensor) -> Tensor:
    qmodel.set_state("off")
    with torch.no_grad():
        return qmodel(images)  # type: ignore[no-any-return]


def uniform(qmodel: QuantModel, site: str) -> UniformQuantizer:
    quantizer = qmodel.quantizers[site]
    assert isinstance(quantizer, UniformQuantizer)
    return quantizer


def norm_outputs(qmodel: QuantModel, images: Tensor) -> dict[str, Tensor]:
    """What arrives at the folded sites of the float model."""
    found: dict[str, Tensor] = {}
    for pair in folded(qmodel):
        for site in pair.inputs:
            uniform(qmodel, site).observer = lambda quantizer, x, site=site: found.__setitem__(site, x.clone())
    float_output(qmodel, images)
    for pair in folded(qmodel):
        for site in pair.inputs:
            uniform(qmodel, site).observer = None
    return found


@each_model
@pytest.mark.parametrize("aggregate", ["mean", "median"])
@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_folding_keeps_the_float_output(name: str, aggregate: str, parity: bool, dead: bool) -> None:
    model = killed(name) if dead else build_zoo(name)
    images = seeded_images(8, seed=5)
    with torch.no_grad():
        expected = model(images)
    qmodel = fitted(model)
    assert len(folded(qmodel)) == (6 if name == "seeded_vit" else 9)
    fold(qmodel, aggregate, parity)
    assert len(qmodel.rewrites) == len(folded(qmodel))
    got = float_output(qmodel, images)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_model
@pytest.mark.parametrize("aggregate", ["mean", "median"])
@pytest.mark.parametrize("dead", [False, True])
def test_folding_changes_no_code(name: str, aggregate: str, dead: bool) -> None:
    qmodel = fitted(killed(name) if dead else build_zoo(name))
    images = seeded_images(8, seed=5)
    values = norm_outputs(qmodel, images)
    before = {site: uniform(qmodel, site).encode(x) for site, x in values.items()}
    zeros = {site: uniform(qmodel, site).zero_point.flatten().clone() for site in values}
    fold(qmodel, aggregate)
    after = {site: uniform(qmodel, site).encode(x) for site, x in norm_outputs(qmodel, images).items()}
    for site in values:
        old, new = before[site], after[site]
        if dead:  # their share has moved into the bias
            live = torch.ones(old.shape[-1], dtype=torch.bool)
            live.view(-1, live.numel() // 4 if "reduction" in site else live.numel())[:, [3, 7]] = False
            old, new = old[..., live], new[..., live]
        # Rounding in float32 can push a value that lies on a boundary over it; nothing else may differ.
        assert float((old == new).float().mean()) > 0.999, site
        assert float((old - new).abs().max()) <= 1, site
        assert uniform(qmodel, site).layout.groups == 1
        assert float(uniform(qmodel, site).zero_point) == float(uniform(qmodel, site).zero_point.round())
        assert zeros[site].numel() > 1


@each_model
def test_the_formulas_are_those_of_the_paper(name: str) -> None:
    """gamma' = gamma / r1, beta' = (beta + s r2) / r1, W' = W r1, b' = b - W (s r2); r1 = s / s~, r2 = z - z~."""
    qmodel = fitted(build_zoo(name), parity=True)
    pair = folded(qmodel)[-1]
    norm = qmodel.model.get_submodule(pair.norm)
    linear = qmodel.model.get_submodule(pair.weights[0].split(":")[0])
    gamma, beta, weight = (t.detach().double().clone() for t in (norm.weight, norm.bias, linear.weight))  # type: ignore[union-attr]
    bias = linear.bias.detach().double().clone() if linear.bias is not None else torch.zeros(weight.shape[0]).double()  # type: ignore[union-attr]
    quantizer = uniform(qmodel, pair.inputs[0])
    s, z = quantizer.scale.double().flatten().clone(), quantizer.zero_point.double().flatten().clone()
    fold(qmodel, parity=True)
    one_s, one_z = quantizer.scale.double(), quantizer.zero_point.double()
    torch.testing.assert_close(one_s, s.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(one_z, z.mean(), rtol=1e-5, atol=1e-6)
    r1, r2 = s / one_s, z - one_z
    close = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(norm.weight.double(), gamma / r1, **close)  # type: ignore[union-attr]
    torch.testing.assert_close(norm.bias.double(), (beta + s * r2) / r1, **close)  # type: ignore[union-attr]
    torch.testing.assert_close(linear.weight.double(), weight * r1, **close)  # type: ignore[union-attr]
    torch.testing.assert_close(linear.bias.double(), bias - weight @ (s * r2), **close)  # type: ignore[union-attr]


def test_a_reduction_without_bias_gets_one_to_take_up_the_shift() -> None:
    qmodel = fitted(build_zoo("seeded_swin"))
    merging = [pair for pair in folded(qmodel) if None in pair.biases]
    assert [pair.norm for pair in merging] == ["layers.1.downsample.norm"]
    linear = qmodel.model.get_submodule("layers.1.downsample.reduction")
    assert linear.bias is None
    fold(qmodel)
    assert isinstance(linear.bias, nn.Parameter)
    assert bool((linear.bias != 0).any())


@each_model
def test_dead_channels_do_not_change_the_layers_scale(name: str) -> None:
    qmodel = fitted(killed(name))
    site = folded(qmodel)[0].inputs[0]
    scale, zero = uniform(qmodel, site).scale.flatten().clone(), uniform(qmodel, site).zero_point.flatten().clone()
    live = torch.ones_like(scale, dtype=torch.bool)
    live[[3, 7]] = False
    fold(qmodel)
    assert torch.equal(uniform(qmodel, site).scale, scale[live].mean())
    assert float(uniform(qmodel, site).zero_point) == float(zero[live].mean().round().clamp(0, 15))
    parity = fitted(killed(name), parity=True)
    fold(parity, parity=True)
    assert torch.equal(uniform(parity, site).scale, scale.mean())
    assert torch.equal(uniform(parity, site).zero_point, zero.mean())
    # … in which a dead channel has the neutral step, not 0 / 0.
    torch.testing.assert_close(scale[3], torch.tensor(2.5 / 15))
    torch.testing.assert_close(scale[7], torch.tensor(0.7 / 15))


def test_a_dead_channel_becomes_zero_and_its_share_moves_into_the_bias() -> None:
    qmodel = fitted(killed("seeded_vit"))
    fold(qmodel)
    norm = qmodel.model.get_submodule("blocks.0.norm1")
    linear = qmodel.model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    assert norm.weight[[3, 7]].tolist() == norm.bias[[3, 7]].tolist() == [0.0, 0.0]
    assert not linear.weight[:, [3, 7]].any()


def test_a_norm_whose_channels_are_all_dead_is_survived() -> None:
    model = build_zoo("seeded_vit")
    norm = model.get_submodule("blocks.1.norm2")
    assert isinstance(norm, nn.LayerNorm)
    norm.weight.data.zero_()
    images = seeded_images(IMAGES)
    qmodel = quantize(model, "repq_vit", "w8a8", images)
    with torch.no_grad():
        expected, got = model(images), qmodel(images)
    assert bool(got.isfinite().all())
    assert (got - expected).square().mean() < 0.05 * expected.square().mean()


def test_dead_channels_cost_no_accuracy_in_the_layer() -> None:
    """The mean over channels with the neutral step of a large constant would coarsen every channel."""
    model = build_zoo("seeded_vit")
    norm = model.get_submodule("blocks.0.norm1")
    assert isinstance(norm, nn.LayerNorm)
    norm.weight.data[::2] = 0
    norm.bias.data[::2] = 100.0
    errors = {}
    for parity in (False, True):
        qmodel = fitted(model, parity=parity)
        fold(qmodel, parity=parity)
        site = folded(qmodel)[0].inputs[0]
        x = norm_outputs(qmodel, seeded_images(4, seed=9))[site]
        weight = qmodel.weight(folded(qmodel)[0].weights[0])
        assert weight is not None
        noise = uniform(qmodel, site).decode(uniform(qmodel, site).encode(x)) - x
        errors[parity] = float((noise @ weight.detach().T).square().mean())
    assert errors[False] < 0.5 * errors[True]


def test_weights_are_fitted_again_and_everything_else_is_kept() -> None:
    qmodel = fitted(build_zoo("seeded_vit"))
    before = {site: q.state_dict() for site, q in ((s, uniform(qmodel, s)) for s in qmodel.quantizers if "fc2" in s)}
    before = copy.deepcopy(before)
    fold(qmodel)
    unfitted = {site for pair in folded(qmodel) for site in pair.weights}
    assert {site for site in qmodel.quantizers if not qmodel.quantizers[site].fitted} == unfitted
    assert all(torch.equal(before[s][k], uniform(qmodel, s).state_dict()[k]) for s in before for k in before[s])
    assert qmodel.log["fold_norm_scale"] == {"norms": 6}
    formats = {qmodel.formats[site].per for pair in folded(qmodel) for site in pair.inputs}
    assert formats == {"tensor"}


class SplitBlock(nn.Module):
    """Query, key and value from linears of their own, behind one norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        return x + (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class SplitModel(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(SplitBlock(width), SplitBlock(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("wide", ["query", "value", "key"])
def test_linears_of_different_widths_behind_one_norm_each_get_a_scale_of_their_own(wide: str) -> None:
    """Found by this test: all of them got the scale of the first, which clipped 4-bit sites to a sixteenth."""
    model, x = SplitModel().eval(), torch.randn(8, 6, 8)
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for gamma in gammas:
        gamma.data.mul_(torch.linspace(0.2, 4, gamma.numel()))
    qmodel = quantize(model, "repq_vit", "w8a4", x, overrides=[f"blocks.*.{wide}:a8"])
    seen: dict[str, Tensor] = {}
    inputs = [site for pair in folded(qmodel) for site in pair.inputs]
    assert len(inputs) == 6
    for site in inputs:
        uniform(qmodel, site).observer = lambda quantizer, x, site=site: seen.__setitem__(site, x.clone())
    with torch.no_grad():
        qmodel(x)
    for site in inputs:
        uniform(qmodel, site).observer = None
        noise = (uniform(qmodel, site)(seen[site]) - seen[site]).square().mean() / seen[site].square().mean()
        assert noise < (1e-3 if f".{wide}:" in site else 0.05), site


def test_folding_a_format_that_is_not_uniform_is_refused() -> None:
    qmodel = fitted(build_zoo("seeded_vit"))
    site = folded(qmodel)[0].inputs[0]
    base = resolve_recipe("repq_vit", Bits(4, 4))
    rules = (*base.formats, Rule(Format("log2", 4, "channel"), after_norm=True))
    made = Recipe("r", "none", rules, (PassSpec.of("fit"), PassSpec.of("fold_norm_scale"), PassSpec.of("fit")))
    with pytest.raises(CompositionError, match=r"only uniform channel scales.*Log2Quantizer"):
        quantize(build_zoo("seeded_vit"), made, data=seeded_images(2))
    assert uniform(qmodel, site).layout.groups == 64


def test_an_unknown_aggregate_is_refused() -> None:
    with pytest.raises(CompositionError, match="mean or median"):
        FoldNormScale("mode")


@each_model
def test_the_rewrite_replayed_on_float_weights_gives_the_same_model(name: str) -> None:
    model = build_zoo(name)
    qmodel = fitted(model)
    fold(qmodel)
    again = copy.deepcopy(model)
    for rewrite in qmodel.rewrites:
        replayed = FoldNormScaleRewrite(rewrite.args, rewrite.tensors)
        replayed.prepare(again)
        replayed.apply(again)
    wanted = dict(qmodel.model.named_parameters())
    assert list(wanted) == [n for n, _ in again.named_parameters()]
    assert all(torch.equal(p, wanted[n]) for n, p in again.named_parameters())
