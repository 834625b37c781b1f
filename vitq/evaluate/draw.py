"""Predictions drawn on photos, one model beside the other."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitq.evaluate.detections import Detections

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 0.5  # scores from here on are drawn
OPACITY = 0.5  # of masks
TITLE = 14  # pixels
GOLDEN = 0.618034  # hues that far apart differ for any number of classes


def colour(label: int) -> tuple[int, int, int]:
    """The same for a class everywhere."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image, found: Detections, names: Mapping[int, str], least: float = SHOWN) -> Image:
    """A copy of an RGB photo with boxes, classes and masks of detections from this score on."""
    from PIL import Image, ImageDraw

    shown = (found.scores >= least).nonzero().flatten().tolist()
    pixels = np.asarray(image).astype(np.float32)
    for n in shown if found.masks is not None else []:
        from faster_coco_eval.core import mask

        assert found.masks is not None
        inside = mask.decode(found.masks[n]).astype(bool)
        pixels[inside] += OPACITY * (np.array(colour(int(found.labels[n]))) - pixels[inside])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for n in shown:
        left, top, right, bottom = (float(v) for v in found.boxes[n])
        label = int(found.labels[n])
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour(label), width=2)
        pen.text((left + 3, top + 1), f"{names.get(label, label)} {float(found.scores[n]):.2f}", fill=colour(label))
    return drawn


def draw_classes(image: Image, classes: Tensor) -> Image:
    """A copy of an RGB photo with the class (H, W) of each pixel over it."""
    from PIL import Image

    known, at = torch.unique(classes.cpu(), return_inverse=True)
    paint = np.array([colour(int(label)) for label in known], np.float32)[at.numpy()]
    return Image.fromarray(((1 - OPACITY) * np.asarray(image) + OPACITY * paint).round().astype(np.uint8))


def save_beside(path: Path, drawn: Mapping[str, Image]) -> None:
    """Write pictures of one size side by side, each under its name, to a PNG."""
    from PIL import Image, ImageDraw

    first = next(iter(drawn.values()))
    sheet = Image.new("RGB", (first.width * len(drawn), first.height + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, picture) in enumerate(drawn.items()):
        sheet.paste(picture, (number * first.width, TITLE))
        pen.text((number * first.width + 3, 1), name, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
