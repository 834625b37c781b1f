"""What vitq train feeds a model: images and their labels, or photos and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vitq.cli import work
from vitq.cli.console import Say
from vitq.cli.tasks import need_inputs, open_photos
from vitq.core.batches import Batches
from vitq.core.errors import InputError
from vitq.core.training import Examples, OwnLoss
from vitq.data.examples import NONE, ImageExamples
from vitq.data.images import ImageSet, open_images
from vitq.data.native import PhotoInput, photo_input
from vitq.data.objects import ObjectExamples, PhotoExamples, PixelExamples, own_loss
from vitq.data.preprocess import Preprocess
from vitq.data.semantic import SemanticSet
from vitq.data.source import LoadedModel
from vitq.evaluate.finders import category_ids

REMEMBERED = 10_000  # images whose digests an artifact holds
AUTO = "auto"


@dataclass(frozen=True)
class Asked:
    """What to train on.

    Attributes:
        train: images, or what is in the photos of `images`.
        labels: auto or none.
    """

    task: str
    train: str
    images: Path | None
    size: int | None
    augment: str
    labels: str
    workers: int
    calib_size: int
    seed: int
    skip_bad: bool


@dataclass(frozen=True)
class Feed:
    """What is trained on, and what ranges begin with.

    Attributes:
        data, calib: the images that ranges begin with, as batches and as files.
        images: all of them.
        told: about labels.
        loss: of the model's own, None for that of classifiers.
    """

    examples: Examples
    data: Batches
    calib: ImageSet
    images: ImageSet
    prepare: Preprocess | PhotoInput
    told: str
    loss: OwnLoss | None = None


def of_images(asked: Asked, model: str, loaded: LoadedModel, where: torch.device, say: Say) -> Feed:
    """A classifier's.

    Raises:
        InputError, DataError: images that cannot be used, or an option that is for photos.
    """
    if asked.images is not None or asked.size is not None:
        raise InputError("--images and --size are for --task detect, instances and segment")
    prepare = work.need_preprocess(loaded.preprocess, model)
    images = open_images(asked.train, labels=asked.labels, num_classes=loaded.num_classes)
    if asked.skip_bad:
        images = _readable(images, prepare, asked.train, say)
    else:
        images.check(REMEMBERED)  # of more, a sample: each is decoded when it is its turn
    use = asked.labels == AUTO and images.labels is not None
    examples = ImageExamples(images, prepare, augment=asked.augment, labels=use, seed=asked.seed, workers=asked.workers)
    size = min(asked.calib_size, len(images))
    data, calib = work.calibration(asked.train, size, asked.seed, prepare, where, asked.skip_bad, say)
    return Feed(examples, data, calib, images, prepare, f"{'with' if use else 'without'} labels")


def of_photos(asked: Asked, model: str, loaded: LoadedModel, where: torch.device, scratch: Path, say: Say) -> Feed:
    """A detector's or segmenter's, which brings its loss.

    Args:
        scratch: an empty folder, for scenes that come with vitq.

    Raises:
        InputError, DataError: photos or annotations that cannot be used, an option that is for images.
    """
    if asked.labels != AUTO or asked.augment != NONE or asked.skip_bad or asked.workers:
        raise InputError(
            f"--task {asked.task} trains on annotated photos as they are: leave out --labels, --augment, --skip-bad "
            f"and --workers"
        )
    prepare = need_inputs(photo_input(loaded.model, asked.size), model)
    found = open_photos(asked.train, asked.images, asked.task, scratch)
    for note in getattr(found, "notes", ()):
        say.note(note)
    found.files.check(REMEMBERED)
    examples: PhotoExamples
    if isinstance(found, SemanticSet):
        examples = PixelExamples(found, prepare)
    else:
        ids = category_ids(loaded.model, found.categories)
        examples = ObjectExamples(found, prepare, ids, masks=asked.task == "instances")
    calib = found.files.sample(min(asked.calib_size, len(found)), asked.seed)
    data = work.batches_of(calib, prepare, where)
    return Feed(
        examples, data, calib, found.files, prepare, "by the model's own loss", own_loss(loaded.model, examples)
    )


def _readable(images: ImageSet, preprocess: Preprocess, data: str, say: Say) -> ImageSet:
    """The images that can be decoded: each is, once, so that a run does not stop at one after hours.

    Raises:
        DataError: none can.
    """
    with say.task("decoding every image once", len(images)) as task:
        for batch in images.batches(preprocess, batch_size=32, skip_bad=True):
            task.advance(len(batch.ids))
    return work.say_skipped(images, data, say)
