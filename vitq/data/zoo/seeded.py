"""Small models with random weights from a fixed seed: for tests and the demo, where no trained ones are.

Weights are scaled so that signals neither die nor explode, and the LayerNorms get a log-normal spread of
gammas, so that a few channels are several times larger than the rest, as in trained transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

IMAGE_SIZE = 32
NUM_CLASSES = 10
SEED = 20
GAMMA_SPREAD = 0.7  # standard deviation of log gamma: the largest of 64 channels is about 5x the median
BETA_SPREAD = 0.3


def seeded_vit() -> nn.Module:
    """timm's VisionTransformer: image 32, patch 8, width 64, 3 blocks of 4 heads, 10 classes."""
    from timm.models.vision_transformer import VisionTransformer

    return _seeded(
        lambda: VisionTransformer(
            img_size=IMAGE_SIZE, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=NUM_CLASSES
        )
    )


def seeded_swin() -> nn.Module:
    """timm's SwinTransformer: image 32, patch 2, window 4, two stages of two blocks, so one patch merging.

    The second block of each stage has shifted windows, hence attention masks.
    """
    from timm.models.swin_transformer import SwinTransformer

    return _seeded(
        lambda: SwinTransformer(
            img_size=IMAGE_SIZE,
            patch_size=2,
            window_size=4,
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=NUM_CLASSES,
        )
    )


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode with every parameter drawn from SEED; the global generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        model = build().eval()
    draw = torch.Generator().manual_seed(SEED)
    norms = {id(m.weight): m for m in model.modules() if isinstance(m, nn.LayerNorm)}
    shifts = {id(m.bias) for m in norms.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if id(parameter) in norms:
                parameter.copy_((GAMMA_SPREAD * noise).exp())
            elif id(parameter) in shifts:
                parameter.copy_(BETA_SPREAD * noise)
            elif parameter.ndim == 2 or parameter.ndim == 4:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise)
    return model


def seeded_images(count: int, size: int = IMAGE_SIZE, seed: int = 0) -> Tensor:
    """Procedural images with structure: colour gradients, a wave and a soft blob each.

    Returns:
        (count, 3, size, size) float32 in [-1, 1], which is what the zoo's preprocessing gives. Image i
        depends on seed and i only, not on count.
    """
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.empty(count, 3, size, size)
    for index in range(count):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + index)
        slope, offset, wave, blob = torch.randn(4, 3, 2, generator=draw).unbind()
        turn, speed, phase, width = torch.rand(4, generator=draw).tolist()
        direction = x * math.cos(math.pi * turn) + y * math.sin(math.pi * turn)
        ripple = torch.sin((2 + 8 * speed) * direction + 2 * math.pi * phase)
        centre = offset[0].tanh()
        spot = torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (0.05 + 0.3 * width))
        for channel in range(3):
            plane = slope[channel, 0] * x + slope[channel, 1] * y
            mixed = 0.6 * plane + 0.6 * wave[channel, 0] * ripple + 1.2 * blob[channel, 0] * spot
            images[index, channel] = (mixed + 0.4 * wave[channel, 1]).tanh()
    return images
