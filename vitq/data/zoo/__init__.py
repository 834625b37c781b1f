"""The models and images that come with vitq: small, offline, the same on every machine.

seeded_*   random weights and procedural images, from a seed    (N, 3, 32, 32)
fashion_*  trained on Fashion-MNIST, with its images            (N, 3, 28, 28)
scenes_*   a detector and a segmenter, trained on scenes of its items, with scenes that are made from a seed
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vitq.core.errors import UnknownNameError
from vitq.data.preprocess import Preprocess
from vitq.data.stores import ItemStore
from vitq.data.zoo import fashion, scenes, seeded
from vitq.data.zoo.fashion import fashion_store, fashion_swin, fashion_vit, zoo_images
from vitq.data.zoo.scene_models import trained_maskrcnn, trained_segformer
from vitq.data.zoo.seeded import seeded_images, seeded_swin, seeded_vit

__all__ = ["build_zoo", "image_set_names", "seeded_images", "zoo_images", "zoo_names", "zoo_preprocess", "zoo_store"]

# With the size of the images that a model takes, None where it takes photos at their own.
_BUILDERS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "fashion_swin": (fashion_swin, fashion.IMAGE_SIZE),
    "fashion_vit": (fashion_vit, fashion.IMAGE_SIZE),
    "scenes_maskrcnn": (trained_maskrcnn, None),
    "scenes_segformer": (trained_segformer, None),
    "seeded_swin": (seeded_swin, seeded.IMAGE_SIZE),
    "seeded_vit": (seeded_vit, seeded.IMAGE_SIZE),
}


def zoo_names() -> list[str]:
    """The names that build_zoo knows, sorted."""
    return sorted(_BUILDERS)


def image_set_names() -> list[str]:
    """The names that zoo_store knows, sorted; open_images takes them as zoo:NAME."""
    return sorted([*fashion.IMAGE_SETS, *scenes.SETS])


def zoo_store(name: str) -> ItemStore:
    """An embedded image set as PIL images.

    Raises:
        UnknownNameError: no such image set.
    """
    if name not in image_set_names():
        raise UnknownNameError("zoo image set", name, image_set_names())
    return scenes.scene_store(name) if name in scenes.SETS else fashion_store(name)


def build_zoo(name: str) -> nn.Module:
    """The named model in eval mode, with its weights.

    Those that classify take (N, 3, H, W) of their image size and give (N, 10); scenes_*: data/zoo/scene_models.py.

    Raises:
        UnknownNameError: no such model.
    """
    return _entry(name)[0]()


def zoo_preprocess(name: str) -> Preprocess | None:
    """Preprocessing of the named model: resize to its image size, values to [-1, 1]; None where it takes photos.

    Raises:
        UnknownNameError: no such model.
    """
    size = _entry(name)[1]
    return None if size is None else Preprocess.from_image_size(size)


def _entry(name: str) -> tuple[Callable[[], nn.Module], int | None]:
    if name not in _BUILDERS:
        raise UnknownNameError("zoo model", name, zoo_names())
    return _BUILDERS[name]
