"""Rotating streams and heads: the same function to the last digits, other channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitq
from vitq.core import roles
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.format import Bits, Format
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule, resolve_recipe
from vitq.core.rewrite import REWRITES
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.passes.reparam import tensors
from vitq.passes.reparam.heads import RotateHeads
from vitq.passes.reparam.orthogonal import mean_keeping, random_flat
from vitq.passes.reparam.rotate import Rotate, RotateStream
from vitq.pipeline import insert, resolve
from vitq.recipes.minmax import minmax

each_model = pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
PARTS = [("streams",), ("scores",), ("values",), ("streams", "scores", "values")]


def inserted(model: nn.Module, images: Tensor, seed: int = 0) -> QuantModel:
    """A copy with quantizers that are not fitted."""
    return insert(copy.deepcopy(model), trace(model, images[:1]), resolve("minmax", "w4a4", seed=seed))


def rotated(model: nn.Module, images: Tensor, *parts: str, seed: int = 0) -> QuantModel:
    qmodel = inserted(model, images, seed)
    options = {part: part in parts for part in ("streams", "scores", "values")}
    Rotate(**options).run(qmodel, Batches.of(images), Silent())
    return qmodel


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def seen(qmodel: QuantModel, sites: list[str], images: Tensor) -> dict[str, Tensor]:
    """What arrives at sites of the float model."""
    found: dict[str, Tensor] = {}
    for site in sites:
        qmodel.quantizers[site].observer = lambda quantizer, x, site=site: found.__setitem__(site, x.clone())
    run(qmodel, images)
    for site in sites:
        qmodel.quantizers[site].observer = None
    return found


@each_model
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_the_output_is_that_of_before(name: str, parts: tuple[str, ...]) -> None:
    model, images = build_zoo(name).double(), seeded_images(4).double()
    expected = run(model, images)
    qmodel = rotated(model, images, *parts)
    assert (run(qmodel, images) - expected).abs().max() <= 1e-12 * expected.abs().max()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, qmodel.model.get_parameter(n))]
    assert moved
    single = rotated(build_zoo(name), images.float(), *parts)
    assert (run(single, images.float()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("seeded_vit", {"streams": 1, "scores": 3, "values": 3}),
        ("seeded_swin", {"streams": 1, "scores": 4, "values": 4}),
    ],
)
def test_the_log_says_what_was_rotated_and_what_was_left(name: str, counts: dict[str, int]) -> None:
    log = rotated(build_zoo(name), seeded_images(2), "streams", "scores", "values").log["rotate"]
    assert log["rotated"] == counts
    assert not any(log["undone"].values())
    first_stage = {"has a norm whose output is added to something": 1, "has the output of a norm added to it": 5}
    assert log["left"] == ({} if name == "seeded_vit" else {"norms": first_stage})


def oracle_vit(model: nn.Module, seeds: list[int]) -> dict[str, Tensor]:
    """Parameters of the rotated seeded_vit (width 64, 4 heads of 16), written from the formulas, float64."""
    p = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    for block in range(3):
        pre = f"blocks.{block}"
        for which, seed in ((0, seeds[block]), (1, seeds[block]), (2, seeds[3 + block])):
            for head, matrix in enumerate(random_flat(16, seed, 4)):
                rows = slice(64 * which + 16 * head, 64 * which + 16 * head + 16)
                p[f"{pre}.attn.qkv.weight"][rows] = matrix.T @ p[f"{pre}.attn.qkv.weight"][rows]
                p[f"{pre}.attn.qkv.bias"][rows] = matrix.T @ p[f"{pre}.attn.qkv.bias"][rows]
                if which == 2:
                    columns = slice(16 * head, 16 * head + 16)
                    p[f"{pre}.attn.proj.weight"][:, columns] = p[f"{pre}.attn.proj.weight"][:, columns] @ matrix
    r = mean_keeping(random_flat(64, seeds[6])[0])
    pairs = [(f"blocks.{b}.norm{n}", f"blocks.{b}.{linear}") for b in range(3) for n, linear in
             ((1, "attn.qkv"), (2, "mlp.fc1"))]  # fmt: skip
    for norm, linear in [*pairs, ("norm", "head")]:
        gamma, beta, w = p[f"{norm}.weight"], p[f"{norm}.bias"], p[f"{linear}.weight"]
        p[f"{linear}.bias"] = p[f"{linear}.bias"] + w @ beta
        p[f"{linear}.weight"] = w @ torch.diag(gamma) @ r
        p[f"{norm}.weight"], p[f"{norm}.bias"] = torch.ones_like(gamma), torch.zeros_like(beta)
    for block in range(3):
        for linear in ("attn.proj", "mlp.fc2"):
            name = f"blocks.{block}.{linear}"
            p[f"{name}.weight"], p[f"{name}.bias"] = r.T @ p[f"{name}.weight"], p[f"{name}.bias"] @ r
    p["patch_embed.proj.weight"] = torch.einsum("oe,oijk->eijk", r, p["patch_embed.proj.weight"])
    p["patch_embed.proj.bias"] = p["patch_embed.proj.bias"] @ r
    p["pos_embed"], p["cls_token"] = p["pos_embed"] @ r, p["cls_token"] @ r
    return p


def test_the_weights_are_those_of_the_formulas() -> None:
    model = build_zoo("seeded_vit").double()
    qmodel = rotated(model, seeded_images(2).double(), "streams", "scores", "values")
    heads = [rewrite.args["seed"] for rewrite in qmodel.rewrites]
    for name, expected in oracle_vit(model, heads).items():
        torch.testing.assert_close(qmodel.model.get_parameter(name).data, expected, rtol=1e-10, atol=1e-12)


def test_norms_behind_merged_tokens_commute_with_one_matrix_for_each_token() -> None:
    model, images = build_zoo("seeded_swin").double(), seeded_images(2).double()
    qmodel = rotated(model, images, "streams")
    (rewrite,) = qmodel.rewrites
    assert isinstance(rewrite, RotateStream)
    assert rewrite.args["width"] == 64
    # The second stage is rotated: what its first norm gives is that of before, without its scale and shift, times R.
    norms: list[Tensor] = []
    for each in (model, qmodel.model):
        norm = each.get_submodule("layers.1.blocks.0.norm1")
        handle = norm.register_forward_hook(lambda module, args, out: norms.append(out))
        run(each, images)
        handle.remove()
    norm = model.get_submodule("layers.1.blocks.0.norm1")
    plain = (norms[0] - norm.bias) / norm.weight
    matrix = mean_keeping(random_flat(64, rewrite.args["seed"])[0])
    torch.testing.assert_close(norms[1], plain @ matrix, rtol=1e-8, atol=1e-8)


def largest_ratio(x: Tensor) -> float:
    """The largest channel beside the median one."""
    ranges = x.reshape(-1, x.shape[-1]).abs().amax(0)
    return float(ranges.max() / ranges.median())


def kurtosis(x: Tensor) -> float:
    x = x.flatten().double() - x.double().mean()
    return float(x.pow(4).mean() / x.square().mean().square())


def test_no_channel_stands_out_any_more_behind_the_norms() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(16)
    sites = [pair.inputs[0] for pair in inserted(model, images).graph.pairs]
    before = seen(inserted(model, images), sites, images)
    after = seen(rotated(model, images, "streams"), sites, images)
    assert len(sites) == 7
    for site in sites:
        assert largest_ratio(after[site]) < 0.6 * largest_ratio(before[site]), site
        assert kurtosis(after[site]) < kurtosis(before[site]), site


def outlier_vit() -> nn.Module:
    """The seeded ViT with a channel of the stream, and of each head's queries and values, that stands out."""
    model = build_zoo("seeded_vit")
    for block in range(3):
        rows = model.get_parameter(f"blocks.{block}.attn.qkv.weight").data
        rows[5:64:16] *= 8
        rows[135:192:16] *= 8
        for norm in ("norm1", "norm2"):
            model.get_parameter(f"blocks.{block}.{norm}.weight").data[3] *= 8
    return model


