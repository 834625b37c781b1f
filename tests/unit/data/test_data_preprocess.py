"""Preprocessing equals the library's own, and its stored form is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vitq.core.errors import InputError
from vitq.data.preprocess import Preprocess, crop_pct_for
from vitq.data.zoo import seeded_images

SIZES = [(61, 40), (40, 61), (64, 64), (37, 300), (333, 259)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A structured RGB image of any size."""
    pixels = (seeded_images(1, size=max(width, height), seed=seed)[0] + 1) * 127.5
    return Image.fromarray(pixels[:, :height, :width].permute(1, 2, 0).byte().numpy())


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "vit_small_patch14_dinov2",
        "xcit_nano_12_p8_224",
    ],
)
def test_timm_models_are_preprocessed_as_timm_does(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    ours = Preprocess.from_timm(model)
    config = resolve_model_data_config(model)
    for size in SIZES:
        image = photo(*size)
        assert torch.equal(ours.transform()(image), create_transform(**config, is_training=False)(image))
    assert Preprocess.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_every_crop_mode_of_timm_is_kept(mode: str) -> None:
    ours = Preprocess((3, 24, 24), "bilinear", crop_pct=0.8, crop_mode=mode)
    theirs = create_transform((3, 24, 24), is_training=False, interpolation="bilinear", crop_pct=0.8, crop_mode=mode)
    for size in SIZES:
        assert torch.equal(ours.transform()(photo(*size)), theirs(photo(*size)))


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16", "swin_t", "swin_v2_s", "maxvit_t", "convnext_tiny"])
def test_torchvision_models_are_preprocessed_as_torchvision_does(name: str) -> None:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    ours = Preprocess.from_torchvision(weights).transform()
    theirs = weights.transforms()
    for size in SIZES:
        assert torch.allclose(ours(photo(*size)), theirs(photo(*size)), atol=1e-6)
    assert Preprocess.from_torchvision(theirs) == Preprocess.from_torchvision(weights)


HF_CONFIGS: list[dict[str, Any]] = [
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 32}, "resample": 3},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}, "do_normalize": False},
    {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 56, "width": 56},
        "crop_size": {"height": 48, "width": 48},
        "do_center_crop": True,
        "resample": 3,
    },
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 48, "width": 48},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "crop_pct": 0.875},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
]


@pytest.mark.parametrize("config", HF_CONFIGS, ids=lambda c: f"{c['image_processor_type']}-{len(c)}")
def test_hugging_face_processors_are_reproduced(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'hf')")
    name = config["image_processor_type"]
    theirs = getattr(transformers, name + "Pil")(**config)
    tensors = getattr(transformers, name)(**config)
    ours = Preprocess.from_hf(tensors)
    assert ours == Preprocess.from_hf(tensors.to_dict())
    for size in SIZES:
        image = photo(*size)
        mine = ours.transform()(image)
        wanted = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"][0])
        assert torch.allclose(mine, wanted, atol=2e-6)
        # Their other backend resizes tensors: off by a few of 255 grey levels, mostly none.
        other = tensors(image, return_tensors="pt")["pixel_values"][0]
        levels = (mine - other).abs() * torch.tensor(ours.std).reshape(3, 1, 1) * 255
        assert levels.max() < 4
        assert levels.mean() < 0.5


def test_another_rescale_factor_moves_into_mean_and_std() -> None:
    ours = Preprocess.from_hf({"size": 8, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0})
    image = photo(8, 8)
    plain = Preprocess((3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0).transform()(image)
    assert torch.allclose(ours.transform()(image), plain * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 32}},
        {"size": 32, "do_resize": False},
        {"size": 32, "do_rescale": False},
        {"size": {"longest_edge": 32}},
        {"size": 32, "resample": 9},
    ],
)
def test_a_processor_that_cannot_be_expressed_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Preprocess.from_hf(config)


def test_every_resize_has_a_crop_pct_that_gives_exactly_it() -> None:
    for crop in range(16, 520, 7):
        for resize in range(crop, crop + 90):
            assert int(crop / crop_pct_for((crop,), resize)) == resize


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "LA", "RGBA", "1"])
def test_images_of_any_mode_come_out_as_three_channels(mode: str) -> None:
    ours = Preprocess.from_image_size(16).transform()
    assert ours(photo(20, 20).convert(mode)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_size", [3, 32]),
        ("input_size", [3, 0, 32]),
        ("interpolation", "cubic"),
        ("mean", [0.5, 0.5]),
        ("mean", ["a", "b", "c"]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [float("nan")] * 3),
        ("crop_pct", 0),
        ("crop_pct", "1"),
        ("crop_mode", "middle"),
    ],
)
def test_an_unusable_field_is_named(field: str, value: Any) -> None:
    values = Preprocess.from_image_size(32).to_dict()
    with pytest.raises(InputError, match=field):
        Preprocess.from_dict(values | {field: value})


def test_missing_and_unknown_fields_are_refused() -> None:
    values = Preprocess.from_image_size(32).to_dict()
    with pytest.raises(InputError, match="exactly"):
        Preprocess.from_dict(values | {"flip": True})
    del values["mean"]
    with pytest.raises(InputError, match="exactly"):
        Preprocess.from_dict(values)
    with pytest.raises(InputError, match="exactly"):
        Preprocess.from_dict(None)  # type: ignore[arg-type]


def test_a_model_of_one_channel_takes_no_images() -> None:
    with pytest.raises(InputError, match="1 channels"):
        Preprocess((1, 8, 8), mean=(0.5,), std=(0.5,)).transform()


def test_a_foreign_preset_is_refused() -> None:
    with pytest.raises(InputError, match="preset"):
        Preprocess.from_torchvision(object())
