"""The steps that commands are made of: models, images and devices by their command-line names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.cli.console import Say
from vitq.core.batches import Batches, moved, sizes_of
from vitq.core.errors import DataError, InputError
from vitq.core.qmodel import QuantModel
from vitq.data.checkpoint import some
from vitq.data.images import ImageSet, open_images, without_overlap
from vitq.data.native import PhotoInput, photo_input
from vitq.data.preprocess import Preprocess
from vitq.data.source import LoadedModel, load_model

IN_MEMORY = 512  # calibration images decoded once and kept; beyond, they are decoded again for every go


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" is a device that computes nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; use auto or cpu"
        ) from None
    return device


def is_artifact(target: str) -> bool:
    """Whether a command-line word names an artifact's folder: any folder, and any other path that is no model's."""
    if target.endswith(".onnx") or (":" in target and not Path(target).exists()):
        return False
    return Path(target).exists() or "/" in target


def open_model(spec: str, checkpoint: Path | None, device: torch.device, say: Say) -> LoadedModel:
    """Load a model by name onto a device."""
    say.note(f"loading {spec}" + (f" with {checkpoint}" if checkpoint else ""))
    loaded = load_model(spec, checkpoint)
    if loaded.source["kind"] == "onnx" and loaded.preprocess is not None:
        say.note("an ONNX file does not say how images are prepared: they get ImageNet's mean and deviation")
    loaded.model.to(device).eval()
    return loaded


def need_preprocess(preprocess: Preprocess | None, spec: str) -> Preprocess:
    """The model's own image preparation.

    Raises:
        InputError: it is not known.
    """
    if preprocess is None:
        raise InputError(f"how {spec} prepares its images is not known; use vitq.quantize with tensors instead")
    return preprocess


def input_of(loaded: LoadedModel, spec: str, size: int | None) -> Preprocess | PhotoInput:
    """How a model takes images: each at its own size, or all of them at one.

    Args:
        size: of the photos of a detector or segmenter that leaves the choice.

    Raises:
        InputError: it is not known, or a size is given where none can be chosen.
    """
    if photos := photo_input(loaded.model, size):
        return photos
    if size is not None:
        raise InputError(f"--size is for detectors and segmenters of transformers, which {spec} is not")
    return need_preprocess(loaded.preprocess, spec)


def no_size(size: int | None) -> None:
    """Refuse a size for an artifact.

    Raises:
        InputError: one is given.
    """
    if size is not None:
        raise InputError("--size is for a model: an artifact keeps the preparation of photos that it was made with")


def preprocess_of(qmodel: QuantModel, target: str) -> Preprocess:
    """How an artifact's images are prepared.

    Raises:
        InputError: it is not known, or the artifact takes photos at their own sizes.
    """
    stored = qmodel.preprocess or {}
    if "form" in stored:
        raise takes_photos(target)
    return need_preprocess(Preprocess.from_dict(stored) if stored else None, target)


def takes_photos(target: str) -> InputError:
    """What to say where a detector or segmenter is not served."""
    return InputError(
        f"{target} takes photos at their own sizes, as detectors and segmenters do: use vitq evaluate with --task "
        f"detect, instances or segment, or vitq diagnose; other commands cannot feed it yet"
    )


def calibration(
    data: str, size: int, seed: int, preprocess: Preprocess, device: torch.device, skip_bad: bool, say: Say
) -> tuple[Batches, ImageSet]:
    """Sample and decode calibration images; many of them are streamed.

    Raises:
        DataError: fewer images than asked, or unreadable ones (none left, with skip_bad).
    """
    images = sampled(data, size, seed, skip_bad)
    parts = []
    with say.task("decoding calibration images", size) as task:
        if size <= IN_MEMORY or skip_bad:  # what will be skipped must be known before batches are counted
            for batch in images.batches(preprocess, batch_size=32, skip_bad=skip_bad):
                if size <= IN_MEMORY:
                    parts.append(batch.images)
                task.advance(len(batch.ids))
    images = say_skipped(images, data, say)
    if parts:
        return Batches.of(torch.cat(parts).to(device)), images

    def stream() -> Iterator[Tensor]:
        for batch in images.batches(preprocess, batch_size=32):
            yield batch.images.to(device)

    return Batches(stream, sizes_of(len(images))), images


def not_calibrated(qmodel: QuantModel, images: ImageSet) -> list[int]:
    """Positions of the images that an artifact was not calibrated on."""
    seen = set(qmodel.provenance.get("calibration_sha256", ()))
    return [i for i, digest in enumerate(images.digests()) if digest not in seen] if seen else list(range(len(images)))


def photos(
    data: str, size: int, seed: int, inputs: PhotoInput, device: torch.device, skip_bad: bool, say: Say
) -> tuple[Batches, ImageSet]:
    """Sample calibration photos at their own sizes, those alike in batches.

    They are decoded again for every go, so that memory stays flat.

    Raises:
        DataError: fewer photos than asked, or unreadable ones (none left, with skip_bad).
    """
    images = sampled(data, size, seed, skip_bad)
    if skip_bad:
        images = say_skipped(_readable(images), data, say)
    if not len(images):
        raise DataError(f"no readable image in {data}")
    return batches_of(images, inputs, device), images


def batches_of(images: ImageSet, inputs: PhotoInput, device: torch.device) -> Batches:
    """Photos as calibration batches, those alike together; decoded again for every go."""
    groups = inputs.alike(images.photo(position) for position in range(len(images)))

    def stream() -> Iterator[Any]:
        return (moved(inputs.batch([images.photo(position) for position in group]), device) for group in groups)

    return Batches(stream, [len(group) for group in groups])


def _readable(images: ImageSet) -> ImageSet:
    """The images, with those that cannot be read listed as skipped."""
    for position, name in enumerate(images.ids):
        try:
            images.photo(position)
        except DataError:
            images.skipped.append(name)
    return images


def sampled(data: str, size: int, seed: int, skip_bad: bool) -> ImageSet:
    """Draw calibration images.

    Raises:
        DataError: fewer images than asked, or unreadable ones.
    """
    if size < 1:
        raise InputError(f"--calib-size {size}: at least one image is needed")
    images = open_images(data, labels="none").sample(size, seed)
    if not skip_bad:
        images.check()
    return images


def say_skipped(images: ImageSet, data: str, say: Say) -> ImageSet:
    """The images without those that were skipped, which are named."""
    skipped = set(images.skipped)
    if not skipped:
        return images
    say.note(f"skipped {len(skipped)} unreadable images of {data}: {some(images.skipped)}")
    return images.subset([i for i, name in enumerate(images.ids) if name not in skipped])


def labelled(data: str, num_classes: int | None, skip_bad: bool) -> ImageSet:
    """Open images that must have labels, and be readable.

    Raises:
        DataError: no labels, labels beyond the model's classes, or unreadable images.
    """
    images = open_images(data, num_classes=num_classes)
    if images.labels is None:
        raise DataError(f"{data} has no labels; evaluation needs class folders, labels.csv or a label column")
    if not skip_bad:
        images.check()
    return images


def evaluation(
    data: str, calib: ImageSet | None, num_classes: int | None, skip_bad: bool, say: Say
) -> tuple[ImageSet, list[str]]:
    """Open labelled images, and leave out what was calibrated on.

    Raises:
        DataError: as `labelled`, or nothing left.
    """
    images = labelled(data, num_classes, skip_bad)
    left_out: list[str] = []
    if calib is not None:
        images, left_out = without_overlap(calib, images)
        if left_out:
            say.note(f"{len(left_out)} images of {data} were calibrated on; they are left out of the evaluation")
    if len(images) == 0:
        raise DataError(f"{data}: every image was calibrated on; give others")
    return images, left_out


def provenance(images: ImageSet, data: str, seed: int) -> dict[str, Any]:
    """Which images were calibrated on."""
    return {
        "calibration": Path(data).name,
        "calibration_images": len(images),
        "seed": seed,
        "calibration_ids": list(images.ids),
        "calibration_sha256": images.digests(),
    }
