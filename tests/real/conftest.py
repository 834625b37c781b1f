"""The real model and photos that tests of parts share. A module says how many photos: CALIBRATION and OTHERS."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from vitq.data.images import open_images
from vitq.data.source import LoadedModel, load_model

MODEL = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def loaded(shared: Path) -> LoadedModel:
    """DeiT-Tiny, one for each module."""
    return load_model(MODEL, shared / "models" / f"{MODEL}.safetensors")


@pytest.fixture(scope="module")
def photos(shared: Path, loaded: LoadedModel, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """To calibrate on, and others."""
    sample = shared / "data" / "imagenet_sample"
    wanted = (("calib", request.module.CALIBRATION), ("ablate", request.module.OTHERS))
    calib, others = (
        open_images(sample / split, labels="none").sample(count, seed=0).tensor(loaded.preprocess)
        for split, count in wanted
    )
    return calib, others
