"""Photos with objects in them: COCO's JSON and a folder of images, checked before anything long is begun.

Shapes:  box  x, y, width, height in pixels, as the JSON has it; (0, 0) is the corner of the first pixel
Source:  data format, cocodataset.org, "Data format", object detection
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitq.core.errors import DataError
from vitq.data.checkpoint import some
from vitq.data.images import ImageSet
from vitq.data.stores import FileStore

if TYPE_CHECKING:
    from PIL.Image import Image

OVERHANG = 1.0  # pixels that a box may reach over the border: annotations are rounded


@dataclass(frozen=True)
class Photo:
    """One image and its objects.

    Attributes:
        id: the JSON's own number.
        file: its path below the folder.
        width, height: pixels, upright.
        objects: annotations as the JSON has them, boxes clipped to the image.
    """

    id: int
    file: str
    width: int
    height: int
    objects: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class CocoSet:
    """Annotated photos, read one by one when asked for.

    Attributes:
        where: the JSON, for messages.
        photos: in the JSON's order.
        categories: id -> name, by id.
        files: the images, aligned with photos.
        notes: what was handled rather than refused.
    """

    where: str
    photos: tuple[Photo, ...]
    categories: dict[int, str]
    files: ImageSet
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.photos)

    def image(self, position: int) -> Image:
        """A photo: RGB, turned upright as the camera says.

        Raises:
            DataError: it cannot be read, or has another size than the JSON says.
        """
        image, photo = self.files.photo(position), self.photos[position]
        if image.size != (photo.width, photo.height):
            raise DataError(
                f"{self.where}: {photo.file!r} is {image.width} x {image.height} pixels (upright) and the annotations "
                f"are for {photo.width} x {photo.height}. Give the files that were annotated."
            )
        return image

    def subset(self, positions: Sequence[int]) -> CocoSet:
        """The photos at these positions, in this order."""
        return replace(self, photos=tuple(self.photos[i] for i in positions), files=self.files.subset(positions))

    def truth(self) -> dict[str, Any]:
        """The same as COCO's JSON, annotations numbered anew."""
        objects = [(photo, each) for photo in self.photos for each in photo.objects]
        return {
            "images": [{"id": p.id, "file_name": p.file, "width": p.width, "height": p.height} for p in self.photos],
            "categories": [{"id": number, "name": name} for number, name in self.categories.items()],
            "annotations": [each | {"id": n, "image_id": p.id} for n, (p, each) in enumerate(objects, 1)],
        }


def open_coco(path: str | Path, folder: str | Path, *, masks: bool = False) -> CocoSet:
    """Read COCO's JSON and find its images.

    Images without objects stay: what is found there is wrong. Crowd regions stay, too, and AP ignores what is found in
    them. Boxes are clipped to their image; objects without area, or of a category that is not listed, are left out (as
    pycocotools has it); `notes` says how many.

    Args:
        masks: every object must have a segmentation.

    Raises:
        DataError: no such file, not COCO's JSON, no objects at all, references to images that are not there, boxes that
            are no boxes or lie beside their image, missing segmentations or files.
    """
    path, folder = Path(path), Path(folder)
    data = _read(path)
    categories = {_whole(c, "id", path): str(c.get("name", c["id"])) for c in data["categories"]}
    photos = [_photo(image, path) for image in data["images"]]
    by_id = {photo.id: photo for photo in photos}
    if len(by_id) < len(photos):
        raise DataError(f"{path}: two images have the same id. Give every image its own.")
    if not data["annotations"]:
        raise DataError(f"{path} holds no annotations, so there is nothing to find. Is it the file without labels?")
    objects, notes = _objects(data["annotations"], by_id, categories, path, masks)
    found = [replace(photo, objects=tuple(objects.get(photo.id, ()))) for photo in photos]
    return CocoSet(str(path), tuple(found), dict(sorted(categories.items())), _files(found, folder, path), notes)


