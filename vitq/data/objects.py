"""Photos with objects, or with the class of each pixel, as training examples, and the losses that models have for them.

Shapes:  torchvision   a list of images (3, H, W); boxes (n, 4) left, top, right, bottom in pixels, labels (n) from 1,
                       masks (n, H, W) of 0 and 1
         transformers  pixel_values (B, 3, h, w); boxes (n, 4) centre and size in parts of the image, class_labels (n)
                       from 0; of a segmenter labels (B, H, W), 255 left out
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq.core.errors import DataError, InputError, MissingExtraError
from vitq.core.training import Draw
from vitq.data.coco import CocoSet
from vitq.data.native import PhotoInput
from vitq.data.semantic import SemanticSet

if TYPE_CHECKING:
    from PIL.Image import Image

DETECTION = "torchvision.models.detection"
LOOKED_AT = 64  # photos whose content is part of the digest


class PhotoExamples(ABC):
    """Annotated photos as examples, each at its own size.

    Args:
        data: what to train on.
        inputs: how the model takes photos.
    """

    labelled = fixed = True

    def __init__(self, data: Any, inputs: PhotoInput) -> None:
        self.data, self.inputs = data, inputs

    def __len__(self) -> int:
        return len(self.data)

    def digest(self) -> str:
        """Of names, annotations, preparation, and the content of a few photos evenly spread."""
        files = self.data.files
        looked_at = files.digests(range(0, len(self), -(-len(self) // LOOKED_AT)))
        told = json.dumps([files.ids, self.annotations(), self.inputs.to_dict(), looked_at], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Any, Any]]:
        """(photos as the model takes them, what is in them) of each batch.

        Raises:
            DataError: a file that cannot be read, or photos of several sizes for a model that takes them in one tensor.
        """
        for draws in batches:
            numbers = [number for _, number in draws]
            images = [self.photo(number) for number in numbers]
            if self.inputs.form != "list" and len({self.inputs.size(image) for image in images}) > 1:
                raise DataError("photos of several sizes do not fit into one tensor; train with micro_batch=1")
            yield self.inputs.batch(images), self.targets(numbers, images)

    @abstractmethod
    def photo(self, number: int) -> Image:
        """Upright, in colours."""

    @abstractmethod
    def targets(self, numbers: Sequence[int], images: Sequence[Image]) -> Any:
        """What is in these photos, as the model's loss takes it."""

    @abstractmethod
    def annotations(self) -> Any:
        """What is known of all photos, as JSON."""


class ObjectExamples(PhotoExamples):
    """Photos with objects. Crowd regions are left out: which of them an object is, is not known.

    Args:
        ids: category id of each of the model's classes, -1 for one that the data do not have.
        masks: also hand out masks.

    Raises:
        MissingExtraError: masks are asked for, and what reads them is not installed.
    """

    def __init__(self, data: CocoSet, inputs: PhotoInput, ids: Sequence[int], masks: bool = False) -> None:
        super().__init__(data, inputs)
        self.classes = {number: at for at, number in enumerate(ids) if number >= 0}
        self.masks = masks
        if masks:
            _codes()

    def photo(self, number: int) -> Image:
        """Of the size that its annotations are for."""
        image: Image = self.data.image(number)
        return image

    def targets(self, numbers: Sequence[int], images: Sequence[Image]) -> list[dict[str, Tensor]]:
        """A dictionary for each photo."""
        return [self._target(number, image.width, image.height) for number, image in zip(numbers, images, strict=True)]

    def _target(self, number: int, width: int, height: int) -> dict[str, Tensor]:
        objects = [each for each in self.data.photos[number].objects if not each.get("iscrowd")]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        classes = torch.tensor([self.classes[each["category_id"]] for each in objects], dtype=torch.long)
        if self.inputs.form != "list":
            centres = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)
            return {"class_labels": classes, "boxes": centres / torch.tensor([width, height, width, height])}
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        found = {"boxes": corners, "labels": classes + 1}
        if self.masks:
            read = [_mask(each["segmentation"], height, width) for each in objects]
            found["masks"] = torch.stack(read) if read else torch.zeros(0, height, width, dtype=torch.uint8)
        return found

    def annotations(self) -> Any:
        """COCO's JSON, and which category is which class."""
        return [self.data.truth(), sorted(self.classes.items()), self.masks]


