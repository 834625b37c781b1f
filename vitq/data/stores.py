"""Where images are kept: files, tensors, PIL images. ImageSet reads them through one small interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitq.core.errors import DataError
from vitq.data.decode import ADVICE

Item = Any  # encoded bytes, a float tensor (C, H, W) already preprocessed, or a PIL image
Thunk = Callable[[], Item]


class Store(Protocol):
    """All images of one place, in a fixed order.

    Attributes:
        where: the place, for messages.
        ids: one name per image, unique.
        labels: (N,) int64, or None.
    """

    where: str
    ids: list[str]
    labels: Tensor | None

    def thunks(self, indices: Sequence[int]) -> Iterator[Thunk]:
        """For each index, in order, a function that gives the item; may run in a worker thread."""

    def one(self, index: int) -> Thunk:
        """The same for one index, when many are asked for in any order."""


class FileStore:
    """Image files, read when asked for."""

    def __init__(self, where: str, paths: list[Path], ids: list[str], labels: Tensor | None) -> None:
        self.where, self.paths, self.ids, self.labels = where, paths, ids, labels

    def thunks(self, indices: Sequence[int]) -> Iterator[Thunk]:
        return map(self.one, indices)

    def one(self, index: int) -> Thunk:
        return partial(_read, self.paths[index], self.ids[index])

    def files(self, indices: Sequence[int]) -> Iterator[Callable[[], Path]]:
        """As thunks, with the path in place of the bytes."""
        for index in indices:
            yield partial(Path, self.paths[index])


class ItemStore:
    """Tensors or PIL images that are in memory already."""

    def __init__(self, where: str, items: Sequence[Item], ids: list[str], labels: Tensor | None) -> None:
        self.where, self.items, self.ids, self.labels = where, items, ids, labels

    def thunks(self, indices: Sequence[int]) -> Iterator[Thunk]:
        return map(self.one, indices)

    def one(self, index: int) -> Thunk:
        return partial(self.items.__getitem__, index)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {name!r} cannot be read ({error.strerror}). {ADVICE}") from error


def tensor_store(images: Tensor, labels: Tensor | None, where: str) -> ItemStore:
    """A store of preprocessed images (N, C, H, W).

    Raises:
        DataError: wrong rank, no images, whole numbers, NaN or Inf.
    """
    if images.ndim != 4:
        raise DataError(
            f"{where}: images have shape {tuple(images.shape)}, expected (N, C, H, W). "
            "Add the missing dimension, for example with images.unsqueeze(0)."
        )
    if len(images) == 0:
        raise DataError(f"{where}: no images (N is 0). Give at least one.")
    if not images.is_floating_point():
        raise DataError(
            f"{where}: images are {images.dtype}, and tensors must be preprocessed floats. "
            "Normalize them as the model expects, or give image files."
        )
    images = images.detach().to("cpu", torch.float32)
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{where}: NaN or Inf in {len(bad)} of {len(images)} images, the first is number {bad[0]}. "
            "Leave them out or correct how they are made."
        )
    ids = [f"tensor-{index}" for index in range(len(images))]
    return ItemStore(where, images.unbind(), ids, labels)


def batches_store(batches: Iterable[Any]) -> ItemStore:
    """A store of what an iterable yields; all of it is kept in memory, so give a subset of a large one.

    An element is a tensor (N, C, H, W) or one image (C, H, W), a tuple (images, labels), a dict with
    'pixel_values' or 'image' (or 'images', 'img') and 'labels' or 'label', or a PIL image.
    """
    where = f"the {type(batches).__name__} given as data"
    images: list[Any] = []
    labels: list[Tensor | None] = []
    for number, batch in enumerate(batches):
        found, label = _split(batch, f"{where}, element {number}")
        if not isinstance(found, Tensor):
            images.append(found)
            labels.append(None if label is None else _whole(label, where).reshape(1))
            continue
        found = found.unsqueeze(0) if found.ndim == 3 else found
        label = None if label is None else _whole(label, where).reshape(-1)
        if label is not None and len(label) != len(found):
            raise DataError(f"{where}, element {number}: {len(found)} images and {len(label)} labels.")
        images.append(found)
        labels.append(label)
    if not images:
        raise DataError(f"{where}: yields nothing. An iterator that was used up before is empty.")
    kinds = {isinstance(image, Tensor) for image in images}
    if len(kinds) > 1 or len({label is None for label in labels}) > 1:
        raise DataError(f"{where}: elements differ in kind. Give tensors or PIL images, all or none with labels.")
    joined = None if labels[0] is None else torch.cat([label for label in labels if label is not None])
    if kinds == {False}:
        return ItemStore(where, images, [f"image-{index}" for index in range(len(images))], joined)
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise DataError(f"{where}: images of different shapes {sorted(shapes)}. Resize them to one.")
    return tensor_store(torch.cat(images), joined, where)


def _split(batch: Any, where: str) -> tuple[Any, Any]:
    """(images or one image, labels or None) of one element."""
    if isinstance(batch, Mapping):
        image = next((batch[k] for k in ("pixel_values", "image", "images", "img") if k in batch), None)
        label = next((batch[k] for k in ("labels", "label") if k in batch), None)
    elif isinstance(batch, tuple | list) and 1 <= len(batch) <= 2:
        image, label = (*batch, None)[:2]
    else:
        image, label = batch, None
    if isinstance(image, Tensor) or (hasattr(image, "convert") and hasattr(image, "tobytes")):
        return image, label
    raise DataError(
        f"{where}: a {type(batch).__name__} without images. Expected a tensor, (images, labels), a dict "
        "with 'pixel_values' or 'image', or a PIL image."
    )


def _whole(label: Any, where: str) -> Tensor:
    values = torch.as_tensor(label)
    if values.is_floating_point() or values.is_complex():
        raise DataError(f"{where}: labels are {values.dtype}, expected whole numbers (class indices).")
    return values.detach().to("cpu", torch.int64)
