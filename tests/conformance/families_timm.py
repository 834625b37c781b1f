"""Families of timm and torchvision, and a plain nn.TransformerEncoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from families import Family
from timm import create_model
from timm.models import maxxvit, mobilevit
from timm.models.byobnet import ByobNet, ByoModelCfg
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import SwinTransformer as TorchvisionSwin
from torchvision.models import VisionTransformer as TorchvisionViT

from vitq.core import roles

ATTENTION = {roles.QUERY: 1, roles.KEY: 1, roles.SOFTMAX_OUT: 1, roles.VALUE: 1, roles.PROJ_IN: 1}
MLP = {roles.FC1_IN: 1, roles.FC2_IN: 1}
BLOCK = Counter({**ATTENTION, **MLP, roles.QKV_IN: 1, roles.WEIGHT: 4})
BLOCK_QKV_APART = Counter({**ATTENTION, **MLP, roles.QKV_IN: 3, roles.WEIGHT: 6})
ENDS = Counter({roles.PATCH_IN: 1, roles.HEAD_IN: 1, roles.WEIGHT: 2})
MERGE = Counter({roles.MERGE_IN: 1, roles.WEIGHT: 1})
TALKING_BLOCK = BLOCK + Counter({roles.SCORES: 1, roles.SOFTMAX_MIX: 1, roles.WEIGHT: 2})
CONV_BLOCK = BLOCK + Counter({roles.CONV_IN: 1, roles.WEIGHT: 1})
XCIT_BLOCK = BLOCK + Counter({roles.CONV_IN: 2, roles.WEIGHT: 2})
WIDENING_BLOCK = BLOCK + Counter({roles.OTHER_IN: 1, roles.WEIGHT: 1})  # a linear on the residual
TNT_BLOCK = Counter(dict.fromkeys((*ATTENTION, *MLP), 2)) + MERGE + Counter({roles.QKV_IN: 4, roles.WEIGHT: 10})
FUSION_BLOCK = Counter({**ATTENTION, roles.QKV_IN: 3, roles.WEIGHT: 4})
# The activation function of LeViT's attention stands before its projection.
LEVIT_BLOCK = BLOCK + Counter({roles.FC2_IN: 1}) - Counter({roles.PROJ_IN: 1})
LEVIT_DOWN = LEVIT_BLOCK + LEVIT_BLOCK + Counter({roles.QKV_IN: 1, roles.WEIGHT: 1})
TWO_PAIRS = {roles.QKV_IN: 2, roles.FC1_IN: 2}
FOUR_PAIRS = {roles.QKV_IN: 4, roles.FC1_IN: 4, roles.HEAD_IN: 1}
# A bias put together at every call (zeros for the keys) cannot take up the shift that folding leaves.
NO_QKV_PAIRS = {roles.FC1_IN: 2, roles.HEAD_IN: 1}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
VIT_PAIRS = {roles.QKV_IN: 2, roles.FC1_IN: 2, roles.HEAD_IN: 1}
SWIN_PAIRS = {roles.QKV_IN: 4, roles.FC1_IN: 4, roles.MERGE_IN: 1}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: create_model(name, pretrained=False, **{"num_classes": 10, **kwargs})


class Tokens(nn.Module):
    """Channels last for what is inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Tokens(encoder))


def maxvit(name: str, window: int = 2, **changes: Any) -> Callable[[], nn.Module]:
    """A published MaxxViT configuration made small: two stages of one block each."""
    cfg = maxxvit.model_cfgs[name]
    small = replace(
        cfg, embed_dim=(16, 32), depths=(1, 1), block_type=cfg.block_type[-2:], stem_width=8,
        transformer_cfg=replace(cfg.transformer_cfg, dim_head=8, window_size=(window, window)), **changes
    )  # fmt: skip
    return lambda: maxxvit.MaxxVit(small, img_size=32, num_classes=10)


def _mobilevitv2() -> nn.Module:
    blocks = (
        mobilevit._inverted_residual_block(d=1, c=8, s=1, br=2.0),
        mobilevit._mobilevitv2_block(d=1, c=16, s=2, transformer_depth=2),
    )
    return ByobNet(
        ByoModelCfg(blocks=blocks, stem_chs=8, stem_type="3x3", stem_pool="", num_features=0), num_classes=10
    )


def _efficientformerv2() -> nn.Module:
    return EfficientFormerV2(
        depths=(1, 1, 2, 2), embed_dims=(8, 8, 16, 32), img_size=64, mlp_ratios=2, num_vit=1,
        num_classes=10, distillation=False,
    )  # fmt: skip


