"""From an image to a model's input, as the model's own library does it; stored in every artifact.

Shapes:  input_size (C, H, W)    mean, std (C,), in units of pixel values scaled to [0, 1]
         crop_pct   output size / size after resizing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitq.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# center, squash, border: timm's. center_floor: as center, with Hugging Face's rounding of the corner.
CROP_MODES = ("center", "squash", "border", "center_floor")
PIL_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's number
PROCESSOR = "preprocessor_config.json"  # where Hugging Face keeps an image processor
HALF = (0.5, 0.5, 0.5)
# Keywords of timm's create_transform: crops of 8 to 100 % of the area and flips; what DeiT was trained with besides.
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop": {"color_jitter": None},
    "deit": {"color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},
}


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop, scale to [0, 1], subtract mean, divide by std."""

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        size = tuple(self.input_size)
        if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
            raise _invalid("input_size", self.input_size, "three positive whole numbers (C, H, W)")
        if self.interpolation not in INTERPOLATIONS:
            raise _invalid("interpolation", self.interpolation, f"one of {', '.join(INTERPOLATIONS)}")
        if self.crop_mode not in CROP_MODES:
            raise _invalid("crop_mode", self.crop_mode, f"one of {', '.join(CROP_MODES)}")
        object.__setattr__(self, "input_size", size)
        object.__setattr__(self, "mean", _floats("mean", self.mean, size[0]))
        object.__setattr__(self, "std", _floats("std", self.std, size[0]))
        if min(self.std) <= 0:
            raise _invalid("std", self.std, "positive numbers")
        if not isinstance(self.crop_pct, int | float) or not 0 < self.crop_pct <= 4:
            raise _invalid("crop_pct", self.crop_pct, "a number in (0, 4], usually 0.8 to 1")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; from_dict gives an equal object back."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Raises InputError for a missing, unknown or unusable field, naming it."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or values.keys() != known:
            given = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise InputError(f"preprocessing needs exactly the fields {sorted(known)}, got {given}.")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def augmented(self, how: str) -> Callable[[Image], Tensor]:
        """A function from a PIL image to a float32 tensor (C, H, W) that draws from Python's and torch's generators.

        Args:
            how: a key of AUGMENTATIONS.
        """
        from timm.data.transforms_factory import create_transform

        pipeline: Callable[[Image], Tensor] = create_transform(
            self.input_size,
            is_training=True,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            **AUGMENTATIONS[how],
        )
        return pipeline

    def transform(self) -> Callable[[Image], Tensor]:
        """A function from a PIL image, RGB or converted to it, to a float32 tensor (C, H, W)."""
        from timm.data.transforms_factory import create_transform

        if self.input_size[0] != 3:
            raise InputError(
                f"the model takes {self.input_size[0]} channels, and images are read as RGB. "
                "Give its inputs as tensors instead."
            )
        pipeline: Any = create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode="center" if self.crop_mode == "center_floor" else self.crop_mode,
        )
        if self.crop_mode == "center_floor":
            from torchvision.transforms import CenterCrop

            height, width = self.input_size[1:]
            pipeline.transforms = [
                _FloorCenterCrop(height, width) if isinstance(step, CenterCrop) else step
                for step in pipeline.transforms
            ]

        def apply(image: Image) -> Tensor:
            tensor: Tensor = pipeline(image if image.mode == "RGB" else image.convert("RGB"))
            return tensor

        return apply

    @classmethod
    def from_timm(cls, model: Any) -> Preprocess:
        """From the pretrained_cfg of a timm model."""
        import timm.data.config

        library: Any = timm.data.config
        config = library.resolve_model_data_config(model)
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @classmethod
    def from_torchvision(cls, weights: Any) -> Preprocess:
        """From a torchvision weights entry or its transforms() preset; neither downloads anything."""
        preset = weights.transforms() if hasattr(weights, "transforms") else weights
        try:
            crop, resize = preset.crop_size[0], preset.resize_size[0]
            return cls(
                input_size=(3, crop, crop),
                interpolation=preset.interpolation.value,
                mean=tuple(preset.mean),
                std=tuple(preset.std),
                crop_pct=crop_pct_for((crop,), resize),
            )
        except AttributeError as error:
            raise InputError(
                f"{type(preset).__name__} is not a preset of torchvision's image classification "
                "(crop_size, resize_size, mean, std, interpolation)."
            ) from error

    @classmethod
    def from_hf(cls, processor: Any) -> Preprocess:
        """From a Hugging Face image processor or its dict (preprocessor_config.json).

        Equals the processor's PIL backend; its torchvision backend, which resizes tensors instead of
        images, differs from that by a few of 255 grey levels at edges.

        Raises:
            InputError: a step that a resize, a centre crop and a normalization cannot express.
        """
        config = dict(processor) if isinstance(processor, Mapping) else processor.to_dict()
        size, crop_pct, crop_mode = _hf_geometry(config)
        if not config.get("do_rescale", True):
            raise InputError("the image processor does not rescale to [0, 1]; give preprocessing by hand.")
        # Ours divides by 255; another factor moves into mean and std, which it leaves exact.
        unit = float(config.get("rescale_factor") or 1 / 255) * 255
        unit = 1.0 if math.isclose(unit, 1.0) else unit
        normalize = config.get("do_normalize", True)
        mean = _triple(config.get("image_mean") or HALF) if normalize else (0.0, 0.0, 0.0)
        std = _triple(config.get("image_std") or HALF) if normalize else (1.0, 1.0, 1.0)
        resample = config.get("resample")
        number = 2 if resample is None else int(resample)
        if not 0 <= number < len(PIL_RESAMPLING):
            raise _invalid("resample", resample, "a number of PIL.Image.Resampling")
        return cls(
            input_size=(3, *size),
            interpolation=PIL_RESAMPLING[number],
            mean=tuple(value / unit for value in mean),
            std=tuple(value / unit for value in std),
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )

    def to_hf(self) -> dict[str, Any] | None:
        """The dict of a Hugging Face image processor that does the same (from_hf reads it), None if there is none."""
        channels, height, width = self.input_size
        whole = self.crop_mode == "squash" and self.crop_pct == 1
        floor = self.crop_mode == "center_floor" and height == width
        if channels != 3 or self.interpolation not in PIL_RESAMPLING or not (whole or floor):
            return None
        crop = {"height": height, "width": width}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": crop if whole else {"shortest_edge": math.floor(height / self.crop_pct)},
            "resample": PIL_RESAMPLING.index(self.interpolation),
            "do_center_crop": not whole,
            "crop_size": crop,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_image_size(cls, size: int | tuple[int, int]) -> Preprocess:
        """For a model that comes without preprocessing: squash to size, values to [-1, 1]."""
        height, width = (size, size) if isinstance(size, int) else size
        return cls((3, height, width), "bilinear", HALF, HALF, 1.0, "squash")


