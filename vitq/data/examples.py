"""Images as training examples: decoded and augmented as (epoch, number) says, by any number of workers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitq.core.errors import DataError, InputError, UnknownNameError
from vitq.core.training import Draw
from vitq.data.images import ImageSet
from vitq.data.preprocess import AUGMENTATIONS, Preprocess

NONE = "none"
LOOKED_AT = 64  # images whose content is part of the digest


class ImageExamples:
    """The images of a set as examples.

    Args:
        images: what to train on.
        preprocess: the model's own; augmentation takes its size, mean and deviation. None where images are tensors.
        augment: "none", or a key of preprocess.AUGMENTATIONS.
        labels: hand out the labels that the images have.
        seed: of augmentation.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        InputError: labels are asked for, and there are none; an unknown augmentation, or one where none is possible.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: Preprocess | None,
        *,
        augment: str = NONE,
        labels: bool = True,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if augment not in (NONE, *AUGMENTATIONS):
            raise UnknownNameError("augmentation", augment, [NONE, *AUGMENTATIONS])
        if augment != NONE and preprocess is None:
            raise InputError(
                f"augmentation {augment!r} needs images and a model whose preprocessing is known; use none"
            )
        if augment != NONE and images.holds_tensors:
            raise InputError(f"{images.where} holds tensors, which are not augmented; use none")
        if labels and images.labels is None:
            raise InputError(f"{images.where} has no labels; give some, or train without (labels none)")
        self.images, self.preprocess, self.augment, self.seed = images, preprocess, augment, seed
        self.labelled, self.fixed = labels, augment == NONE
        self.workers = workers

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Of names, labels, preparation, augmentation, and the content of a few images evenly spread."""
        labels = self.images.labels.tolist() if self.labelled and self.images.labels is not None else None
        prepared = None if self.preprocess is None else self.preprocess.to_dict()
        looked_at = self.images.digests(range(0, len(self), -(-len(self) // LOOKED_AT)))
        told = json.dumps([self.images.ids, labels, prepared, self.augment, self.seed, looked_at])
        return hashlib.sha256(told.encode()).hexdigest()

    def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images, labels) of each batch."""
        loader: Any = DataLoader(
            _Decoded(self),
            batch_sampler=[list(draws) for draws in batches],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it would draw a number from the one of all
        )
        for images, labels in _named(loader):
            yield images, labels if self.labelled else None


def _named(loader: Any) -> Iterator[Any]:
    """What it loads; a worker's DataError without the worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("vitq.core.errors.DataError: ")) from None


class _Decoded(Dataset[tuple[Tensor, int]]):
    def __init__(self, examples: ImageExamples) -> None:
        self.of = examples
        preprocess = examples.preprocess
        self.transform = None
        if preprocess is not None:
            plain = examples.augment == NONE
            self.transform = preprocess.transform() if plain else preprocess.augmented(examples.augment)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        epoch, number = draw
        with _seeded(hash((self.of.seed, epoch, number))):  # of whole numbers: the same in every process
            image = self.of.images.image(number, self.transform)
        labels = self.of.images.labels
        return image, int(labels[number]) if self.of.labelled and labels is not None else -1


class _seeded:  # noqa: N801 - a context
    """For a while, random numbers follow a seed; what was drawn from before goes on as if nothing had been."""

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**32

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        python, numpy, pytorch = self.before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
