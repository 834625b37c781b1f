"""Images of any kind behind one type: what calibration and evaluation read.

Shapes:  Batch.images (B, C, H, W) float32, preprocessed    Batch.labels (B,) int64
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import DataError, InputError
from vitq.data.checkpoint import some
from vitq.data.decode import EXTENSIONS, decode, digest, to_rgb, verify
from vitq.data.folder import open_folder, open_list
from vitq.data.parquet import open_parquet
from vitq.data.preprocess import Preprocess
from vitq.data.stores import FileStore, Item, Store, Thunk, batches_store, tensor_store
from vitq.data.zoo import zoo_store

if TYPE_CHECKING:
    from PIL.Image import Image

DECODERS = 2  # threads; decoding is a small part of a forward pass
LOOK_AHEAD = 16  # images decoded ahead of the reader, so that memory stays flat
ZOO = "zoo:"


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), their labels (B,) or None, and their ids."""

    images: Tensor
    labels: Tensor | None
    ids: list[str]


class ImageSet:
    """An ordered choice of the images of one place.

    Attributes:
        where: the place, for messages.
        ids: one name per image: its path relative to the place, row-000000 or tensor-0.
        labels: (N,) int64, or None.
        skipped: ids of the unreadable images that the last batches(skip_bad=True) left out.
    """

    def __init__(self, store: Store, indices: Sequence[int] | None = None, *, labelled: bool = True) -> None:
        self._store, self._labelled = store, labelled
        self._indices = list(range(len(store.ids))) if indices is None else list(indices)
        self.where = store.where
        self.ids = [store.ids[index] for index in self._indices]
        labels = store.labels if labelled else None
        self.labels = None if labels is None else labels[torch.tensor(self._indices).long()]
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        kind = "unlabelled" if self.labels is None else "labelled"
        return f"ImageSet({len(self)} {kind} images of {self.where})"

    def digests(self, indices: Sequence[int] | None = None) -> list[str]:
        """sha256, as hex, of each image: of the encoded file, or of the tensor's bytes.

        Raises:
            DataError: a file that cannot be read.
        """
        chosen = self._indices if indices is None else [self._indices[index] for index in indices]
        return [digest(thunk()) for thunk in self._store.thunks(chosen)]

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at these positions, in this order."""
        return ImageSet(self._store, [self._indices[index] for index in indices], labelled=self._labelled)

    def sample(self, count: int, seed: int) -> ImageSet:
        """The first count images of a permutation that depends on seed and on len(self) only.

        Raises:
            DataError: fewer images than asked.
        """
        if count < 1:
            raise InputError(f"asked for {count} images, expected at least 1.")
        if count > len(self):
            raise DataError(f"asked {count}, found {len(self)} in {self.where}. Ask for fewer images or add some.")
        return self.subset(np.random.default_rng(seed).permutation(len(self))[:count].tolist())

    def check(self, sample: int | None = None) -> None:
        """Open every image, or about sample of them evenly spread, without decoding pixels.

        Finds missing, empty and foreign files before long work; a file cut off late may pass.

        Raises:
            DataError: naming the first files that cannot be opened, and their number.
        """
        step = 1 if sample is None else max(1, len(self) // max(1, sample))
        chosen = range(0, len(self), step)
        bad: list[str] = []
        first: DataError | None = None
        indices = [self._indices[position] for position in chosen]
        files = self._store.files if isinstance(self._store, FileStore) else self._store.thunks
        for position, thunk in zip(chosen, files(indices), strict=True):
            try:
                item = thunk()
                if isinstance(item, bytes | Path):
                    verify(item, self.ids[position])
            except DataError as error:
                first = first or error
                bad.append(self.ids[position])
        if first is not None:
            more = f" In all {len(bad)} of {len(chosen)} checked: {some(bad)}." if len(bad) > 1 else ""
            raise DataError(f"{self.where}: {first}{more}") from first

    def batches(
        self,
        preprocess: Preprocess | None,
        batch_size: int,
        *,
        skip_bad: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterator[Batch]:
        """The images in order, preprocessed, batch_size at a time; the last batch may be smaller.

        Args:
            preprocess: may be None where the images are tensors, which are taken as they are.
            skip_bad: leave unreadable images out and list them in skipped, instead of raising.
            on_batch: called with the number of images of each batch after the reader is done with it.

        Raises:
            DataError: an unreadable image, by name; or nothing left after skipping.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1.")
        self.skipped = []
        images: list[Tensor] = []
        positions: list[int] = []
        read = 0
        for position, image in self._decoded(preprocess, skip_bad):
            images.append(image)
            positions.append(position)
            if len(images) == batch_size:
                read += batch_size
                yield self._batch(images, positions)
                images, positions = [], []
                if on_batch is not None:
                    on_batch(batch_size)
        if images:
            read += len(images)
            yield self._batch(images, positions)
            if on_batch is not None:
                on_batch(len(images))
        if not read:
            raise DataError(f"no readable image in {self.where}; skipped {len(self.skipped)}.")

    def tensor(self, preprocess: Preprocess | None, *, skip_bad: bool = False) -> Tensor:
        """All images at once, (N, C, H, W) float32. Raises as batches does."""
        return next(self.batches(preprocess, max(1, len(self)), skip_bad=skip_bad)).images

    @property
    def holds_tensors(self) -> bool:
        """Whether the images are tensors, which are taken as they are."""
        return bool(self._indices) and isinstance(self._store.one(self._indices[0])(), Tensor)

    def image(self, position: int, transform: Callable[[Any], Tensor] | None) -> Tensor:
        """One image, transformed; one that is a tensor is taken as it is.

        Raises:
            DataError: it cannot be read.
        """
        return _load(self._store.one(self._indices[position]), self.ids[position], transform, self.where)

    def photo(self, position: int) -> Image:
        """One image at its own size: RGB, turned upright as its rotation tag says.

        Raises:
            DataError: it cannot be read, or is a tensor.
        """
        item, name = self._store.one(self._indices[position])(), self.ids[position]
        if isinstance(item, Tensor):
            raise DataError(f"{self.where} holds preprocessed tensors. Give image files.")
        return decode(item, name, upright=True) if isinstance(item, bytes) else to_rgb(item)

    def _decoded(self, preprocess: Preprocess | None, skip_bad: bool) -> Iterator[tuple[int, Tensor]]:
        """(position, image) in order, decoded by threads that run at most LOOK_AHEAD images ahead."""
        transform = None if preprocess is None else preprocess.transform()
        pending: deque[tuple[int, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="vitq-decode") as pool:
            try:
                for position, thunk in enumerate(self._store.thunks(self._indices)):
                    pending.append((position, pool.submit(_load, thunk, self.ids[position], transform, self.where)))
                    if len(pending) > LOOK_AHEAD:
                        yield from self._result(*pending.popleft(), skip_bad)
                while pending:
                    yield from self._result(*pending.popleft(), skip_bad)
            finally:
                for _, future in pending:
                    future.cancel()

    def _result(self, position: int, future: Future[Tensor], skip_bad: bool) -> Iterator[tuple[int, Tensor]]:
        try:
            image = future.result()
        except DataError:
            if not skip_bad:
                raise
            self.skipped.append(self.ids[position])
            return
        yield position, image

    def _batch(self, images: list[Tensor], positions: list[int]) -> Batch:
        labels = None if self.labels is None else self.labels[torch.tensor(positions)]
        return Batch(torch.stack(images), labels, [self.ids[position] for position in positions])


def _load(thunk: Thunk, name: str, transform: Callable[[Any], Tensor] | None, where: str) -> Tensor:
    item: Item = thunk()
    if isinstance(item, Tensor):
        return item
    if transform is None:
        raise InputError(
            f"{where} holds images that are not preprocessed, and no preprocessing is known. "
            "Give one (Preprocess(input_size=...)), or give tensors."
        )
    return transform(decode(item, name) if isinstance(item, bytes) else to_rgb(item))


def open_images(
    data: str | Path | Tensor | Iterable[Any],
    *,
    labels: str = "auto",
    num_classes: int | None = None,
    root: str | Path | None = None,
) -> ImageSet:
    """The images of a folder, file, tensor or iterable of batches.

    Args:
        data: an ImageFolder, a folder with labels.csv (file,label), a folder of images, a Parquet file
            or a folder of them, a .txt list of image paths, zoo:NAME for images that come with vitq, a
            preprocessed tensor (N, C, H, W), or an iterable of batches, which is read once and kept.
        labels: 'auto' takes them where there are any; 'none' ignores them, and folders are then nesting.
        num_classes: classes of the model; a label outside 0 ... num_classes - 1 is an error.
        root: folder that the paths in a .txt list are relative to; None means the folder of the list.

    Raises:
        DataError: nothing there, nothing readable, labels that cannot be used.
        UnknownNameError: no such images in the zoo.
        MissingExtraError: Parquet without pyarrow.
    """
    if labels not in ("auto", "none"):
        raise InputError(f"labels is {labels!r}, expected 'auto' or 'none'.")
    if isinstance(data, ImageSet):
        return _checked(ImageSet(data._store, data._indices, labelled=labels == "auto"), num_classes)
    if isinstance(data, str) and data.startswith(ZOO):
        store: Store = zoo_store(data.removeprefix(ZOO))
    elif isinstance(data, str | Path):
        store = _open_path(Path(data), labels, num_classes, None if root is None else Path(root))
    elif isinstance(data, Tensor):
        store = tensor_store(data, None, "the tensor given as data")
    elif isinstance(data, tuple) and [getattr(part, "ndim", None) for part in data] == [4, 1]:
        store = batches_store([data])
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        store = batches_store(data)
    else:
        raise DataError(
            f"a {type(data).__name__} is not image data. Give a path, a tensor (N, C, H, W) or an iterable of batches."
        )
    return _checked(ImageSet(store, labelled=labels == "auto"), num_classes)


def _open_path(path: Path, labels: str, num_classes: int | None, root: Path | None) -> Store:
    path = path.expanduser()
    if path.is_dir():
        for folder in (path, path / "data"):  # data/ is where a dataset repository keeps its files
            if files := sorted(f for f in folder.glob("*.parquet") if not f.name.startswith(".")):
                return open_parquet(files, labels)
        return open_folder(path, labels, num_classes)
    if not path.exists():
        raise DataError(f"no such file or folder of images: {str(path)!r}. Check the path.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return open_parquet([path], labels)
    if suffix == ".txt":
        return open_list(path, root)
    if suffix in EXTENSIONS:
        return FileStore(str(path), [path], [path.name], None)
    raise DataError(
        f"{path.name} is no kind of image data that vitq reads. Give a folder, a .parquet file, a .txt list "
        "of image paths or an image."
    )


def _checked(images: ImageSet, num_classes: int | None) -> ImageSet:
    """images, if every label is a class of the model."""
    labels = images.labels
    if labels is None:
        return images
    high = num_classes if num_classes is not None else torch.iinfo(torch.int64).max
    bad = ((labels < 0) | (labels >= high)).nonzero().flatten().tolist()
    if bad:
        classes = "" if num_classes is None else f"; the model has {num_classes} classes (0 to {high - 1})"
        raise DataError(
            f"{images.where}: label {int(labels[bad[0]])} of {images.ids[bad[0]]!r}, and {len(bad)} in all, "
            f"cannot be used{classes}. Give data of the classes that the model was trained on."
        )
    return images


def without_overlap(calibration: ImageSet, evaluation: ImageSet) -> tuple[ImageSet, list[str]]:
    """Leave out of evaluation every image that calibration holds too, byte for byte.

    Returns:
        (kept, ids): what is left of evaluation, in order, and the ids of the images left out.

    Raises:
        DataError: nothing would be left, or a file that cannot be read.
    """
    seen = set(calibration.digests())
    known = [value in seen for value in evaluation.digests()]
    kept = [position for position, hit in enumerate(known) if not hit]
    if not kept:
        raise DataError(
            f"all {len(evaluation)} images of {evaluation.where} are calibration images too. Evaluate on other images."
        )
    left_out = [name for name, hit in zip(evaluation.ids, known, strict=True) if hit]
    return (evaluation.subset(kept) if left_out else evaluation), left_out
