"""Procedural scenes: items of Fashion-MNIST, scaled, tinted and overlapping, on textured noise, with boxes and masks.

Shapes:  image (S, S, 3) uint8    masks (n, S, S) bool, of what is seen of each item    labels (n,) from 0
         classes (S, S) uint8: 0 where there is no item, else label + 1
A scene depends on its seed and on the items alone: nothing is stored but the items that come with vitq.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq.core.errors import UnknownNameError
from vitq.data.stores import ItemStore
from vitq.data.zoo.fashion import CLASSES, stored_arrays

Array = NDArray[Any]
SIZE = 128
MOST = 5  # items of a scene
SCALES = (0.9, 2.2)  # of an item's 28 pixels
OPAQUE = 40  # grey levels from here on belong to an item; darker ones are its background
VISIBLE = 0.35  # of an item that is less seen than this, nothing is left
SETS = {
    "scenes_calib": ("fashion_calib", 0, 300),
    "scenes_test": ("fashion_test", 1_000_003, 200),
}  # items, seed, count
OCTAVES = (4, 16, 64)  # cells of the background's noise along a side


@dataclass(frozen=True)
class Scene:
    """One image and what is in it, the item in front last."""

    image: Array
    masks: Array
    labels: Array

    @property
    def boxes(self) -> Array:
        """(n, 4) left, top, right, bottom in pixels around what is seen."""
        found = []
        for mask in self.masks:
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            found.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return np.array(found, np.float32).reshape(-1, 4)

    @property
    def classes(self) -> Array:
        """(S, S) class of each pixel."""
        painted = np.zeros(self.image.shape[:2], np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            painted[mask] = label + 1
        return painted


class Scenes:
    """Scenes by number, each from the seed and its number alone.

    Args:
        items: grey images (N, 28, 28) uint8 and their labels (N,), or the name of an embedded set.
        seed: of all of them.
        size: height and width in pixels.
        most: items of a scene.
    """

    def __init__(
        self, items: str | tuple[Array, Array] = "fashion_calib", seed: int = 0, size: int = SIZE, most: int = MOST
    ) -> None:
        if isinstance(items, str):
            stored = stored_arrays(items)
            items = stored["images"], stored["labels"]
        self.items, self.labels = items
        self.seed, self.size, self.most = seed, size, most

    def __getitem__(self, number: int) -> Scene:
        draw = np.random.default_rng([self.seed, number])
        image = _texture(draw, self.size)
        placed: list[tuple[Array, int]] = []
        for _ in range(int(draw.integers(1, self.most + 1))):
            which = int(draw.integers(len(self.items)))
            inside = _paste(image, self.items[which], draw)
            placed.append((inside, int(self.labels[which])))
        seen, masks, labels = np.zeros(image.shape[:2], bool), [], []
        for inside, label in reversed(placed):  # the one in front first
            left = inside & ~seen
            if left.sum() >= VISIBLE * inside.sum() > 0:
                masks.append(left)
                labels.append(label)
            seen |= inside
        stack = np.stack(masks[::-1]) if masks else np.zeros((0, self.size, self.size), bool)
        return Scene(image.round().astype(np.uint8), stack, np.array(labels[::-1], np.int64))


def scene_set(name: str) -> tuple[Scenes, int]:
    """A set that comes with vitq, and of how many scenes.

    Raises:
        UnknownNameError: no such set.
    """
    if name not in SETS:
        raise UnknownNameError("zoo scenes", name, list(SETS))
    items, seed, count = SETS[name]
    return Scenes(items, seed), count


def scene_store(name: str) -> ItemStore:
    """The photos of a set, for calibration: what is in them is in the files of write_scenes.

    Raises:
        UnknownNameError: no such set.
    """
    from PIL import Image

    scenes, count = scene_set(name)
    items = [Image.fromarray(scenes[number].image) for number in range(count)]
    return ItemStore(f"zoo:{name}", items, [f"{number:05}.png" for number in range(count)], None)


def write_scenes(folder: Path, scenes: Scenes, count: int) -> None:
    """The first scenes as files: photos/, truth.json in COCO's format, and masks/ with the class of each pixel.

    Category ids are labels + 1, as are the classes of pixels.
    """
    from PIL import Image

    images, objects = [], []
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene, file = scenes[number], f"{number:05}.png"
        Image.fromarray(scene.image).save(folder / "photos" / file)
        Image.fromarray(scene.classes).save(folder / "masks" / file)
        images.append({"id": number, "file_name": file, "width": scenes.size, "height": scenes.size})
        objects += [_annotation(*each, number) for each in zip(scene.masks, scene.labels, scene.boxes, strict=True)]
    for number, each in enumerate(objects, 1):
        each["id"] = number
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    truth = {"images": images, "annotations": objects, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")


def _annotation(mask: Array, label: int, box: Array, image: int) -> dict[str, Any]:
    left, top, right, bottom = (float(v) for v in box)
    return {
        "image_id": image,
        "category_id": int(label) + 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": _runs(mask)},
    }


def _runs(mask: Array) -> list[int]:
    """Lengths of runs of 0 and 1 in turn, column by column, beginning with 0: COCO's uncompressed code."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return [int(n) for n in np.diff(np.concatenate([[0], changes]))]


def _texture(draw: np.random.Generator, size: int) -> Array:
    """(S, S, 3) float: noise of several grains around a colour."""
    from PIL import Image

    image = np.empty((size, size, 3), np.float64)
    image[:] = draw.uniform(40, 150, 3)
    for cells in OCTAVES:
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        grain = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        image += (grain - 127.5) * draw.uniform(0.05, 0.25)
    return image.clip(0, 255)


def _paste(image: Array, item: Array, draw: np.random.Generator) -> Array:
    """Put an item somewhere into the image, in place.

    Returns:
        (S, S) bool: where it is.
    """
    from PIL import Image

    size, side = len(image), round(len(item) * float(draw.uniform(*SCALES)))
    grey = np.asarray(Image.fromarray(item).resize((side, side), Image.Resampling.BILINEAR))
    grey = grey[:, ::-1] if draw.random() < 0.5 else grey
    top, left = (int(v) for v in draw.integers(0, size - side + 1, 2))
    inside = np.zeros((size, size), bool)
    inside[top : top + side, left : left + side] = opaque = grey >= OPAQUE
    tint = draw.uniform(0.45, 1.0, 3)
    image[inside] = grey[opaque][:, None] * tint
    return inside
