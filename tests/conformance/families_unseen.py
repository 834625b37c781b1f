"""Further vision models, which nobody looked at while the trace was written: they must work all the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from families import Family
from families_hf import BASE, SWIN, hf_model, transformers
from families_timm import SMALL, maxvit, timm_model
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientvit_mit import EfficientVit
from timm.models.fastvit import FastVit
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models import SwinTransformer as TorchvisionSwin
from torchvision.models.maxvit import MaxVit as TorchvisionMaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2


def _mvitv2() -> nn.Module:
    cfg = MultiScaleVitCfg(
        depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2), stride_q=((1, 1), (2, 2)), stride_kv=((2, 2), (1, 1))
    )
    return MultiScaleVit(cfg, img_size=(32, 32), num_classes=10)


def _fastvit() -> nn.Module:
    mixers = ("repmixer", "repmixer", "attention", "attention")
    return FastVit(
        layers=(1, 1, 1, 2), token_mixers=mixers, embed_dims=(8, 16, 32, 64), mlp_ratios=(2, 2, 2, 2), num_classes=10
    )


def _efficientvit() -> nn.Module:
    return EfficientVit(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_dim=8, head_widths=(32, 32), num_classes=10)


def _efficientformer() -> nn.Module:
    return EfficientFormer(depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 32), num_vit=2, mlp_ratios=2, num_classes=10)


def _torchvision_swinv2() -> nn.Module:
    return TorchvisionSwin(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def _torchvision_maxvit() -> nn.Module:
    return TorchvisionMaxVit(
        input_size=(64, 64), stem_channels=8, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip


def _mask2former() -> nn.Module:
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, num_labels=3,
    ))  # fmt: skip


def _rt_detr() -> nn.Module:
    """With one query, the best of all places: which of several places with random weights come next is chance."""
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=32, encoder_in_channels=[16, 16, 32], encoder_ffn_dim=32, encoder_attention_heads=2,
        d_model=32, num_queries=1, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32, decoder_layers=2,
        decoder_attention_heads=2, decoder_n_points=2, hidden_expansion=0.5, num_labels=3, eval_size=None,
    ))  # fmt: skip


def _upernet() -> nn.Module:
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, patch_size=2, embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=3, pool_scales=[1, 2],
    ))  # fmt: skip


def _dpt(name: str) -> Callable[[], nn.Module]:
    return hf_model(
        name, "DPTConfig", **BASE | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip


def _masked(examples: int) -> dict[str, Tensor]:
    """Images, and the numbers by whose order patches are left out."""
    return {"pixel_values": torch.randn(examples, 3, 32, 32), "noise": torch.rand(examples, 16)}


PYRAMID = {"depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
TIMM = [
    Family("deit3", timm_model("deit3_small_patch16_224", img_size=32, **SMALL)),
    Family("convit", timm_model("convit_tiny", img_size=32, patch_size=8, **SMALL, local_up_to_layer=1)),
    Family("visformer", timm_model(
        "visformer_tiny", img_size=32, patch_size=8, init_channels=8, embed_dim=32, depth=(1, 2, 1), num_heads=2)),
    Family("poolformer", lambda: MetaFormer(depths=(1, 1), dims=(16, 32), num_classes=10)),
    Family("mvitv2", _mvitv2),
    Family("gcvit", lambda: GlobalContextVit(
        img_size=64, depths=(1, 1, 1, 2), num_heads=(1, 1, 2, 2), embed_dim=8, window_ratio=(16, 16, 32, 32),
        num_classes=10), size=64),
    Family("davit", timm_model(
        "davit_tiny", embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 2), window_size=4)),
    Family("twins_svt", timm_model(
        "twins_svt_small", img_size=32, embed_dims=(16, 32), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2),
        wss=(4, 4), sr_ratios=(2, 1), patch_size=2)),
    Family("coat_lite", timm_model(
        "coat_lite_tiny", img_size=32, patch_size=4, embed_dims=(16, 16, 32, 32), serial_depths=(1, 1, 1, 2),
        num_heads=8, mlp_ratios=(2, 2, 2, 2))),
    Family("nest", lambda: Nest(
        img_size=32, patch_size=2, embed_dims=(16, 16, 32), num_heads=(1, 2, 2), depths=(1, 1, 2), num_classes=10)),
    Family("volo", lambda: VOLO(
        layers=(1, 1, 1, 2), img_size=32, embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), stem_hidden_dim=8,
        num_classes=10)),
    Family("swin_s3", timm_model(
        "swin_s3_tiny_224", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        window_size=(4, 4))),
    Family("efficientvit_mit", _efficientvit),
    Family("efficientvit_msra", timm_model(
        "efficientvit_m0", img_size=64, embed_dim=(16, 32, 32), key_dim=(8, 8, 8), depth=(1, 1, 1),
        num_heads=(2, 2, 2), window_size=(4, 4, 4)), size=64),
    Family("fastvit", _fastvit, size=64),
    Family("repvit", timm_model("repvit_m0_9", embed_dim=(8, 16), depth=(1, 1))),
    Family("vit_relpos", timm_model("vit_relpos_small_patch16_224", img_size=32, patch_size=8, **SMALL)),
    Family("flexivit", timm_model("flexivit_small", img_size=32, **SMALL)),
    Family("naflexvit", timm_model("naflexvit_base_patch16_gap", **SMALL)),
    Family("samvit", timm_model(
        "samvit_base_patch16", img_size=64, **SMALL, patch_size=8, window_size=4, global_attn_indexes=(1,),
        neck_chans=8), size=64),
    Family("maxvit_rmlp", maxvit("maxvit_rmlp_pico_rw")),
    Family("coatnet_rmlp", maxvit("coatnet_rmlp_0_rw")),
    Family("edgenext", timm_model(
        "edgenext_xx_small", dims=(8, 16, 32, 32), depths=(1, 1, 2, 2), heads=(2, 2, 2, 2)), size=64),
    Family("pvt_v2", lambda: PyramidVisionTransformerV2(
        depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 32), num_heads=(1, 1, 2, 2), num_classes=10)),
    Family("mobilevit", timm_model("mobilevit_xxs"), size=64),
    Family("efficientformer", _efficientformer, size=224),
    Family("mixer", lambda: MlpMixer(
        img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=10)),
    Family("aimv2", timm_model("aimv2_large_patch14_224", img_size=28, **SMALL), size=28),
    Family("swiftformer", timm_model("swiftformer_xs", layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16))),
    Family("focalnet", lambda: FocalNet(
        embed_dim=8, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3), num_classes=10)),
]  # fmt: skip
HF = [
    Family("hf_vit_mae", hf_model(
        "ViTMAEForPreTraining", "ViTMAEConfig", **BASE, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32), inputs=_masked),
    Family("hf_beit", hf_model(
        "BeitForImageClassification", "BeitConfig", **BASE, num_labels=10, use_relative_position_bias=True)),
    Family("hf_data2vec", hf_model(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", **BASE, num_labels=10)),
    Family("hf_dpt", _dpt("DPTForSemanticSegmentation")),
    Family("hf_glpn", hf_model(
        "GLPNForDepthEstimation", "GLPNConfig", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=16), size=64),
    Family("hf_mask2former", _mask2former),
    Family("hf_rt_detr", _rt_detr, size=64, fit_norms=True),
    Family("hf_upernet_swin", _upernet, size=64),
    Family("hf_levit", hf_model(
        "LevitForImageClassification", "LevitConfig", image_size=64, hidden_sizes=[16, 32, 32],
        num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=10), size=64),
    Family("hf_pvt", hf_model(
        "PvtForImageClassification", "PvtConfig", image_size=32, **PYRAMID | {"hidden_sizes": [16, 32]},
        sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2], num_labels=10)),
    Family("hf_mobilevit", hf_model(
        "MobileViTForImageClassification", "MobileViTConfig", image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2, num_labels=10), size=64),
    Family("hf_swinv2", hf_model("Swinv2ForImageClassification", "Swinv2Config", **SWIN)),
    Family("hf_dinov3", hf_model("DINOv3ViTModel", "DINOv3ViTConfig", **BASE)),
    Family("hf_timm_wrapper", hf_model(
        "TimmWrapperForImageClassification", "TimmWrapperConfig", architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}, num_labels=10)),
    Family("hf_deit", hf_model("DeiTForImageClassification", "DeiTConfig", **BASE, num_labels=10)),
    Family("hf_ijepa", hf_model("IJepaForImageClassification", "IJepaConfig", **BASE, num_labels=10)),
    Family("hf_vitdet", hf_model(
        "VitDetBackbone", "VitDetConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
        image_size=32, pretrain_image_size=32, patch_size=8, window_block_indices=[0], window_size=2,
        use_relative_position_embeddings=True)),
    Family("hf_depth_anything", hf_model(
        "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
        backbone_config=transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
            out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False),
        patch_size=8, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8)),
    Family("hf_owlvit_vision", hf_model("OwlViTVisionModel", "OwlViTVisionConfig", **BASE)),
    Family("hf_hiera", hf_model(
        "HieraForImageClassification", "HieraConfig", image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8], num_labels=10), size=64),
]  # fmt: skip
TORCHVISION = [
    Family("torchvision_swinv2", _torchvision_swinv2),
    Family("torchvision_maxvit", _torchvision_maxvit, size=64),
]
UNSEEN = [*TIMM, *HF, *TORCHVISION]
# Most of their work is in calls that are not taken apart; the trace must say so.
UNSUPPORTED = [
    Family("sequencer", timm_model(
        "sequencer2d_s", img_size=32, layers=(1, 1), patch_sizes=(8, 2), embed_dims=(16, 32), hidden_sizes=(8, 8),
        mlp_ratios=(2, 2))),
]  # fmt: skip
