"""Photos and their semantic masks: two folders, files of the same name before the dot.

Shapes:  labels (H, W) int64, the class of each pixel; 255 is left out by convention
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import DataError
from vitq.data.checkpoint import some
from vitq.data.folder import open_folder
from vitq.data.images import ImageSet
from vitq.data.stores import FileStore

if TYPE_CHECKING:
    from PIL.Image import Image

INDEXED = ("L", "P", "I", "I;16", "1")


@dataclass(frozen=True)
class SemanticSet:
    """Photos with the class of each pixel, read one by one when asked for."""

    where: str
    files: ImageSet
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.masks)

    def subset(self, positions: list[int]) -> SemanticSet:
        """The photos at these positions, in this order."""
        return SemanticSet(self.where, self.files.subset(positions), tuple(self.masks[i] for i in positions))

    def __iter__(self) -> Iterator[tuple[str, Image, Tensor]]:
        """(name, upright RGB image, labels) one after the other.

        Raises:
            DataError: a file that cannot be read, a mask in colours, or of another size than its image.
        """
        for position in range(len(self)):
            image = self.files.photo(position)
            yield self.files.ids[position], image, self.labels(position, image)

    def labels(self, position: int, image: Image) -> Tensor:
        """(H, W) of the photo at this position.

        Raises:
            DataError: as above.
        """
        path = self.masks[position]
        labels = read_mask(path)
        if labels.shape != (image.height, image.width):
            raise DataError(
                f"{path} is {labels.shape[1]} x {labels.shape[0]} pixels and its image {image.width} x "
                f"{image.height} (upright). Give masks of the size of the images."
            )
        return labels


def open_semantic(masks: str | Path, folder: str | Path) -> SemanticSet:
    """Pair the masks of one folder with the images of another; images without a mask are left out.

    Raises:
        DataError: no such folder, no masks, masks without an image, or two images of one name.
    """
    masks, folder = Path(masks), Path(folder)
    for path in (masks, folder):
        if not path.is_dir():
            raise DataError(f"no folder {str(path)!r}. Give a folder of masks (--data) and one of images (--images).")
    found = sorted(path for path in masks.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith("."))
    if not found:
        raise DataError(f"no .png masks in {str(masks)!r}. Each has its image's name and a class per pixel.")
    store = open_folder(folder, "none", None)
    by_stem: dict[str, int] = {}
    for number, name in enumerate(store.ids):
        stem = Path(name).stem
        if stem in by_stem:
            raise DataError(f"{str(folder)!r} holds two images named {stem!r}, so which one a mask is for is unclear.")
        by_stem[stem] = number
    lone = [path.name for path in found if path.stem not in by_stem]
    if lone:
        raise DataError(f"{len(lone)} of {len(found)} masks have no image in {str(folder)!r}: {some(lone)}.")
    chosen = [by_stem[path.stem] for path in found]
    names = [store.ids[i] for i in chosen]
    return SemanticSet(
        str(masks), ImageSet(FileStore(store.where, [store.paths[i] for i in chosen], names, None)), tuple(found)
    )


def read_mask(path: Path) -> Tensor:
    """(H, W) int64 of a PNG with a class per pixel.

    Raises:
        DataError: it cannot be read, or holds colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in INDEXED:
                raise DataError(f"mask {path} holds colours ({image.mode}). Save the class of each pixel instead.")
            return torch.from_numpy(np.array(image).astype(np.int64))
    except (OSError, SyntaxError) as error:
        raise DataError(f"mask {path} cannot be read ({type(error).__name__}). Repair or remove it.") from error
