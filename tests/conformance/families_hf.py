"""Families of Hugging Face transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import Family
from families_timm import ATTENTION, BLOCK_QKV_APART, ENDS, MERGE, MLP, SWIN_PAIRS, TWO_PAIRS, VIT_PAIRS
from torch import Tensor, nn

from vitq.core import roles

transformers = pytest.importorskip("transformers")

BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 8,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 10,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"],
}  # fmt: skip


def hf_model(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**kwargs))


def _vit(attention: str) -> Callable[[], nn.Module]:
    return hf_model("ViTForImageClassification", "ViTConfig", **BASE, num_labels=10, attn_implementation=attention)


def _texts(count: int) -> Tensor:
    """Token numbers (count, 8) that end in the largest one, which CLIP takes for the end of the text."""
    tokens = torch.randint(1, 40, (count, 8))
    tokens[:, -1] = 49
    return tokens


def pairs_of_image_and_text(examples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(examples, 3, 32, 32), "input_ids": _texts(examples)}


def zero_shot(model: nn.Module, images: Tensor) -> Any:
    """Images against three fixed class texts."""
    tokens = torch.arange(1, 25).reshape(3, 8)
    tokens[:, -1] = 49
    return model(pixel_values=images, input_ids=tokens).logits_per_image


def _two_towers(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        text = TEXT | {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}
        towers = {"vision_config": dict(BASE), "text_config": text}
        towers |= {"projection_dim": 16} if name == "CLIP" else {}
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**towers))

    return make


PINNED = [
    Family("hf_vit_sdpa", _vit("sdpa"), BLOCK_QKV_APART, 2, ENDS, VIT_PAIRS),
    Family("hf_vit_eager", _vit("eager"), BLOCK_QKV_APART, 2, ENDS, VIT_PAIRS),
    Family(
        "hf_swin", hf_model("SwinForImageClassification", "SwinConfig", **SWIN), BLOCK_QKV_APART, 4, ENDS + MERGE,
        SWIN_PAIRS,
    ),
]  # fmt: skip

# A stage of depth one is a block with its patch embedding in it.
SEGFORMER_STAGE = BLOCK_QKV_APART + Counter({roles.CONV_IN: 2, roles.WEIGHT: 2})
CROSS_BLOCK = BLOCK_QKV_APART + Counter({**ATTENTION, roles.QKV_IN: 3, roles.WEIGHT: 4})
# Before the first layer the object queries are the same for every image: their self-attention is a constant.
FIRST_CROSS_BLOCK = Counter({**ATTENTION, **MLP, roles.QKV_IN: 2, roles.WEIGHT: 5})
POOLING_HEAD = Counter({**ATTENTION, **MLP, roles.QKV_IN: 2, roles.WEIGHT: 4})

FURTHER = [
    Family("hf_dinov2", hf_model(
        "Dinov2ForImageClassification", "Dinov2Config", **{k: v for k, v in BASE.items() if k != "intermediate_size"},
        mlp_ratio=2, num_labels=10), BLOCK_QKV_APART, 2, ENDS, TWO_PAIRS),
    Family("segformer", hf_model(
        "SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1], num_encoder_blocks=2,
        hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16),
        (SEGFORMER_STAGE + Counter({roles.PATCH_IN: 1, roles.WEIGHT: 1}), SEGFORMER_STAGE), 2,
        Counter({roles.OTHER_IN: 2, roles.CONV_IN: 2, roles.WEIGHT: 4}), TWO_PAIRS | {roles.OTHER_IN: 1}),
    Family("clip_vision", hf_model(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", **BASE, projection_dim=16), BLOCK_QKV_APART, 2, ENDS,
        VIT_PAIRS),
    Family("clip", _two_towers("CLIP"), BLOCK_QKV_APART, 4,
        Counter({roles.PATCH_IN: 1, roles.OTHER_IN: 4, roles.WEIGHT: 3}),
        {roles.QKV_IN: 4, roles.FC1_IN: 4, roles.OTHER_IN: 1}, inputs=pairs_of_image_and_text),
    # The text tower sees the same texts for every image: it folds into a constant.
    Family("clip_zero_shot", _two_towers("CLIP"), BLOCK_QKV_APART, 2,
        ENDS + Counter({roles.OTHER_IN: 1, roles.WEIGHT: 1}), TWO_PAIRS | {roles.OTHER_IN: 1}, forward_fn=zero_shot),
    Family("siglip_vision", hf_model("SiglipVisionModel", "SiglipVisionConfig", **BASE), BLOCK_QKV_APART, 2,
        Counter({roles.PATCH_IN: 1, roles.WEIGHT: 1}) + POOLING_HEAD, {roles.QKV_IN: 2, roles.FC1_IN: 3},
        decomposed=True),
    Family("siglip_two_towers", _two_towers("Siglip"), BLOCK_QKV_APART, 4, None,
        {roles.QKV_IN: 4, roles.FC1_IN: 5}, inputs=pairs_of_image_and_text, decomposed=True),
    Family("yolos", hf_model(
        "YolosForObjectDetection", "YolosConfig", **BASE | {"image_size": [32, 32]}, num_detection_tokens=4),
        BLOCK_QKV_APART, 2, Counter({roles.PATCH_IN: 1, roles.FC1_IN: 2, roles.FC2_IN: 4, roles.WEIGHT: 7}), TWO_PAIRS),
    Family("detr", hf_model(
        "DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=transformers.ResNetConfig(**RESNET), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5),
        (*[BLOCK_QKV_APART] * 2, FIRST_CROSS_BLOCK, CROSS_BLOCK), 4, pairs={}),
]  # fmt: skip
