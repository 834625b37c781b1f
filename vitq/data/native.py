"""Photos at their own sizes as detectors and segmenters take them; stored in every artifact of one.

Shapes:  form "list"           a list of images (3, H, W) in [0, 1]: the model resizes and normalises (torchvision)
         form "pixel_values"   one tensor (B, 3, h, w), resized and normalised, for transformers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vitq.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMS = ("list", "pixel_values")
SHORTEST, LONGEST = 800, 1333  # of DETR and those after it
SEGMENTED = 512  # height and width of a segmenter's images, unless its configuration says
TOGETHER, PIXELS = 8, 2**19  # photos of one batch at most, and how large they may be in all
TORCHVISION = "GeneralizedRCNNTransform"  # what resizes and normalises inside of torchvision's detectors
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PhotoInput:
    """How photos become a model's input: alone, or with others of the same size, so that nothing is padded.

    Attributes:
        form: one of FORMS. With "list", the model does the rest, and shortest and longest say what it does.
        shortest, longest: pixels that the shorter side becomes, unless the longer one came to be longer than that.
        square: instead, height and width of every image, in pixels.
        mean, std: of values in [0, 1].
    """

    form: str
    shortest: int = SHORTEST
    longest: int = LONGEST
    square: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        sizes = [self.shortest, self.longest, *([] if self.square is None else [self.square])]
        if self.form not in FORMS or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise InputError(f"photos: form {self.form!r} and sizes {sizes}, expected one of {FORMS} and whole numbers")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"photos: mean {self.mean} and std {self.std}, expected three numbers each, std above 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; from_dict gives an equal object back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhotoInput:
        """Raises InputError for a missing, unknown or unusable field."""
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise InputError(f"preparation of photos needs exactly the fields {sorted(known)}, got {sorted(values)}.")
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)

    def __call__(self, image: Image) -> Any:
        """A batch of one: what the model takes.

        Args:
            image: RGB.
        """
        return self.batch([image])

    def batch(self, images: Sequence[Image]) -> Any:
        """A batch of RGB photos that are alike."""
        if self.form == "list":
            return [_tensor(image) for image in images]
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (self.mean, self.std))
        pixels = [(_tensor(image.resize(self.size(image), resample=2)) - mean) / std for image in images]
        return {"pixel_values": torch.stack(pixels)}

    def alike(self, images: Iterable[Image]) -> list[list[int]]:
        """Positions of photos, in order, that go together: of one size, and so few that they fit where one does."""
        groups: list[list[int]] = []
        before: Any = None
        for position, image in enumerate(images):
            width, height = self.size(image)
            kind = image.size if self.form == "list" else (width, height)
            if kind == before and len(groups[-1]) < min(TOGETHER, PIXELS // (width * height)):
                groups[-1].append(position)
            else:
                groups.append([position])
            before = kind
        return groups

    def size(self, image: Image) -> tuple[int, int]:
        """(width, height) after resizing."""
        if self.square is not None:
            return self.square, self.square
        short, long = min(image.size), max(image.size)
        scale = min(self.shortest / short, self.longest / long)
        return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def photo_input(model: nn.Module, size: int | None = None) -> PhotoInput | None:
    """How a detector or segmenter takes photos, None for a model that is neither by its looks.

    Args:
        size: pixels of the shorter side (of both, for a segmenter), instead of what its library does by default, or a
            segmenter's configuration says.

    Raises:
        InputError: a size is given, and the model resizes photos itself.
    """
    transform: Any = getattr(model, "transform", None)
    if type(transform).__name__ == TORCHVISION:
        if size is not None:
            raise InputError("torchvision's detectors resize photos themselves: set min_size where the model is built")
        return PhotoInput("list", shortest=int(transform.min_size[-1]), longest=int(transform.max_size))
    if not hasattr(model, "config") or "pixel_values" not in signature(model.forward).parameters:
        return None
    name = type(model).__name__
    found = None
    if name.endswith("ForObjectDetection"):
        found = PhotoInput("pixel_values")
        found = found if size is None else replace(found, shortest=size, longest=round(size * LONGEST / SHORTEST))
    elif name.endswith("ForSemanticSegmentation"):
        found = PhotoInput("pixel_values", square=size or _own_size(model.config) or SEGMENTED)
    return found


def _own_size(config: Any) -> int | None:
    """Height and width that a configuration names, where they are the same."""
    size = getattr(config, "image_size", None)
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    side = sides.pop()
    return side if isinstance(side, int) and not sides else None


def _tensor(image: Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
