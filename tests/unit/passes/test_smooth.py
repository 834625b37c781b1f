"""Smoothing channels: the same function, differences moved from activations into weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.passes.reparam.smooth import SmoothChannels
from vitq.pipeline import insert, resolve

each_model = pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
PARTS = [("norms",), ("values",), ("scores",), ("norms", "values", "scores")]


def smoothed(model: nn.Module, images: Tensor, *parts: str, alpha: float = 0.5) -> QuantModel:
    qmodel = insert(copy.deepcopy(model), trace(model, images[:1]), resolve("minmax", "w4a4"))
    options = {part: part in parts for part in ("norms", "values", "scores")}
    SmoothChannels(alpha, **options).run(qmodel, Batches.of(images), Silent())
    return qmodel


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def tap(model: nn.Module, modules: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its input and output."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found.__setitem__(name, (args[0], out))
        )
        for name in modules
    ]
    run(model, images)
    for handle in handles:
        handle.remove()
    return found


def largest(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).abs().amax(0)


@each_model
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_output_is_that_of_before(name: str, parts: tuple[str, ...], alpha: float) -> None:
    model, images = build_zoo(name).double(), seeded_images(4).double()
    expected = run(model, images)
    qmodel = smoothed(model, images, *parts, alpha=alpha)
    assert (run(qmodel, images) - expected).abs().max() <= 1e-12 * expected.abs().max()
    single = smoothed(build_zoo(name), images.float(), *parts, alpha=alpha)
    assert (run(single, images.float()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    blocks = 3 if name == "seeded_vit" else 4
    norms = 7 if name == "seeded_vit" else 9
    counts = {"norms": norms, "values": blocks, "scores": blocks}
    log = qmodel.log["smooth_channels"]
    assert {part: log[part] for part in counts} == {part: counts[part] * (part in parts) for part in counts}
    assert log["undone"] == 0


def geometric(ratio: Tensor) -> Tensor:
    return ratio / ratio.log().mean().exp()


@pytest.mark.parametrize(
    ("part", "name"), [("norms", "attn.qkv"), ("norms", "mlp.fc1"), ("values", "attn.proj"), ("scores", "attn.qkv")]
)
def test_the_factors_are_those_of_the_formula(part: str, name: str) -> None:
    """s = max|X|^a / max|W|^(1 - a), up to one factor; width 64, 4 heads of 16."""
    model, images, alpha = build_zoo("seeded_vit").double(), seeded_images(40).double(), 0.6
    name = f"blocks.1.{name}"
    x, out = tap(model, [name], images)[name]
    w = model.get_parameter(f"{name}.weight").detach()
    got_x, got_out = tap(smoothed(model, images, part, alpha=alpha).model, [name], images)[name]
    close = {"rtol": 1e-5, "atol": 1e-8}  # factors are kept as float32
    if part == "scores":
        q, k, _ = out.reshape(-1, 3, 64).unbind(1)
        ratio = geometric(largest(q) ** alpha / largest(k) ** (1 - alpha))
        got_q, got_k, _ = got_out.reshape(-1, 3, 64).unbind(1)
        torch.testing.assert_close(got_q, q / ratio, **close)
        torch.testing.assert_close(got_k, k * ratio, **close)
    else:
        ratio = geometric(largest(x) ** alpha / w.abs().amax(0) ** (1 - alpha))
        torch.testing.assert_close(got_x, x / ratio, **close)
        torch.testing.assert_close(got_out, out, **close)


def test_all_micro_batches_count() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(40)
    images[35] *= 5
    whole, parts = (smoothed(model, data, "norms", "values", "scores") for data in (images, images.flip(0)))
    few = smoothed(model, images[:32], "norms", "values", "scores")
    norm = [each.model.get_parameter("blocks.0.norm1.weight").detach() for each in (whole, parts, few)]
    assert torch.equal(norm[0], norm[1])
    assert not torch.allclose(norm[0], norm[2], rtol=1e-3)


@pytest.mark.parametrize(("alpha", "even"), [(0.0, "weight"), (1.0, "input")])
def test_at_the_ends_one_side_is_made_even(alpha: float, even: str) -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(8)
    qmodel = smoothed(model, images, "norms", "values", alpha=alpha)
    for name in ("blocks.0.mlp.fc1", "blocks.0.attn.proj"):
        x = largest(tap(qmodel.model, [name], images)[name][0])
        w = qmodel.model.get_submodule(name).weight.detach().abs().amax(0)  # type: ignore[union-attr]
        same, other = (w, x) if even == "weight" else (x, w)
        torch.testing.assert_close(same, same.mean().expand_as(same), rtol=1e-4, atol=0)
        assert other.max() > 2 * other.min()


def test_channels_that_are_zero_keep_their_scale() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(8)
    norm, linear = model.get_submodule("blocks.0.norm1"), model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    norm.weight.data[3] = norm.bias.data[3] = 0.0  # no activation
    linear.weight.data[:, 7] = 0.0  # no weight
    for row in range(128, 192, 16):
        linear.weight.data[row] = linear.bias.data[row] = 0.0  # no value
    expected = run(model, images)
    qmodel = smoothed(model, images, "norms", "values", "scores")
    assert (run(qmodel, images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(bool(p.isfinite().all()) for p in qmodel.model.parameters())
    gamma = qmodel.model.get_parameter("blocks.0.norm1.weight")
    torch.testing.assert_close(gamma[7], norm.weight[7], rtol=1e-6, atol=0)
    taken = [each.get_parameter("blocks.0.attn.proj.weight")[:, ::16] for each in (model, qmodel.model)]
    assert torch.equal(*taken)


def outlier_vit() -> nn.Module:
    """The seeded ViT with an outlier channel behind each norm, and in each value."""
    model = build_zoo("seeded_vit")
    for block in range(3):
        for norm in ("norm1", "norm2"):
            model.get_parameter(f"blocks.{block}.{norm}.weight").data[5] *= 8
        model.get_parameter(f"blocks.{block}.attn.qkv.weight").data[128::16] *= 8
    return model


@pytest.mark.parametrize(
    ("parts", "sites"),
    [(("norms",), ("attn.qkv", "mlp.fc1")), (("values",), ("attn.proj",))],
    ids=["norms", "values"],
)
def test_with_one_scale_for_all_channels_products_are_closer_to_the_float_ones(
    parts: tuple[str, ...], sites: tuple[str, ...]
) -> None:
    model, images = outlier_vit(), seeded_images(16)
    names = [f"blocks.{block}.{site}" for block in range(3) for site in sites]
    qmodel = smoothed(model, images, *parts)
    exact, helped = tap(model, names, images), tap(qmodel.model, names, images)
    for name in names:
        errors = [
            (product(x, each.get_submodule(name)) - exact[name][1]).square().mean()
            for x, each in ((exact[name][0], model), (helped[name][0], qmodel.model))
        ]
        assert errors[1] < 0.7 * errors[0], name


def product(x: Tensor, linear: nn.Module) -> Tensor:
    """What a linear gives with 4 bits: one range for the input, one for each row of the weight."""
    assert isinstance(linear, nn.Linear)
    w = linear.weight.detach()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    weight = ((w - low) / (high - low) * 15).round() / 15 * (high - low) + low
    rounded = ((x - x.min()) / (x.max() - x.min()) * 15).round() / 15 * (x.max() - x.min()) + x.min()
    return rounded @ weight.T + linear.bias.detach()


@each_model
def test_the_rewrites_replayed_on_float_weights_give_the_same_model(
    name: str, assert_replays: Callable[[nn.Module, QuantModel], None]
) -> None:
    model, images = build_zoo(name), seeded_images(2)
    assert_replays(model, smoothed(model, images, "norms", "values", "scores"))


def test_sites_that_are_left_in_float_are_watched_all_the_same() -> None:
    images = seeded_images(4)
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax+smoothquant", "w4a16", images)
    assert qmodel.log["smooth_channels"]["norms"] == 7


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_alpha_that_is_no_share_is_refused(alpha: float) -> None:
    with pytest.raises(CompositionError, match=r"alpha .* must be in"):
        SmoothChannels(alpha)


def test_nothing_switched_on_is_refused() -> None:
    with pytest.raises(CompositionError, match="nothing to smooth"):
        SmoothChannels(norms=False, values=False, scores=False)


def test_a_model_without_anything_to_smooth_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    with pytest.raises(CompositionError, match="nothing of this model can be smoothed"):
        vitq.quantize(model, "minmax+smoothquant", "w8a8", torch.randn(4, 5, 6))