PINNED = [
    Family("timm_vit", lambda: VisionTransformer(**VIT), BLOCK, 2, ENDS, VIT_PAIRS),
    Family("timm_deit", timm_model("deit_tiny_patch16_224", **VIT), BLOCK, 2, ENDS, VIT_PAIRS),
    Family(
        "timm_deit_distilled", lambda: VisionTransformerDistilled(**VIT), BLOCK, 2,
        ENDS + Counter({roles.HEAD_IN: 1, roles.WEIGHT: 1}), VIT_PAIRS,
    ),
    Family(
        "timm_swin",
        lambda: SwinTransformer(
            img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10
        ),
        BLOCK, 4, ENDS + MERGE, SWIN_PAIRS,
    ),
    Family(
        "torchvision_vit",
        lambda: TorchvisionViT(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        ),
        BLOCK, 2, ENDS, VIT_PAIRS, decomposed=True,
    ),
    Family(
        "torchvision_swin",
        lambda: TorchvisionSwin(
            patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
        ),
        BLOCK, 4, ENDS + MERGE, SWIN_PAIRS,
    ),
]  # fmt: skip

FURTHER = [
    Family("swinv2", timm_model(
        "swinv2_tiny_window8_256", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        window_size=4), BLOCK, 4, ENDS + MERGE, {}),  # its norms stand behind the linears
    Family("dinov2", timm_model(
        "vit_small_patch14_dinov2", img_size=28, **SMALL), BLOCK, 2, ENDS, VIT_PAIRS, size=28),
    Family("dinov3", timm_model(
        "vit_small_patch16_dinov3", img_size=32, **SMALL | {"embed_dim": 64}), BLOCK, 2, ENDS, TWO_PAIRS),
    Family("eva02", timm_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=3), BLOCK, 2, ENDS, NO_QKV_PAIRS,
        size=28),
    Family("beit", timm_model("beit_base_patch16_224", img_size=32, **SMALL), BLOCK, 2, ENDS, NO_QKV_PAIRS),
    Family("cait", timm_model("cait_xxs24_224", img_size=32, **SMALL),
        (*[TALKING_BLOCK] * 2, *[BLOCK_QKV_APART] * 2), 4, ENDS, FOUR_PAIRS),
    Family("xcit", timm_model("xcit_nano_12_p16_224", img_size=32, **SMALL),
        (*[XCIT_BLOCK] * 2, *[BLOCK_QKV_APART] * 2), 4, ENDS + Counter({roles.CONV_IN: 3, roles.WEIGHT: 3}), VIT_PAIRS),
    Family("pit", timm_model(
        "pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(16, 16), depth=(2, 2), heads=(1, 2)), BLOCK, 4,
        ENDS + Counter({roles.CONV_IN: 1, roles.OTHER_IN: 1, roles.WEIGHT: 2}), FOUR_PAIRS),
    Family("levit", timm_model(
        "levit_128s", img_size=64, embed_dim=(16, 32), depth=(2, 1), num_heads=(2, 2), key_dim=8),
        (*[LEVIT_BLOCK] * 2, LEVIT_DOWN), 3, pairs={}, size=64, fit_norms=True),
    Family("tiny_vit", timm_model(
        "tiny_vit_5m_224", embed_dims=(16, 16, 32, 32), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
        window_sizes=(4, 4, 4, 2)), CONV_BLOCK, 4, pairs=FOUR_PAIRS, size=64),
    Family("maxvit", maxvit("maxvit_tiny_tf"), BLOCK, 4, pairs={roles.QKV_IN: 4, roles.FC1_IN: 5}),
    Family("hiera", timm_model(
        "hiera_tiny_224", img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
        (BLOCK, *[WIDENING_BLOCK] * 3), 4, ENDS,
        {roles.QKV_IN: 1, roles.FC1_IN: 4, roles.OTHER_IN: 3, roles.HEAD_IN: 1}, size=64),
    # Its attention is sums of elementwise products: there is no attention matrix to quantize, and no block.
    Family("mobilevitv2", _mobilevitv2, (), 0, ENDS + Counter({roles.CONV_IN: 18, roles.WEIGHT: 18}), {}),
    Family("efficientformerv2", _efficientformerv2, None, 2, pairs={}, size=64),
    Family("tnt", timm_model(
        "tnt_s_legacy_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=2, num_heads_outer=2), TNT_BLOCK, 2,
        ENDS + MERGE, FOUR_PAIRS | {roles.MERGE_IN: 1}),
    Family("crossvit", timm_model(
        "crossvit_tiny_240", img_size=32, patch_size=(8, 16), embed_dim=(16, 32), depth=((1, 2, 0),),
        num_heads=(2, 2), mlp_ratio=(2, 2, 1)), (*[BLOCK] * 3, *[FUSION_BLOCK] * 2), 5,
        pairs={roles.QKV_IN: 5, roles.FC1_IN: 3, roles.HEAD_IN: 2}),
    Family("siglip", timm_model("vit_base_patch16_siglip_224", img_size=32, **SMALL), BLOCK, 2, ENDS + BLOCK,
        {roles.QKV_IN: 3, roles.FC1_IN: 3}),
    Family("transformer_encoder", _encoder, BLOCK, 2, Counter({roles.PATCH_IN: 1, roles.WEIGHT: 1}), {},
        decomposed=True),
]  # fmt: skip
