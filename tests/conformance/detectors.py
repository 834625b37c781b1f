"""Detectors and segmenters as families: torchvision's with two kinds of backbones, and padded inputs of transformers.

Small random configurations; images come in several sizes, as photos do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import Family
from families_hf import RESNET, hf_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from transformers import ResNetConfig

from vitq.data.zoo.scene_models import SwinPyramid

WIDTH = 16
SIZES = ((40, 56), (48, 36), (64, 64), (40, 40))
BOX = {"box_detections_per_img": 8, "box_score_thresh": 0.0}


def swin_backbone() -> nn.Module:
    """Swin in two stages behind a feature pyramid; its windows of 4 do not divide most feature maps."""
    return SwinPyramid((WIDTH, 2 * WIDTH), WIDTH, head=8)


class VitBackbone(nn.Module):
    """A plain vision transformer of one resolution, and a simple feature pyramid: twice as fine, and as it is."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=0,
            class_token=False, dynamic_img_size=True, global_pool="avg",
        )  # fmt: skip
        self.fine = nn.Sequential(nn.ConvTranspose2d(32, WIDTH, 2, 2), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.coarse = nn.Conv2d(32, WIDTH, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        (tokens,) = self.vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return {"0": self.fine(tokens), "1": self.coarse(tokens)}


def _anchors(each: int) -> AnchorGenerator:
    return AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0)[:each],) * 2)


def _two_stages(backbone: nn.Module) -> dict[str, Any]:
    """Everything of a two-stage detector that is large by default, made small."""
    return {
        "backbone": backbone, "num_classes": None, "min_size": 64, "max_size": 80, "rpn_anchor_generator": _anchors(3),
        "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 12, **BOX,
        "box_roi_pool": MultiScaleRoIAlign(["0", "1"], 3, 1), "box_head": TwoMLPHead(9 * WIDTH, 32),
        "box_predictor": FastRCNNPredictor(32, 4),
    }  # fmt: skip


def mask_rcnn(backbone: Callable[[], nn.Module]) -> nn.Module:
    return MaskRCNN(
        **_two_stages(backbone()), mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 6, 1),
        mask_head=MaskRCNNHeads(WIDTH, (WIDTH,), 1), mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, 4),
    )  # fmt: skip


def retinanet(backbone: Callable[[], nn.Module]) -> nn.Module:
    model = RetinaNet(
        backbone(), 4, min_size=64, max_size=80, anchor_generator=_anchors(3), score_thresh=0.0, detections_per_img=8,
        topk_candidates=20,
    )  # fmt: skip
    for head in (model.head.classification_head, model.head.regression_head):
        head.conv = head.conv[:1]
    return model


def images(count: int) -> list[Tensor]:
    """Photos of several sizes, (3, H, W) in [0, 1], with structure."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        found.append(nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0])
    return found


def padded(count: int) -> dict[str, Tensor]:
    """The same in one tensor, with the mask that transformers' processors give."""
    pixels, mask = torch.zeros(count, 3, 64, 64), torch.zeros(count, 64, 64, dtype=torch.long)
    for number, image in enumerate(images(count)):
        height, width = image.shape[1:]
        pixels[number, :, :height, :width] = 4 * image - 2
        mask[number, :height, :width] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


def _detr() -> Callable[[], nn.Module]:
    return hf_model(
        "DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=ResNetConfig(**RESNET), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
    )  # fmt: skip


TORCHVISION = [
    Family("mask_rcnn_swin", lambda: mask_rcnn(swin_backbone), blocks=4, inputs=images),
    Family("mask_rcnn_vit", lambda: mask_rcnn(VitBackbone), blocks=2, inputs=images),
    Family("faster_rcnn_swin", lambda: FasterRCNN(**_two_stages(swin_backbone())), blocks=4, inputs=images),
    Family("faster_rcnn_vit", lambda: FasterRCNN(**_two_stages(VitBackbone())), blocks=2, inputs=images),
    Family("retinanet_swin", lambda: retinanet(swin_backbone), blocks=4, inputs=images),
    Family("retinanet_vit", lambda: retinanet(VitBackbone), blocks=2, inputs=images),
]
PADDED = [Family("detr_padded", _detr(), blocks=4, inputs=padded)]
DETECTORS = [*TORCHVISION, *PADDED]
