"""The detector and the segmenter of procedural scenes, which tools/train_scenes.py trains.

Shapes:  scene_maskrcnn    a list of images (3, H, W) in [0, 1]
         scene_segformer   pixel_values (B, 3, H, W), normalised as ImageNet's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitq.core.errors import MissingExtraError
from vitq.data.zoo.fashion import CLASSES, trained
from vitq.data.zoo.scenes import SIZE

WIDTH = 48  # channels of the pyramid
STAGES = (32, 64, 128)  # channels of Swin's stages, of two blocks each
SEGFORMER_DEPTHS = (2, 3, 4, 3)  # blocks of SegFormer's stages


class SwinPyramid(nn.Module):
    """torchvision's Swin and a feature pyramid over its stages (4, 8, 16 … pixels).

    Args:
        stages: channels of each.
        width: channels of the pyramid.
        head: channels of an attention head.
        depths: blocks of the stages; two of each if not given.
        window: of attention, in tokens along a side.
    """

    def __init__(
        self,
        stages: tuple[int, ...] = STAGES,
        width: int = WIDTH,
        head: int = 16,
        depths: tuple[int, ...] | None = None,
        window: int = 4,
    ) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformer
        from torchvision.ops import FeaturePyramidNetwork

        blocks, heads = list(depths or (2,) * len(stages)), [channels // head for channels in stages]
        swin = SwinTransformer([4, 4], stages[0], blocks, heads, [window, window], stochastic_depth_prob=0.0)
        self.body = swin.features
        self.fpn = FeaturePyramidNetwork(list(stages), width)
        self.out_channels = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = {}
        for number, stage in enumerate(self.body):
            x = stage(x)
            if number % 2:
                levels[str(number // 2)] = x.permute(0, 3, 1, 2)
        found: dict[str, Tensor] = self.fpn(levels)
        return found


def trained_maskrcnn() -> nn.Module:
    """scene_maskrcnn with the weights that come with vitq, in eval mode."""
    return trained(scene_maskrcnn, "scenes_maskrcnn")


def scene_maskrcnn() -> nn.Module:
    """torchvision's Mask R-CNN over SwinPyramid, its heads made small, with fresh weights; 10 classes."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    levels = [str(number) for number in range(len(STAGES))]
    classes = len(CLASSES) + 1
    model: nn.Module = MaskRCNN(
        SwinPyramid(),
        num_classes=None,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * len(STAGES)),
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        box_head=TwoMLPHead(49 * WIDTH, 256),
        box_predictor=FastRCNNPredictor(256, classes),
        box_batch_size_per_image=64,
        box_detections_per_img=20,
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
        mask_head=MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), 1),
        mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, classes),
    )
    return model


def trained_segformer() -> nn.Module:
    """scene_segformer with the weights that come with vitq, in eval mode.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    return trained(scene_segformer, "scenes_segformer")


def scene_segformer(depths: Sequence[int] = SEGFORMER_DEPTHS) -> nn.Module:
    """transformers' SegFormer in four small stages, with fresh weights; 10 classes and background.

    Args:
        depths: blocks of the stages.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "the segmenter of scenes") from error
    library: Any = transformers
    config = library.SegformerConfig(
        depths=list(depths),
        hidden_sizes=[32, 64, 96, 128],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[4, 4, 4, 4],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        image_size=SIZE,
        id2label=dict(enumerate(("background", *CLASSES))),
    )
    model: nn.Module = library.SegformerForSemanticSegmentation(config)
    return model