def rounded(x: Tensor, dim: int | None = None) -> Tensor:
    """With 4 bits, from minimum to maximum, one range in all or one for each row."""
    low, high = (x.min(), x.max()) if dim is None else (x.amin(dim, keepdim=True), x.amax(dim, keepdim=True))
    return ((x - low) / (high - low) * 15).round() / 15 * (high - low) + low


def product_errors(model: nn.Module, part: str, images: Tensor) -> list[float]:
    """Errors of products of 4-bit operands, in parts of the product, at the places that a part is about."""
    found = []
    for block in range(3):
        for name in {"streams": ("attn.qkv", "mlp.fc1"), "scores": ("attn.qkv",), "values": ("attn.proj",)}[part]:
            linear = model.get_submodule(f"blocks.{block}.{name}")
            assert isinstance(linear, nn.Linear)
            seen: list[Tensor] = []
            handle = linear.register_forward_hook(lambda module, args, out, seen=seen: seen.extend((args[0], out)))
            run(model, images)
            handle.remove()
            left, right = seen[0], linear.weight.detach()
            if part == "scores":
                left, right = seen[1].reshape(*seen[1].shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)[:2]
            exact = left @ right.transpose(-2, -1)
            got = rounded(left) @ rounded(right, None if part == "scores" else 1).transpose(-2, -1)
            found.append(float((got - exact).square().sum() / exact.square().sum()))
    return found