class PixelExamples(PhotoExamples):
    """Photos with the class of each pixel."""

    def __init__(self, data: SemanticSet, inputs: PhotoInput) -> None:
        super().__init__(data, inputs)

    def photo(self, number: int) -> Image:
        """As it is."""
        image: Image = self.data.files.photo(number)
        return image

    def targets(self, numbers: Sequence[int], images: Sequence[Image]) -> Tensor:
        """(B, H, W)."""
        return torch.stack([self.data.labels(number, image) for number, image in zip(numbers, images, strict=True)])

    def annotations(self) -> Any:
        """Content of a few masks, evenly spread."""
        some = self.data.masks[:: -(-len(self) // LOOKED_AT)]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in some]


class DetectionLoss:
    """The losses of torchvision's detectors, each the mean over regions, times the photos.

    Args:
        model: a detector.
        examples: of which the first one is tried.

    Raises:
        InputError: it is none.
    """

    def __init__(self, model: nn.Module, examples: PhotoExamples) -> None:
        if not any(_of_torchvision(module) for module in model.modules()):
            raise InputError(f"{type(model).__name__} is none of torchvision's detectors, so its loss is not known")
        self.parts: tuple[str, ...] = ()
        inputs, targets = next(examples.stream([[(0, 0)]]))
        device = next(model.parameters()).device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            images, known = [i.to(device) for i in inputs], [{k: v.to(device) for k, v in t.items()} for t in targets]
            self.parts = tuple(self(model, images, known))

    def __call__(self, model: nn.Module, inputs: Any, labels: Any) -> Mapping[str, Tensor]:
        """As the detector names them."""
        with _taking_targets(model):
            found: dict[str, Tensor] = model(inputs, labels)
        return {name: loss * len(inputs) for name, loss in found.items()}


class TransformersLoss:
    """The loss that models of transformers give when they are told the labels."""

    parts: tuple[str, ...] = ("loss",)

    def __call__(self, model: nn.Module, inputs: Any, labels: Any) -> Mapping[str, Tensor]:
        """The mean over the photos, times how many they are."""
        loss: Tensor = model(**inputs, labels=labels).loss
        return {"loss": loss * len(inputs["pixel_values"])}


def own_loss(model: nn.Module, examples: PhotoExamples) -> DetectionLoss | TransformersLoss:
    """The loss that a detector or segmenter brings."""
    return DetectionLoss(model, examples) if examples.inputs.form == "list" else TransformersLoss()


@contextmanager
def _taking_targets(model: nn.Module) -> Iterator[None]:
    """Torchvision's own parts are in training mode, which takes targets; what is below them stays in evaluation mode:
    nothing is dropped, and statistics stay.
    """
    parts = [module for module in model.modules() if _of_torchvision(module)]
    for module in parts:
        module.training = True
    try:
        yield
    finally:
        for module in parts:
            module.training = False


def _of_torchvision(module: nn.Module) -> bool:
    return any(kind.__module__.startswith(DETECTION) for kind in type(module).__mro__)


def _codes() -> Any:
    """What reads COCO's masks."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise MissingExtraError("faster-coco-eval", "coco", "masks") from error
    return mask


def _mask(segmentation: Any, height: int, width: int) -> Tensor:
    """(H, W) uint8 of polygons or run lengths."""
    mask = _codes()
    if isinstance(segmentation, list):
        code = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = mask.frPyObjects(segmentation, height, width)
    else:
        code = {**segmentation, "counts": str(segmentation["counts"]).encode()}
    return torch.from_numpy(np.ascontiguousarray(mask.decode(code)))