class _FloorCenterCrop:
    """Centre crop whose corner is rounded down; torchvision's is rounded to the nearest even."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, image: Image) -> Image:
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def crop_pct_for(crop: tuple[int, ...], resize: int) -> float:
    """The crop_pct with which floor(crop / crop_pct) is exactly resize (crop in pixels, one per side)."""
    for nudge in (0.0, 1e-6, 1e-4):
        crop_pct = crop[0] / (resize + nudge)
        if math.floor(crop[0] / crop_pct) == resize:
            return crop_pct
    raise InputError(f"no crop_pct gives a resize to {resize} before a crop to {crop[0]}.")


def _hf_geometry(config: Mapping[str, Any]) -> tuple[tuple[int, int], float, str]:
    """((H, W) of the output, crop_pct, crop_mode) of an image processor's dict."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    size = config.get("size") or {"height": 224, "width": 224}
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    crop = config.get("crop_size") or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    short = size.get("shortest_edge")
    if not config.get("do_resize", True):
        raise InputError("the image processor does not resize; give preprocessing by hand.")
    if kind.startswith("ConvNext") and short:
        # ConvNext's own rule: from 384 on squash, below enlarge by crop_pct and crop.
        if short >= 384:
            return (short, short), 1.0, "squash"
        resized = int(short / float(config.get("crop_pct") or 224 / 256))
        return (short, short), crop_pct_for((short,), resized), "center_floor"
    if kind.startswith("Levit") and short:
        short = int(256 / 224 * short)
    crops = config.get("do_center_crop") and crop
    if short and crops and crop["height"] == crop["width"] <= short:
        return (crop["height"],) * 2, crop_pct_for((crop["height"],), short), "center_floor"
    if "height" in size and "width" in size:
        height, width = int(size["height"]), int(size["width"])
        if not crops or (crop["height"], crop["width"]) == (height, width):
            return (height, width), 1.0, "squash"
        if height == width and crop["height"] == crop["width"] < height:
            pct = crop_pct_for((crop["height"],), height)
            if math.floor(crop["height"] / pct) == height and (height - crop["height"]) % 2 == 0:
                return (crop["height"],) * 2, pct, "squash"
    raise InputError(
        f"the image processor's size {size} with crop {crop if crops else 'off'} gives no fixed output "
        "size that vitq can reproduce; give preprocessing by hand (Preprocess)."
    )


def _triple(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)


def _floats(name: str, values: Any, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise _invalid(name, values, f"{count} numbers") from error
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise _invalid(name, values, f"{count} numbers")
    return numbers


def _invalid(name: str, value: object, wanted: str) -> InputError:
    return InputError(f"preprocessing: {name} is {value!r}, expected {wanted}.")
