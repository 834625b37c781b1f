"""The trace contract of design.md 7, on small random configurations of every family that vitq promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm import create_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import SwinTransformer as TorchvisionSwin
from torchvision.models import VisionTransformer as TorchvisionViT

from vitq.core import roles
from vitq.core.errors import TraceError
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.site import REASONS, Graph
from vitq.graph.trace import trace
from vitq.pipeline import quantize

transformers = pytest.importorskip("transformers")

ATTENTION = {roles.QUERY: 1, roles.KEY: 1, roles.SOFTMAX_OUT: 1, roles.VALUE: 1, roles.PROJ_IN: 1}
MLP = {roles.FC1_IN: 1, roles.FC2_IN: 1}
BLOCK = Counter({**ATTENTION, **MLP, roles.QKV_IN: 1, roles.WEIGHT: 4})
BLOCK_QKV_APART = Counter({**ATTENTION, **MLP, roles.QKV_IN: 3, roles.WEIGHT: 6})
ENDS = Counter({roles.PATCH_IN: 1, roles.HEAD_IN: 1, roles.WEIGHT: 2})
MERGE = Counter({roles.MERGE_IN: 1, roles.WEIGHT: 1})


@dataclass(frozen=True)
class Family:
    """A model family and what its trace must say."""

    name: str
    make: Callable[[], nn.Module]
    block: Counter[str] = field(default_factory=lambda: BLOCK)
    blocks: int = 2
    outside: Counter[str] = field(default_factory=lambda: ENDS)
    pairs: dict[str, int] = field(default_factory=dict)  # role of the linears -> how many norms feed such
    decomposed: bool = False  # attention runs taken apart even with quantizers off
    size: int = 32

    def __str__(self) -> str:
        return self.name


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
HF_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "num_labels": 10,
}  # fmt: skip


def _hf_vit(attention: str) -> Callable[[], nn.Module]:
    return lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**HF_VIT, attn_implementation=attention)
    )


def _hf_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )
    return transformers.SwinForImageClassification(config)


VIT_PAIRS = {roles.QKV_IN: 2, roles.FC1_IN: 2, roles.HEAD_IN: 1}
SWIN_PAIRS = {roles.QKV_IN: 4, roles.FC1_IN: 4, roles.MERGE_IN: 1}
FAMILIES = [
    Family("timm_vit", lambda: VisionTransformer(**VIT), pairs=VIT_PAIRS),
    Family("timm_deit", lambda: create_model("deit_tiny_patch16_224", **VIT), pairs=VIT_PAIRS),
    Family(
        "timm_deit_distilled",
        lambda: VisionTransformerDistilled(**VIT),
        outside=ENDS + Counter({roles.HEAD_IN: 1, roles.WEIGHT: 1}),
        pairs=VIT_PAIRS,
    ),
    Family(
        "timm_swin",
        lambda: SwinTransformer(
            img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10
        ),
        blocks=4,
        outside=ENDS + MERGE,
        pairs=SWIN_PAIRS,
    ),
    Family("hf_vit_sdpa", _hf_vit("sdpa"), block=BLOCK_QKV_APART, pairs=VIT_PAIRS),
    Family("hf_vit_eager", _hf_vit("eager"), block=BLOCK_QKV_APART, pairs=VIT_PAIRS),
    Family("hf_swin", _hf_swin, block=BLOCK_QKV_APART, blocks=4, outside=ENDS + MERGE, pairs=SWIN_PAIRS),
    Family(
        "torchvision_vit",
        lambda: TorchvisionViT(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        ),
        pairs=VIT_PAIRS,
        decomposed=True,
    ),
    Family(
        "torchvision_swin",
        lambda: TorchvisionSwin(
            patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
        ),
        blocks=4,
        outside=ENDS + MERGE,
        pairs=SWIN_PAIRS,
    ),
]


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: create_model(name, pretrained=False, num_classes=10, **kwargs)


def _hf(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**kwargs))


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HF_BASE = {k: v for k, v in HF_VIT.items() if k != "num_labels"}
# Families that pass the numeric part of the contract; their exact roles are not pinned.
FURTHER = [
    Family("swinv2", _timm(
        "swinv2_tiny_window8_256", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        window_size=4,
    ), blocks=4),
    Family("dinov2", _timm("vit_small_patch14_dinov2", img_size=28, **SMALL), size=28),
    Family("dinov3", _timm("vit_small_patch16_dinov3", img_size=32, **SMALL | {"embed_dim": 64})),
    Family("eva02", _timm(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=3), size=28),
    Family("beit", _timm("beit_base_patch16_224", img_size=32, **SMALL)),
    Family("cait", _timm("cait_xxs24_224", img_size=32, **SMALL)),  # talking heads are not taken for attention yet
    Family("xcit", _timm("xcit_nano_12_p16_224", img_size=32, **SMALL), blocks=4),
    Family("tnt", _timm(
        "tnt_s_legacy_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=2, num_heads_outer=2), blocks=4),
    Family("levit", _timm(
        "levit_128s", img_size=64, embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 2, 2)), blocks=3, size=64),
    Family("hiera", _timm(
        "hiera_tiny_224", img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)), blocks=4, size=64),
    Family("siglip", _timm("vit_base_patch16_siglip_224", img_size=32, **SMALL)),
    Family("segformer", _hf(
        "SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1], num_encoder_blocks=2,
        hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16,
    )),
    Family("clip", _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **HF_BASE, projection_dim=16)),
    Family("hf_siglip", _hf("SiglipVisionModel", "SiglipVisionConfig", **HF_BASE), decomposed=True),
    Family("yolos", _hf(
        "YolosForObjectDetection", "YolosConfig", **HF_BASE | {"image_size": [32, 32]}, num_detection_tokens=4)),
    Family("detr", _hf(
        "DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]),
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
    ), blocks=0),  # one layer each: nothing repeats
    Family("transformer_encoder", lambda: nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), _Tokens(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2, enable_nested_tensor=False)
    )), decomposed=True),
]  # fmt: skip


class _Tokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2))


def recipe(bits: int) -> Recipe:
    """Every activation per tensor, weights per channel."""
    rules = (Rule(Format("uniform", bits)), Rule(Format("uniform", bits, "channel"), (roles.WEIGHT,)))
    return Recipe(f"plain{bits}", "none", rules, (PassSpec.of("fit"),))


@dataclass
class Case:
    family: Family
    model: nn.Module
    images: Tensor
    graph: Graph
    float_out: list[Tensor]
    _models: dict[int, QuantModel] = field(default_factory=dict)

    def quantized(self, bits: int) -> QuantModel:
        if bits not in self._models:
            self._models[bits] = quantize(self.model, recipe(bits), "w4a4", self.images, freeze=False)
        self._models[bits].set_state("on")
        return self._models[bits]


_CASES: dict[str, Case] = {}


def _case(family: Family) -> Case:
    if family.name not in _CASES:
        torch.manual_seed(0)
        model = family.make().eval().requires_grad_(False)
        for p in model.parameters():  # fresh weights are too small for attention to do anything
            if p.ndim < 2 or (p.numel() and float(p.std()) < 0.05):
                p.add_(torch.randn_like(p) * 0.1)
        images = torch.randn(2, 3, family.size, family.size)
        _CASES[family.name] = Case(family, model, images, trace(model, images), _run(model, images))
    return _CASES[family.name]


@pytest.fixture(params=FAMILIES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(params=[*FAMILIES, *FURTHER], ids=str)
def any_case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


def _run(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(images)
    tree = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _sqnr(exact: Tensor, other: Tensor) -> float:
    noise = (exact - other).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(exact.double().square().sum() / noise))


# -- what is found ---------------------------------------------------------------------------------------


def test_every_block_has_the_roles_of_attention_and_mlp(case: Case) -> None:
    assert len(case.graph.blocks) == case.family.blocks
    for block in case.graph.blocks:
        found = Counter(s.role for s in case.graph.sites.values() if s.block == block)
        assert found == case.family.block, block


def test_outside_of_blocks_are_patches_merging_and_head(case: Case) -> None:
    assert Counter(s.role for s in case.graph.sites.values() if s.block is None) == case.family.outside


def test_axes_say_what_each_dimension_is(case: Case) -> None:
    attention = {
        roles.QUERY: {("batch", "head", "token", "channel")},
        roles.KEY: {("batch", "head", "token", "channel"), ("batch", "head", "channel", "token")},
        roles.VALUE: {("batch", "head", "token", "channel")},
        roles.SOFTMAX_OUT: {("batch", "head", "token", "token")},
        roles.PATCH_IN: {("batch", "channel", "token", "token")},
        roles.HEAD_IN: {("batch", "channel")},
    }
    for site in case.graph.sites.values():
        assert len(site.axes) == len(site.shape)
        if site.role == roles.WEIGHT:
            assert site.axes[:2] == ("channel", "in")
            assert site.param is not None
        elif site.role in attention:
            assert site.axes in attention[site.role], site.id
        else:
            assert site.axes[-1] == "channel"
            assert set(site.axes) <= {"batch", "token", "channel"}


def test_the_axes_of_keys_put_channels_where_they_are(case: Case) -> None:
    channels = {
        (site.owner, site.role): site.shape[site.axes.index("channel")]
        for site in case.graph.with_roles(roles.QUERY, roles.KEY, roles.VALUE)
    }
    for owner in {owner for owner, _ in channels}:
        assert channels[owner, roles.QUERY] == channels[owner, roles.KEY] == channels[owner, roles.VALUE]


def test_the_second_linear_knows_its_activation_function(case: Case) -> None:
    assert {s.producer for s in case.graph.with_roles(roles.FC2_IN)} == {"gelu"}


def test_norms_are_paired_with_all_linears_they_feed(case: Case) -> None:
    found = Counter(case.graph.sites[p.inputs[0]].role for p in case.graph.pairs)
    assert dict(found) == case.family.pairs
    apart = case.family.block[roles.QKV_IN]
    for pair in case.graph.pairs:
        role = case.graph.sites[pair.inputs[0]].role
        linears = {roles.QKV_IN: apart, roles.HEAD_IN: case.family.outside[roles.HEAD_IN]}.get(role, 1)
        assert len(pair.inputs) == len(pair.weights) == len(pair.biases) == linears
        channels = case.model.get_parameter(f"{pair.norm}.weight").shape[0]
        for input_site, weight_site in zip(pair.inputs, pair.weights, strict=True):
            site, weight = case.graph.sites[input_site], case.graph.sites[weight_site]
            assert site.norm == pair.norm
            assert site.shape[site.axes.index("channel")] == weight.shape[1] == channels
    merging = [p for p in case.graph.pairs if case.graph.sites[p.inputs[0]].role == roles.MERGE_IN]
    assert all(p.biases == (None,) for p in merging)


def test_biases_of_pairs_are_those_of_their_linears(case: Case) -> None:
    for pair in case.graph.pairs:
        for weight, bias in zip(pair.weights, pair.biases, strict=True):
            name = case.graph.sites[weight].param
            assert name is not None
            owner = name.rpartition(".")[0]
            assert bias is None or (bias.rpartition(".")[0] == owner and bias.endswith("bias"))


# -- nothing is missed -----------------------------------------------------------------------------------


def test_at_least_99_percent_of_the_macs_are_quantized(any_case: Case) -> None:
    reached = sum(c.macs for c in any_case.graph.calls if c.sites)
    constant = sum(c.macs for c in any_case.graph.calls if c.reason == "constant")
    # What does not depend on the input folds into a constant before any deployment.
    assert reached >= 0.99 * (any_case.graph.macs - constant)
    if any_case.family in FAMILIES:
        assert reached == any_case.graph.macs


def test_macs_equal_an_independent_count(any_case: Case) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            any_case.model(any_case.images)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    images = any_case.images.shape[0]
    assert any_case.graph.example_images == images
    # Each call's count is whole per image; constant ones are made once for all images.
    assert any_case.graph.macs == pytest.approx(counter.get_total_flops() / 2 / images, abs=len(any_case.graph.calls))


def test_what_is_left_float_has_a_reason(any_case: Case) -> None:
    for call in any_case.graph.calls:
        assert bool(call.sites) == (call.reason is None)
        assert call.reason is None or call.reason in REASONS
        assert len(call.sites) == len(call.operands)


def test_further_families_have_their_blocks(any_case: Case) -> None:
    assert len(any_case.graph.blocks) == any_case.family.blocks


# -- nothing is disturbed --------------------------------------------------------------------------------


def test_switched_off_quantizers_leave_the_output_as_it_was(any_case: Case) -> None:
    qmodel = any_case.quantized(16)
    qmodel.set_state("off")
    for exact, out in zip(any_case.float_out, _run(qmodel, any_case.images), strict=True):
        if any_case.family.decomposed:
            torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(out, exact)


def test_sixteen_bits_everywhere_give_60_db(any_case: Case) -> None:
    out = _run(any_case.quantized(16), any_case.images)
    assert min(map(_sqnr, any_case.float_out, out)) > 60


def test_sixteen_bits_hold_on_other_images_and_batch_sizes(case: Case) -> None:
    images = case.images.flip(0)[[0, 1, 0]]
    exact = _run(case.model, images)
    assert min(map(_sqnr, exact, _run(case.quantized(16), images))) > 60


def test_the_scale_of_every_site_matters(case: Case) -> None:
    qmodel = case.quantized(8)
    before = _run(qmodel, case.images)
    for site in qmodel.sites():
        scale = qmodel.quantizers[site].get_buffer("scale")  # type: ignore[attr-defined]
        kept = scale.clone()
        scale.mul_(1.5)
        after = _run(qmodel, case.images)
        scale.copy_(kept)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), site.id
    assert all(torch.equal(a, b) for a, b in zip(before, _run(qmodel, case.images), strict=True))


# -- identity --------------------------------------------------------------------------------------------


def test_sites_and_fingerprint_survive_retracing(case: Case) -> None:
    one = trace(case.model, case.images[:1])
    again = case.family.make().eval()
    again.load_state_dict(case.model.state_dict())
    other = trace(again, case.images.repeat(2, 1, 1, 1))
    assert list(one.sites) == list(case.graph.sites) == list(other.sites)
    assert one.fingerprint() == case.graph.fingerprint() == other.fingerprint()
    assert one.macs == case.graph.macs == other.macs
    assert one.pairs == case.graph.pairs
    assert one.blocks == case.graph.blocks


def test_tracing_what_is_quantized_already_is_refused(case: Case) -> None:
    with pytest.raises(TraceError, match="quantized already"):
        trace(case.quantized(16).model, case.images[:1])
