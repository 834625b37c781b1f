"""vitq evaluate --task detect, instances or segment: photos with objects or classes in them, at their own sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from vitq.artifact import load
from vitq.cli import work
from vitq.cli.console import Say
from vitq.core.errors import DataError, InputError
from vitq.core.qmodel import QuantModel
from vitq.data.coco import CocoSet, open_coco
from vitq.data.images import ZOO, ImageSet
from vitq.data.native import PhotoInput, photo_input
from vitq.data.semantic import SemanticSet, open_semantic
from vitq.data.zoo.scenes import scene_set, write_scenes
from vitq.evaluate import detect, segment
from vitq.evaluate.detections import Detections
from vitq.evaluate.draw import draw_classes, draw_detections, save_beside
from vitq.evaluate.finders import Answer, Finder, Photos, Segmenter, category_ids
from vitq.evaluate.output_fidelity import OutputFidelity, found_again

if TYPE_CHECKING:
    from PIL.Image import Image

TASKS = ("classify", "detect", "instances", "segment")
Readers: TypeAlias = "dict[str, Callable[[Image], Answer]]"  # by the model's name
DRAWN = 16  # photos that --draw draws
FLOAT, QUANTIZED = "float", "quantized"


@dataclass(frozen=True)
class Asked:
    """What to evaluate, and on what."""

    target: str
    task: str
    data: str
    images: Path | None
    checkpoint: Path | None
    size: int | None
    limit: int | None
    fidelity: bool
    draw: Path | None
    device: torch.device
    trust_code: bool


@dataclass(frozen=True)
class Opened:
    """Models by name, float first, and how they take photos."""

    models: dict[str, nn.Module]
    inputs: PhotoInput
    qmodel: QuantModel | None


def open_photos(data: str, images: Path | None, task: str, scratch: Path) -> CocoSet | SemanticSet:
    """The annotated photos of a task.

    Args:
        scratch: an empty folder, for scenes that come with vitq (zoo:NAME).

    Raises:
        InputError: no folder of images is named, or one for scenes.
        DataError: they cannot be used.
    """
    segments = task == "segment"
    if data.startswith(ZOO):
        if images is not None:
            raise InputError(f"{data} brings its photos: leave --images out")
        write_scenes(scratch, *scene_set(data.removeprefix(ZOO)))
        data, images = str(scratch / ("masks" if segments else "truth.json")), scratch / "photos"
    if images is None:
        raise InputError(f"--task {task} needs --images, the folder of the photos that {data} is about")
    return open_semantic(data, images) if segments else open_coco(data, images, masks=task == "instances")


def evaluate_task(asked: Asked, float_of: Callable[..., nn.Module], say: Say) -> dict[str, Any]:
    """Measure, print, and give back what was measured.

    Args:
        float_of: (quantized model, checkpoint, trust_code, say) -> its float model.
    """
    with TemporaryDirectory(prefix="vitq-scenes-") as scratch:
        data = open_photos(asked.data, asked.images, asked.task, Path(scratch))
        for note in getattr(data, "notes", ()):
            say.note(note)
        opened = _open(asked, float_of, say)
        data = data.subset(_chosen(data.files, opened.qmodel, asked, say))
        found: dict[str, Any] = {"model": asked.target, "task": asked.task}
        found["kind"] = "simulated" if opened.qmodel is not None else "float"
        if isinstance(data, SemanticSet):
            return found | _segments(asked, opened, data, say)
        return found | _detects(asked, opened, data, say)


def _open(asked: Asked, float_of: Callable[..., nn.Module], say: Say) -> Opened:
    if not work.is_artifact(asked.target):
        loaded = work.open_model(asked.target, asked.checkpoint, asked.device, say)
        inputs = photo_input(loaded.model, asked.size)
        return Opened({FLOAT: loaded.model}, need_inputs(inputs, asked.target), None)
    work.no_size(asked.size)
    qmodel = load(asked.target, trust_code=asked.trust_code).to(asked.device)
    stored = qmodel.preprocess or {}
    inputs = PhotoInput.from_dict(stored) if "form" in stored else None
    models: dict[str, nn.Module] = {}
    if asked.checkpoint is not None or (qmodel.source or {}).get("kind") in ("zoo", "file"):
        models[FLOAT] = float_of(qmodel, asked.checkpoint, asked.trust_code, say).to(asked.device)
    elif asked.fidelity:
        raise InputError("--fidelity compares an artifact with its float model; name its weights with --checkpoint")
    return Opened(models | {QUANTIZED: qmodel}, need_inputs(inputs, asked.target), qmodel)


def need_inputs(inputs: PhotoInput | None, target: str) -> PhotoInput:
    """How a model takes photos.

    Raises:
        InputError: it is not known.
    """
    if inputs is None:
        raise InputError(
            f"how {target} takes photos is not known: it is none of torchvision's detectors and none of transformers' "
            f"models for object detection or semantic segmentation. Use vitq.quantize with its inputs as tensors"
        )
    return inputs


def _chosen(files: ImageSet, qmodel: QuantModel | None, asked: Asked, say: Say) -> list[int]:
    """Positions of the photos to evaluate on: not those that were calibrated on, and no more than the limit."""
    chosen = list(range(len(files)))
    if qmodel is not None:
        chosen = work.not_calibrated(qmodel, files)
        if len(chosen) < len(files):
            where = asked.images or asked.data
            say.note(f"{len(files) - len(chosen)} images of {where} were calibrated on; they are left out")
    if not chosen:
        raise DataError(f"{asked.images or asked.data}: every image was calibrated on; give others")
    return chosen[: asked.limit]


def _detects(asked: Asked, opened: Opened, data: CocoSet, say: Say) -> dict[str, Any]:
    masks = asked.task == "instances"
    ids = category_ids(next(iter(opened.models.values())), data.categories)
    finders = {n: Finder(m, opened.inputs, asked.device, ids, masks) for n, m in opened.models.items()}
    both: Readers[Detections] = dict(finders)
    close = OutputFidelity() if asked.fidelity else None
    if close is not None:
        both = _shared(finders[FLOAT], finders[QUANTIZED], close)
    with say.counted("evaluating " + " and ".join(finders), len(data)) as tell:
        found = detect.evaluate_detectors(both, data, masks=masks, on_image=tell)
    last = found[QUANTIZED] if QUANTIZED in found else found[FLOAT]
    told = detect.pair_json(last, found[FLOAT]) if len(found) > 1 else last.to_json()
    if close is not None:
        told["fidelity"] = close.to_json() | found_again(found[FLOAT].found, found[QUANTIZED].found)
        say.table(told["fidelity"]["outputs"], title="signal to noise of outputs, dB")
    if asked.draw is not None:
        for position in range(min(DRAWN, len(data))):
            image = data.image(position)
            drawn = {n: draw_detections(image, r.found[position], data.categories) for n, r in found.items()}
            save_beside(asked.draw / f"{Path(data.photos[position].file).stem}.png", drawn)
    for kind in ("box", "mask") if masks else ("box",):
        say.result(
            f"{asked.target} ({_kind(opened)}): " + _line(told, f"{kind}_ap", f"{kind} AP", f"{kind}_difference")
        )
    return told


def _shared(reference: Photos[Answer], quantized: Photos[Answer], close: OutputFidelity) -> Readers[Answer]:
    """Both models' answers from one run of each, which is compared on the way."""
    outputs: list[Any] = []

    def first(image: Image) -> Answer:
        outputs[:] = close.outputs(reference, quantized, image)
        return reference.read(outputs[0], image.size)

    return {FLOAT: first, QUANTIZED: lambda image: quantized.read(outputs[1], image.size)}