@pytest.mark.parametrize("part", ["streams", "scores", "values"])
def test_with_one_scale_for_all_channels_products_are_closer_to_the_float_ones(part: str) -> None:
    model, images = outlier_vit(), seeded_images(16)
    before = product_errors(model, part, images)
    after = product_errors(rotated(model, images, part).model, part, images)
    assert all(b < 0.7 * a for a, b in zip(before, after, strict=True)), (before, after)


@each_model
def test_the_seed_decides(name: str) -> None:
    model, images = build_zoo(name), seeded_images(2)
    states = [rotated(model, images, "streams", "values", seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if "|" not in key)
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0] if "|" not in key)


def test_what_is_switched_off_does_not_change_the_matrices_of_others() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(2)
    every = rotated(model, images, "streams", "scores", "values").rewrites
    alone = rotated(model, images, "streams").rewrites
    assert alone[0].args["seed"] == every[-1].args["seed"]


@each_model
def test_rotated_twice_it_is_still_the_same_model(name: str) -> None:
    model, images = build_zoo(name).double(), seeded_images(2).double()
    expected = run(model, images)
    qmodel = rotated(model, images, "streams", "scores", "values")
    Rotate().run(qmodel, Batches.of(images), Silent())
    assert (run(qmodel, images) - expected).abs().max() <= 1e-12 * expected.abs().max()


@each_model
def test_the_rewrites_replayed_on_float_weights_give_the_same_model(
    name: str, assert_replays: Callable[[nn.Module, QuantModel], None]
) -> None:
    model, images = build_zoo(name), seeded_images(2)
    assert_replays(model, rotated(model, images, "streams", "scores", "values"))


def test_channel_scales_can_still_be_folded_into_the_norms() -> None:
    images, others = seeded_images(8), seeded_images(64, seed=1)
    # Evenly spaced after softmax: a logarithm, as coarse with 8 bits as with 5, would make most of the error.
    evenly = Rule(Format("uniform", 8), (roles.SOFTMAX_OUT,))
    expected, noise = run(build_zoo("seeded_vit"), others), []
    for spec in ("repq_vit+rotation", "repq_vit"):
        made = resolve_recipe(spec, Bits(8, 8))
        recipe = Recipe("evenly", "none", (*made.formats, evenly), made.passes)
        qmodel = vitq.quantize(build_zoo("seeded_vit"), recipe, "w8a8", images, freeze=False)
        assert qmodel.log["fold_norm_scale"] == {"norms": 6}
        norm = qmodel.model.get_submodule("blocks.1.norm1")
        assert isinstance(norm, nn.LayerNorm)
        assert norm.weight.std() > 0
        noise.append((run(qmodel, others) - expected).square().mean())
        qmodel.set_state("off")
        assert (run(qmodel, others) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert noise[0] < 0.9 * noise[1]


def test_formats_that_choose_as_they_go_do_not_count_as_fitted() -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "uq_vit+rotation", "w8a8", seeded_images(4))
    assert qmodel.log["rotate"]["rotated"] == {"streams": 1, "scores": 3, "values": 3}


