"""Models that are not as usual: tied weights, no biases, no affine norms, odd sizes, images of other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitq
from vitq.core.errors import DataError, VitqError
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import WEIGHT
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

CALIB, UNSEEN = seeded_images(8), seeded_images(4, seed=1)
TOKENS = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))
RECIPES = ("minmax", "percentile", "repq_vit")


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    assert isinstance(found, Tensor)
    assert bool(found.isfinite().all())
    return found


def reloaded(qmodel: vitq.QuantModel, folder: Path, fresh: nn.Module, x: Tensor) -> vitq.QuantModel:
    """The model from an artifact, which must compute the same."""
    vitq.save(qmodel, folder)
    again = vitq.load(folder, model=fresh)
    assert torch.equal(run(again, x), run(qmodel, x))
    return again


def small_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(2)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
    return VisionTransformer(**(sizes | options)).eval()  # type: ignore[arg-type]


# -- tied weights --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two linears with one weight and biases of their own; the bias of one is that of a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.a, self.b, self.c = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.c.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(self.norm(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", RECIPES)
def test_tied_weights_stay_tied_and_are_quantized_and_saved_once(recipe: str, tmp_path: Path) -> None:
    qmodel = vitq.quantize(Tied().eval(), recipe, "w4a4", TOKENS)
    again = reloaded(qmodel, tmp_path / "o", Tied(), TOKENS)
    for found in (qmodel, again):
        assert found.model.get_parameter("b.weight") is found.model.get_parameter("a.weight")
        assert found.model.get_parameter("c.bias") is found.model.get_parameter("a.bias")
        assert sorted(str(s.param) for s in found.sites(WEIGHT)) == ["a.weight", "c.weight"]
    with safe_open(tmp_path / "o" / "model.safetensors", framework="pt") as file:
        assert len([name for name in file.keys() if name.startswith("codes/")]) == 2  # noqa: SIM118 - not a mapping
    assert qmodel.model.get_parameter("a.weight").unique(dim=1).numel() <= 6 * 16
    for row in qmodel.model.get_parameter("a.weight"):
        assert row.unique().numel() <= 16


# -- no biases, norms without weight or bias -----------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_linears_without_biases(recipe: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = small_vit(qkv_bias=False)
        for block in model.blocks:
            block.attn.proj = nn.Linear(48, 48, bias=False)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(48, 192, bias=False), nn.Linear(192, 48, bias=False)
        model.head = nn.Linear(48, 10, bias=False)
        return model.eval()

    model = build()
    qmodel = vitq.quantize(model, recipe, "w8a8", CALIB)
    reloaded(qmodel, tmp_path / "o", build(), UNSEEN)
    error = (run(qmodel, UNSEEN) - run(model, UNSEEN)).norm() / run(model, UNSEEN).norm()
    assert error < 0.2
    if recipe == "repq_vit":
        assert qmodel.log["fold_norm_scale"]["norms"] == 4, "a fold gives the linear the bias that it needs"
        assert "no_norm_to_fold_into" not in qmodel.log


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=["no bias", "no affine"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_norms_that_cannot_take_up_a_scale_are_left_alone_and_named(
    recipe: str, options: dict[str, bool], tmp_path: Path
) -> None:
    def norm(channels: int, eps: float = 1e-6, **_: object) -> nn.LayerNorm:
        return nn.LayerNorm(channels, eps=eps, **options)  # type: ignore[arg-type]

    model = small_vit(norm_layer=norm)
    qmodel = vitq.quantize(model, recipe, "w8a8", CALIB)
    reloaded(qmodel, tmp_path / "o", small_vit(norm_layer=norm), UNSEEN)
    error = (run(qmodel, UNSEEN) - run(model, UNSEEN)).norm() / run(model, UNSEEN).norm()
    assert error < 0.2
    assert not qmodel.rewrites
    if recipe == "repq_vit":
        named = qmodel.log["no_norm_to_fold_into"]
        assert named == [f"blocks.{i}.{owner}:linear0.input" for i in range(2) for owner in ("attn.qkv", "mlp.fc1")]
        assert {qmodel.formats[site].per for site in named} == {"tensor"}
        assert json.loads((tmp_path / "o" / "config.json").read_text())["log"]["no_norm_to_fold_into"] == named


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
def test_a_batch_of_one_is_a_row_of_a_larger_one(name: str, recipe: str) -> None:
    qmodel = vitq.quantize(build_zoo(name), recipe, "w8a8", CALIB)
    together = run(qmodel, UNSEEN)
    alone = torch.cat([run(qmodel, image[None]) for image in UNSEEN])
    assert alone.shape == together.shape
    assert (alone - together).norm() < 0.2 * together.norm()  # kernels of other sizes may move values between codes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
def test_one_calibration_image_is_enough(name: str, recipe: str, tmp_path: Path) -> None:
    for data in (CALIB[:1], [CALIB[:1]]):
        qmodel = vitq.quantize(build_zoo(name), recipe, "w4a4", data)
        assert all(q.fitted for q in qmodel.quantizers.values())
        run(qmodel, UNSEEN)
    reloaded(qmodel, tmp_path / "o", build_zoo(name), UNSEEN)


def test_a_model_of_odd_sizes(tmp_path: Path) -> None:
    """Images that are not square, three heads of five channels, seven classes, one token at the end."""

    def build() -> nn.Module:
        return small_vit(img_size=(24, 40), embed_dim=15, num_heads=3, mlp_ratio=1.8, num_classes=7, depth=1)

    x = torch.randn(5, 3, 24, 40)
    for recipe in RECIPES:
        qmodel = vitq.quantize(build(), recipe, "w3a4", x)
        reloaded(qmodel, tmp_path / recipe, build(), x[:1])


SIZES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (lambda: small_vit(dynamic_img_size=True), (16, 32, 40, 64)),
    "swin": (
        lambda: SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4),
                                num_classes=10, strict_img_size=False).eval(),
        (16, 32, 48, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("recipe", RECIPES)
def test_images_of_other_sizes_than_calibrated(name: str, recipe: str, tmp_path: Path) -> None:
    build, sizes = SIZES[name]
    torch.manual_seed(2)
    model = build()
    qmodel = vitq.quantize(model, recipe, "w8a8", CALIB)
    again = reloaded(qmodel, tmp_path / "o", build(), UNSEEN)
    for size in sizes:
        images = seeded_images(3, size=size, seed=4)
        expected = run(model, images)
        found = run(qmodel, images)
        assert found.shape == expected.shape
        # Images of other sizes have other values than were calibrated on; they run, and are not promised to be close.
        assert torch.isfinite(found).all()
        assert size != 32 or (found - expected).norm() < 0.3 * expected.norm(), size
        assert torch.equal(run(again, images), found)


def per_token(weight_bits: int, act_bits: int) -> Recipe:
    token = tuple(Rule(Format("uniform", act_bits, "token"), roles=(r,)) for r in ("QKV_IN", "FC1_IN"))
    return Recipe(
        "per_token", "none", (Rule(Format("uniform", 8)), *token), (PassSpec.of("fit", method="minmax"),), "a test's"
    )


def test_scales_per_token_refuse_another_number_of_tokens() -> None:
    """Found by this test: a message of torch about sizes of tensors, or one scale shared by what has none."""
    model = small_vit(dynamic_img_size=True)
    qmodel = vitq.quantize(model, per_token, "w8a8", CALIB)
    run(qmodel, UNSEEN)
    for size in (16, 64):
        with pytest.raises(VitqError, match=r"blocks\.0\.attn\.qkv:linear0\.input: scales for \(17,\).* calibrated on"):
            qmodel(seeded_images(2, size=size))
    with pytest.raises(DataError, match=r"blocks\.0\.attn\.qkv:linear0\.input.*scales for \(17,\)"):
        vitq.quantize(model, per_token, "w8a8", [CALIB, seeded_images(2, size=64)])


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout((-2,), (5,), 2), (2, 1, 8)),  # would be broadcast to five tokens
        (Layout((-2,), (1,), 2), (2, 5, 8)),  # would share one scale among five tokens
        (Layout((-2,), (5,), 2), (2, 7, 8)),
        (Layout((-2,), (5,), 2), (8,)),
        (Layout((-2,), (2,), 2, 4), (3, 12)),  # groups of four channels
        (Layout((-2,), (2,), 2, 4), (3, 9)),
    ],
)
def test_a_tensor_that_scales_were_not_made_for_is_refused_by_every_use(layout: Layout, shape: tuple[int, ...]) -> None:
    quantizer = UniformQuantizer(4, layout)
    ones = torch.ones(layout.groups)
    quantizer.set_params({"scale": ones, "zero_point": 0 * ones})
    quantizer.state = "on"
    x = torch.ones(shape)
    for use in (quantizer, quantizer.encode, quantizer.decode, layout.by_group):
        with pytest.raises(DataError, match=r"do not fit a tensor of shape .*; give inputs of the size"):
            use(x)
