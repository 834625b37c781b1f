"""What detectors and segmenters return, as detections and classes of one photo.

Formula: torchvision   lists of boxes, labels from 1, scores, masks of probabilities (a pixel belongs from 0.5 on)
         transformers  logits (1, n, K + 1) and boxes (1, n, 4), centre and size in parts of the image. With a class for
                       "no object" behind the K others (DETR, YOLOS), probabilities are a softmax, and each box has its
                       best class; without (RT-DETR), they are sigmoids, and of all boxes with all classes the best
                       stay, as many as there are boxes
         segmenters    logits (1, C, h, w), enlarged bilinearly to the photo, and the largest
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.core.batches import default_forward, moved
from vitq.core.errors import InputError
from vitq.data.coco import match_categories
from vitq.data.native import PhotoInput
from vitq.evaluate.detections import Detections, encode_masks

if TYPE_CHECKING:
    from PIL.Image import Image

ENLARGED = 2**24  # values of one piece of enlarged logits


Answer = TypeVar("Answer")


class Photos(ABC, Generic[Answer]):
    """A model that is run on photos, in evaluation mode and without gradients, and read."""

    def __init__(self, model: nn.Module, inputs: PhotoInput, device: torch.device) -> None:
        self.model, self.inputs, self.device = model.eval(), inputs, device

    @torch.no_grad()
    def run(self, image: Image) -> Any:
        """What the model returns."""
        return default_forward(self.model, moved(self.inputs(image), self.device))

    @abstractmethod
    def read(self, out: Any, size: tuple[int, int]) -> Answer:
        """What an output says about a photo of this width and height."""

    def __call__(self, image: Image) -> Answer:
        return self.read(self.run(image), image.size)


class Finder(Photos[Detections]):
    """Detections of a photo: category ids in place of classes, boxes in its pixels.

    Args:
        ids: category id of each of the model's classes, -1 for one that the data do not have: it is not counted.
        masks: also encode masks.

    Raises (when called):
        InputError: a model that returns no detections, or no masks although they are asked for.
    """

    def __init__(
        self, model: nn.Module, inputs: PhotoInput, device: torch.device, ids: list[int], masks: bool = False
    ) -> None:
        super().__init__(model, inputs, device)
        self.ids, self.masks = torch.tensor(ids), masks

    def read(self, out: Any, size: tuple[int, int]) -> Detections:
        if isinstance(out, list) and out and {"boxes", "labels", "scores"} <= set(out[0]):
            found = {key: value.detach().cpu() for key, value in out[0].items()}
            classes = found["labels"] - 1
            boxes, scores, masks = found["boxes"], found["scores"], found.get("masks")
        elif hasattr(out, "pred_boxes") and hasattr(out, "logits"):
            boxes, scores, classes = self._of_queries(out.logits[0].cpu(), out.pred_boxes[0].cpu(), size)
            masks = None
        else:
            raise InputError(
                f"{type(self.model).__name__} returns {type(out).__name__}, in which no detections were found. A "
                "detector returns a list of boxes, labels and scores, or logits and pred_boxes; wrap yours."
            )
        if self.masks and masks is None:
            raise InputError(f"{type(self.model).__name__} returns no masks; evaluate boxes (task detect).")
        labels = torch.where(
            (classes >= 0) & (classes < len(self.ids)), self.ids[classes.clamp(0, len(self.ids) - 1)], -1
        )
        known = labels >= 0
        codes = encode_masks(masks[known, 0] >= 0.5) if self.masks and masks is not None else None
        return Detections(boxes[known].float(), scores[known].float(), labels[known], codes)

    def _of_queries(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """(boxes in pixels, scores, classes) of (n, K or K + 1) logits and (n, 4) boxes."""
        if logits.shape[1] == len(self.ids) + 1:
            scores, classes = logits.float().softmax(1)[:, :-1].max(1)
        else:
            scores, chosen = logits.float().sigmoid().flatten().topk(len(boxes))
            classes, boxes = chosen % logits.shape[1], boxes[chosen // logits.shape[1]]
        centre, half = boxes[:, :2].float(), boxes[:, 2:].float() / 2
        return torch.cat([centre - half, centre + half], 1) * torch.tensor([*size, *size]), scores, classes


class Segmenter(Photos[Tensor]):
    """The class of each pixel of a photo, (H, W)."""

    def read(self, out: Any, size: tuple[int, int]) -> Tensor:
        return largest(self.logits(out), (size[1], size[0]))

    @staticmethod
    def logits(out: Any) -> Tensor:
        """(C, h, w) of what a segmenter returns.

        Raises:
            InputError: no such logits.
        """
        found = out.get("out", out.get("logits")) if isinstance(out, Mapping) else getattr(out, "logits", out)
        if isinstance(found, Tensor) and found.ndim == 4 and len(found) == 1:
            return found[0].float()
        raise InputError(f"the model returns {type(out).__name__}; a segmenter returns logits (1, classes, h, w).")


def reader_of(model: nn.Module, inputs: PhotoInput, device: torch.device, photo: Image) -> Finder | Segmenter:
    """What reads this model's outputs, judging by what it returns for a photo; with classes as category ids.

    Raises:
        InputError: neither detections nor logits of pixels.
    """
    segmenter = Segmenter(model, inputs, device)
    out = segmenter.run(photo)
    if isinstance(out, list) or hasattr(out, "pred_boxes"):
        return Finder(model, inputs, device, every_class(model))
    Segmenter.logits(out)
    return segmenter


def largest(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) the class of the largest of (C, h, w) logits, enlarged a few classes at a time."""
    best = torch.full(size, -torch.inf, device=logits.device)
    classes = torch.zeros(size, dtype=torch.long, device=logits.device)
    for start, some in enumerate_pieces(logits, max(1, ENLARGED // (size[0] * size[1]))):
        value, at = F.interpolate(some[None], size, mode="bilinear", align_corners=False)[0].max(0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, at + start, classes)
    return classes


def enumerate_pieces(x: Tensor, size: int) -> list[tuple[int, Tensor]]:
    """(number of its first, piece) of pieces along the first dimension."""
    return [(start, x[start : start + size]) for start in range(0, len(x), size)]


def category_ids(model: nn.Module, categories: Mapping[int, str]) -> list[int]:
    """Category id of each class of a detector, in its order; -1 for a class that the data do not have.

    Raises:
        DataError: which class is which cannot be told.
        InputError: how many classes the model tells apart is not known.
    """
    config = getattr(model, "config", None)
    if config is None:
        return match_categories(categories, _torchvision_classes(model))
    names = {int(number): str(name) for number, name in config.id2label.items()}
    named = not all(name.startswith("LABEL_") for name in names.values())
    if named or len(names) == len(categories):
        return match_categories(categories, len(names), names if named else None)
    return [-1, *match_categories(categories, len(names) - 1)]  # COCO's 91 classes begin with 0, which nothing has


def every_class(model: nn.Module) -> list[int]:
    """The model's own classes as category ids, where there are no data to match them with.

    Raises:
        InputError: how many classes the model tells apart is not known.
    """
    config = getattr(model, "config", None)
    return list(range(_torchvision_classes(model) if config is None else len(config.id2label)))


def _torchvision_classes(model: nn.Module) -> int:
    """How many there are without background."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    count = getattr(getattr(predictor, "cls_score", None), "out_features", None)
    if count is None:
        count = getattr(getattr(getattr(model, "head", None), "classification_head", None), "num_classes", None)
    if not isinstance(count, int):
        raise InputError(f"how many classes {type(model).__name__} tells apart is not known; wrap it in a known one.")
    return count - 1
