"""The models and images that come with vitq: small, offline, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vitq.core.errors import UnknownNameError
from vitq.data.preprocess import Preprocess
from vitq.data.zoo.seeded import IMAGE_SIZE, seeded_images, seeded_swin, seeded_vit

__all__ = ["build_zoo", "seeded_images", "zoo_names", "zoo_preprocess"]

_BUILDERS: dict[str, Callable[[], nn.Module]] = {"seeded_swin": seeded_swin, "seeded_vit": seeded_vit}


def zoo_names() -> list[str]:
    """The names that build_zoo knows, sorted."""
    return sorted(_BUILDERS)


def build_zoo(name: str) -> nn.Module:
    """The named model in eval mode, with its weights; takes (N, 3, 32, 32), gives (N, 10).

    Raises:
        UnknownNameError: no such model.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("zoo model", name, zoo_names())
    return _BUILDERS[name]()


def zoo_preprocess(name: str) -> Preprocess:
    """Preprocessing of the named model: resize to its image size, values to [-1, 1].

    Raises:
        UnknownNameError: no such model.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("zoo model", name, zoo_names())
    return Preprocess.from_image_size(IMAGE_SIZE)