class Tricky(nn.Module):
    """Behind the norm half of the channels are those of the next token, moved where nothing can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=-1)
        return self.head(self.norm(torch.cat([left, right.roll(1, 1)], dim=-1)))  # type: ignore[no-any-return]


def test_what_changes_the_output_is_taken_back() -> None:
    """Channels of two tokens make one: which ones lie side by side is seen, of which token they are is not."""
    model, x = Tricky().eval(), torch.randn(4, 5, 6)
    qmodel = inserted(model, x)
    # The labels are in order, so it is tried: chunks are moved whole, and each token's mix is another one's.
    with pytest.raises(CompositionError, match="1 matrices would have changed its output"):
        Rotate().run(qmodel, Batches.of(x), Silent())
    assert qmodel.rewrites == []
    assert all(torch.equal(p, qmodel.model.get_parameter(n)) for n, p in model.named_parameters())


def test_a_bias_that_was_made_for_a_rewrite_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_zoo("seeded_swin")
    qmodel = inserted(model, seeded_images(2))
    monkeypatch.setattr(tensors, "_close", lambda a, b, tolerance: False)
    with pytest.raises(CompositionError):
        Rotate().run(qmodel, Batches.of(seeded_images(2)), Silent())
    reduction = qmodel.model.get_submodule("layers.1.downsample.reduction")
    assert reduction.bias is None
    assert list(qmodel.model.state_dict()) == list(model.state_dict())


class WithoutAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))  # type: ignore[no-any-return]


def test_a_model_without_anything_to_rotate_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"nothing of this model can be rotated.*it has no norms"):
        vitq.quantize(WithoutAnything().eval(), "minmax+rotation", "w8a8", torch.randn(4, 5, 6))
    qmodel = vitq.quantize(WithoutAnything().eval(), "rotated_ste", "w8a8", torch.randn(4, 5, 6))
    assert not any(qmodel.log["rotate"]["rotated"].values())


def test_nothing_switched_on_is_refused() -> None:
    with pytest.raises(CompositionError, match="nothing to rotate"):
        Rotate(streams=False, scores=False, values=False)


def test_it_is_refused_behind_a_fit() -> None:
    made = minmax(8, 8)
    late = Recipe("late", "none", made.formats, (*made.passes, PassSpec.of("rotate"), *made.passes))
    with pytest.raises(CompositionError, match="'rotate' changes what scales are chosen from; put it before"):
        vitq.quantize(build_zoo("seeded_vit"), late, data=seeded_images(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_types_of_the_weights_stay(dtype: torch.dtype) -> None:
    model, images = build_zoo("seeded_vit").to(dtype), seeded_images(2).to(dtype)
    qmodel = rotated(model, images, "streams", "scores", "values")
    assert qmodel.log["rotate"]["rotated"] == {"streams": 1, "scores": 3, "values": 3}
    assert {p.dtype for p in qmodel.model.parameters()} == {dtype}


def test_gated_branches_are_rotated_with_their_gates_taken_up() -> None:
    """Layer scale (DINOv2) moves into the weight before it."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, init_values=0.1
    ).double().eval()  # fmt: skip
    model.blocks[0].ls1.gamma.data.uniform_(0, 2)
    images = seeded_images(2).double()
    qmodel = rotated(model, images, "streams")
    assert (qmodel.model.get_parameter("blocks.0.ls1.gamma") == 1).all()
    expected = run(model, images)
    assert (run(qmodel, images) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_all_rewrites_are_registered() -> None:
    qmodel = rotated(build_zoo("seeded_vit"), seeded_images(2), "streams", "scores", "values")
    assert {type(rewrite) for rewrite in qmodel.rewrites} == {RotateStream, RotateHeads}
    assert {rewrite.name for rewrite in qmodel.rewrites} <= set(REWRITES)
