"""How close a quantized detector or segmenter is to its float model, output by output, without labels.

Units:  SQNR in dB; shares in percent
Found:  of the float model's detections from a score of SHOWN on, those for which the quantized model has one of the
        same class that overlaps it by half, each taken once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitq.evaluate.detections import Detections
from vitq.evaluate.draw import SHOWN
from vitq.evaluate.fidelity import Power
from vitq.evaluate.finders import Photos
from vitq.evaluate.matches import match
from vitq.evaluate.metrics import rounded

LEVELS = "backbone"  # the module whose outputs are a detector's pyramid, in torchvision and transformers alike
LEAST_OVERLAP = 0.5


@dataclass(frozen=True)
class Watched:
    """What a model returned for a photo, and the levels of its backbone."""

    out: Any
    levels: dict[str, Any]


def watched(photos: Photos[Any], image: Any) -> Watched:
    """Run a model on a photo."""
    levels: dict[str, Any] = {}
    with _watching(photos.model, levels):
        return Watched(photos.run(image), levels)


class OutputFidelity:
    """Gathers signal and noise of every output that both models give in the same shape, image by image.

    Attributes:
        images: how many so far.
    """

    def __init__(self) -> None:
        self.images = 0
        self._powers: dict[str, Power] = {}

    def outputs(self, reference: Photos[Any], quantized: Photos[Any], image: Any) -> tuple[Any, Any]:
        """Run both on a photo, compare, and give back what each returned."""
        expected, found = watched(reference, image), watched(quantized, image)
        self.compare(expected, found)
        return expected.out, found.out

    def compare(self, expected: Watched, found: Watched) -> None:
        """Take in what both models made of a photo."""
        self.images += 1
        there = dict(tensors({"": expected.out, **expected.levels}))
        for name, tensor in tensors({"": found.out, **found.levels}):
            wanted = there.get(name)
            if wanted is not None and wanted.shape == tensor.shape and tensor.numel():
                self._powers.setdefault(name, Power()).add(wanted, tensor)

    def sqnr(self) -> dict[str, float]:
        """By output and level."""
        return {name: power.sqnr for name, power in self._powers.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        told = [{"output": name, "sqnr": rounded(value)} for name, value in self.sqnr().items()]
        return {"images": self.images, "outputs": told}


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, float tensor) of nested outputs. Lists of found things are left out: their order is that of scores."""
    if isinstance(tree, Tensor) and tree.is_floating_point():
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}".strip("."))
    elif isinstance(tree, tuple):
        for key, value in enumerate(tree):
            yield from tensors(value, f"{name}.{key}".strip("."))


def found_again(expected: Sequence[Detections], found: Sequence[Detections]) -> dict[str, Any]:
    """Shares of the float model's detections that the quantized one has, and the other way round."""
    kept = total = other = 0
    for a, b in zip(expected, found, strict=True):
        first, second = _shown(a), _shown(b)
        total, other = total + len(first.scores), other + len(second.scores)
        for label in first.labels.unique():
            here, there = (each.boxes[each.labels == label] for each in (first, second))
            if len(there):
                overlaps = iou(there, here).numpy()
                hit, _ = match(overlaps, np.zeros(len(here), bool), len(there))
                kept += int(hit[0].sum())  # the first threshold is LEAST_OVERLAP
    return {
        "detections_float": total,
        "detections": other,
        "found_again": rounded(100 * kept / total) if total else None,
        "also_in_float": rounded(100 * kept / other) if other else None,
    }


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) overlap of (n, 4) and (m, 4) corner boxes."""
    from torchvision.ops import box_iou

    overlap: Tensor = box_iou(a.double(), b.double())
    return overlap.nan_to_num()


def _shown(found: Detections) -> Detections:
    """Those from SHOWN on, best first."""
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.scores[order] >= SHOWN]
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


@contextmanager
def _watching(model: nn.Module, levels: dict[str, Any]) -> Iterator[None]:
    try:
        module = model.get_submodule(LEVELS)
    except AttributeError:
        yield
        return
    handle = module.register_forward_hook(lambda module, args, out: levels.update({LEVELS: out}))
    try:
        yield
    finally:
        handle.remove()
