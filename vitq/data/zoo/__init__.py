"""The models and images that come with vitq: small, offline, the same on every machine.

seeded_*   random weights and procedural images, from a seed    (N, 3, 32, 32)
fashion_*  trained on Fashion-MNIST, with its images            (N, 3, 28, 28)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vitq.core.errors import UnknownNameError
from vitq.data.preprocess import Preprocess
from vitq.data.zoo import fashion, seeded
from vitq.data.zoo.fashion import fashion_swin, fashion_vit, zoo_images, zoo_store
from vitq.data.zoo.seeded import seeded_images, seeded_swin, seeded_vit

__all__ = ["build_zoo", "image_set_names", "seeded_images", "zoo_images", "zoo_names", "zoo_preprocess", "zoo_store"]

_BUILDERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fashion_swin": (fashion_swin, fashion.IMAGE_SIZE),
    "fashion_vit": (fashion_vit, fashion.IMAGE_SIZE),
    "seeded_swin": (seeded_swin, seeded.IMAGE_SIZE),
    "seeded_vit": (seeded_vit, seeded.IMAGE_SIZE),
}


def zoo_names() -> list[str]:
    """The names that build_zoo knows, sorted."""
    return sorted(_BUILDERS)


def image_set_names() -> list[str]:
    """The names that zoo_images and zoo_store know, sorted; open_images takes them as zoo:NAME."""
    return sorted(fashion.IMAGE_SETS)


def build_zoo(name: str) -> nn.Module:
    """The named model in eval mode, with its weights; takes (N, 3, H, W) of its image size, gives (N, 10).

    Raises:
        UnknownNameError: no such model.
    """
    return _entry(name)[0]()


def zoo_preprocess(name: str) -> Preprocess:
    """Preprocessing of the named model: resize to its image size, values to [-1, 1].

    Raises:
        UnknownNameError: no such model.
    """
    return Preprocess.from_image_size(_entry(name)[1])


def _entry(name: str) -> tuple[Callable[[], nn.Module], int]:
    if name not in _BUILDERS:
        raise UnknownNameError("zoo model", name, zoo_names())
    return _BUILDERS[name]