def match_categories(categories: Mapping[int, str], classes: int, names: Mapping[int, str] | None = None) -> list[int]:
    """Category id of each class of a model, in the order of its classes; -1 for one that the data do not have.

    By name where the model has names and all categories are among them; else one class per category, by rank; else the
    category's id is the class (COCO's own models: 91 classes for 80 categories).

    Args:
        classes: that the model tells apart, background not counted where that is class 0 ("first" below).
        names: class -> name.

    Raises:
        DataError: none of these fits.
    """
    if names:
        ids = {name.lower(): number for number, name in categories.items()}
        known = {c: ids.get(name.lower(), -1) for c, name in names.items()}
        if set(known.values()) - {-1} == set(categories):
            return [known.get(c, -1) for c in range(classes)]
    if classes == len(categories):
        return sorted(categories)
    if max(categories) <= classes:
        return [number if number in categories else -1 for number in range(1, classes + 1)]
    raise DataError(
        f"the data have {len(categories)} categories with ids up to {max(categories)} ({some(categories.values())}), "
        f"and the model tells {classes} classes apart: which is which? Give annotations of what it was trained on."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path of the annotations.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Give COCO's annotations.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}. Give annotations of COCO's format for objects.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise DataError(f"{path} has no list of {key!r}. Give annotations of COCO's format for objects.")
    for key in ("images", "categories"):
        if not data[key]:
            raise DataError(f"{path}: the list of {key!r} is empty. Is it the right file?")
    return data


def _photo(image: Any, path: Path) -> Photo:
    number, file = _whole(image, "id", path), image.get("file_name")
    width, height = _whole(image, "width", path), _whole(image, "height", path)
    if not isinstance(file, str) or not file or min(width, height) < 1:
        raise DataError(f"{path}: image {number} has no file_name, or no size. Write both.")
    return Photo(number, file, width, height)


def _whole(entry: Any, key: str, path: Path) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{path}: {key!r} is missing or no whole number in {str(entry)[:80]}.")
    return value


def _objects(
    annotations: list[Any], photos: dict[int, Photo], categories: dict[int, str], path: Path, masks: bool
) -> tuple[dict[int, list[dict[str, Any]]], tuple[str, ...]]:
    found: dict[int, list[dict[str, Any]]] = {}
    empty = clipped = foreign = 0
    for number, entry in enumerate(annotations):
        where = f"{path}: annotation {entry.get('id', number) if isinstance(entry, dict) else number}"
        image, category = _whole(entry, "image_id", path), _whole(entry, "category_id", path)
        if image not in photos:
            raise DataError(f"{where} is about image {image}, which the list of images does not have.")
        if category not in categories:
            foreign += 1
            continue
        box, photo = _box(entry, where), photos[image]
        if masks and not entry.get("segmentation"):
            raise DataError(f"{where} has no segmentation. Give instances, or evaluate boxes (task detect).")
        if min(box[2:]) <= 0:
            empty += 1
            continue
        inside = _clipped(box, photo)
        if min(inside[2:]) <= 0:
            raise DataError(
                f"{where}: box {box} lies beside {photo.file!r}, which is {photo.width} x {photo.height} pixels. "
                "Boxes are x, y, width, height in pixels of the upright image."
            )
        clipped += inside != box
        area = entry.get("area", inside[2] * inside[3])
        kept = {"category_id": category, "bbox": inside, "area": area, "iscrowd": int(bool(entry.get("iscrowd", 0)))}
        found.setdefault(image, []).append(kept | ({"segmentation": entry["segmentation"]} if masks else {}))
    if not found:
        raise DataError(f"{path}: no annotation has a listed category and a box with an area. Is it the right file?")
    unlisted = "objects are of categories that are not in the list of categories, and are left out"
    notes = [
        (foreign, unlisted),
        (empty, "boxes without area are left out"),
        (clipped, "boxes reach over the border and are clipped"),
    ]
    return found, tuple(f"{path}: {count} {what}" for count, what in notes if count)


def _box(entry: dict[str, Any], where: str) -> list[float]:
    box = entry.get("bbox")
    good = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    if not good:
        raise DataError(f"{where}: bbox is {str(box)[:60]}, expected [x, y, width, height] in pixels.")
    return [float(v) for v in box]  # type: ignore[union-attr]


def _clipped(box: list[float], photo: Photo) -> list[float]:
    """The part of a box that lies in its image; one that reaches over by a rounding stays as it is."""
    x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    over = max(-x, -y, right - photo.width, bottom - photo.height)
    if over <= OVERHANG:
        return box
    left, top = max(x, 0.0), max(y, 0.0)
    return [left, top, min(right, photo.width) - left, min(bottom, photo.height) - top]


def _files(photos: list[Photo], folder: Path, path: Path) -> ImageSet:
    if not folder.is_dir():
        raise DataError(f"no folder {str(folder)!r} of images. Name the one that the files of {path.name} are in.")
    missing = [photo.file for photo in photos if not (folder / photo.file).is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(photos)} images are missing in {str(folder)!r}: {some(missing)}. "
            "Name the folder that their file_name is relative to."
        )
    names = [photo.file for photo in photos]
    return ImageSet(FileStore(str(folder), [folder / name for name in names], names, None))