def _segments(asked: Asked, opened: Opened, data: SemanticSet, say: Say) -> dict[str, Any]:
    models = {name: Segmenter(model, opened.inputs, asked.device) for name, model in opened.models.items()}
    classes = len(Segmenter.logits(next(iter(models.values())).run(data.files.photo(0))))
    close = OutputFidelity() if asked.fidelity else None
    both: Readers[Tensor] = dict(models)
    if close is not None:
        both = _shared(models[FLOAT], models[QUANTIZED], close)
    first: dict[str, list[Tensor]] = {name: [] for name in both}
    if asked.draw is not None:
        both = {name: _keeping(read, first[name]) for name, read in both.items()}
    with say.counted("evaluating " + " and ".join(models), len(data)) as tell:
        found = segment.evaluate_segmenters(both, data, classes, on_image=tell)
    for position, drawn in enumerate(zip(*first.values(), strict=True)):
        assert asked.draw is not None
        image = data.files.photo(position)
        pictures = {name: draw_classes(image, each) for name, each in zip(first, drawn, strict=True)}
        save_beside(asked.draw / f"{Path(data.files.ids[position]).stem}.png", pictures)
    last = found[QUANTIZED] if QUANTIZED in found else found[FLOAT]
    told = segment.pair_json(last, found[FLOAT]) if len(found) > 1 else last.to_json()
    if close is not None:
        told["fidelity"] = close.to_json()
        say.table(told["fidelity"]["outputs"], title="signal to noise of outputs, dB")
    say.result(f"{asked.target} ({_kind(opened)}): " + _line(told, "miou", "mIoU", "difference"))
    return told


def _keeping(read: Callable[[Image], Tensor], first: list[Tensor]) -> Callable[[Image], Tensor]:
    """The same, with the answers for the first DRAWN photos kept."""

    def kept(image: Image) -> Tensor:
        classes = read(image)
        if len(first) < DRAWN:
            first.append(classes.cpu())
        return classes

    return kept


def _kind(opened: Opened) -> str:
    return "float" if opened.qmodel is None else "simulated"


def _line(told: dict[str, Any], key: str, name: str, difference: str) -> str:
    """A number with its interval, and the float one beside it."""
    low, high = told[f"{key}_interval"]
    value = "undefined" if told[key] is None else f"{told[key]:.2f}"
    line = f"{name} {value} [{low:.2f}, {high:.2f}] on {told['images']} images"
    if f"{key}_float" in told and told[f"{key}_float"] is not None:
        d = told[difference]
        line += f"; float {told[f'{key}_float']:.2f}, difference {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
    return line
