"""Two small models trained on Fashion-MNIST by tools/train_zoo.py, and the images that they are judged on.

Shapes:  models (N, 3, 28, 28) -> (N, 10)    stored images (count, 28, 28) uint8, grayscale
Weights are stored in float16 and read as float32; accuracy is measured after that rounding.
The images are Zalando's, under the MIT licence, whose text is beside them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitq.core.errors import UnknownNameError
from vitq.data.stores import ItemStore

IMAGE_SIZE = 28
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SETS = ("fashion_calib", "fashion_test")  # 300 of the training images, kept out of training; 2,000 test images


def empty_vit() -> nn.Module:
    """timm's VisionTransformer with fresh weights: patch 4, width 64, 4 blocks of 4 heads, class token."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=len(CLASSES)
    )


def empty_swin() -> nn.Module:
    """timm's SwinTransformer with fresh weights: patch 2, window 7, width 32, two stages of two blocks.

    The second block of the first stage has shifted windows; one patch merging lies between the stages.
    """
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=IMAGE_SIZE,
        patch_size=2,
        window_size=7,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
        drop_path_rate=0.0,
        num_classes=len(CLASSES),
    )


def fashion_vit() -> nn.Module:
    """The trained VisionTransformer of empty_vit, in eval mode."""
    return trained(empty_vit, "fashion_vit")


def fashion_swin() -> nn.Module:
    """The trained SwinTransformer of empty_swin, in eval mode."""
    return trained(empty_swin, "fashion_swin")


def zoo_images(name: str) -> tuple[Tensor, Tensor]:
    """An embedded image set as the fashion models take it.

    Returns:
        (images, labels): (N, 3, 28, 28) float32 in [-1, 1], grayscale in all three channels, and (N,) int64.

    Raises:
        UnknownNameError: no such image set.
    """
    stored = stored_arrays(name)
    pixels = torch.from_numpy(stored["images"]).float().div(255).sub(0.5).div(0.5)
    return pixels.unsqueeze(1).repeat(1, 3, 1, 1), torch.from_numpy(stored["labels"]).long()


def fashion_store(name: str) -> ItemStore:
    """An embedded image set as grayscale PIL images; each id is its part and row of the official files.

    Raises:
        UnknownNameError: no such image set.
    """
    from PIL import Image

    stored = stored_arrays(name)
    part = "t10k" if name == "fashion_test" else "train"
    ids = [f"{part}-{row:05}" for row in stored["rows"].tolist()]
    items = [Image.fromarray(image) for image in stored["images"]]
    return ItemStore(f"zoo:{name}", items, ids, torch.from_numpy(stored["labels"]).long())


def trained(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """The model with its stored weights; the global generator is not touched."""
    from safetensors.torch import load

    with torch.random.fork_rng(devices=[]):
        model = build().eval()
    model.load_state_dict({key: value.float() for key, value in load(_read(f"{name}.safetensors")).items()})
    return model


def stored_arrays(name: str) -> dict[str, NDArray[Any]]:
    """images (N, 28, 28) uint8, labels (N,) uint8, rows (N,) int32."""
    if name not in IMAGE_SETS:
        raise UnknownNameError("zoo image set", name, list(IMAGE_SETS))
    with np.load(io.BytesIO(_read(f"{name}.npz")), allow_pickle=False) as stored:
        return {key: stored[key] for key in ("images", "labels", "rows")}


def _read(name: str) -> bytes:
    """A file that comes with the package."""
    return files("vitq.data.zoo").joinpath("files", name).read_bytes()
