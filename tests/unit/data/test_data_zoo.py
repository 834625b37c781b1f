"""The seeded zoo: the same everywhere, with the outliers that make quantization hard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitq.core.errors import UnknownNameError
from vitq.data.zoo import build_zoo, seeded_images, zoo_names, zoo_preprocess

NAMES = zoo_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_zoo_model_is_the_same_whatever_the_random_state(name: str) -> None:
    first = build_zoo(name)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = build_zoo(name)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_zoo_model_tells_its_images_apart(name: str) -> None:
    model = build_zoo(name)
    with torch.no_grad():
        logits = model(seeded_images(32))
    assert not model.training
    assert logits.shape == (32, 10)
    assert logits.std(0).min() > 0.1
    assert logits.argmax(1).unique().numel() >= 3


@pytest.mark.parametrize("name", NAMES)
def test_norms_have_outlier_channels(name: str) -> None:
    gammas = [m.weight for m in build_zoo(name).modules() if isinstance(m, nn.LayerNorm)]
    assert all(gamma.max() > 2.5 * gamma.median() for gamma in gammas)


def test_the_swin_shifts_its_windows_and_merges_once() -> None:
    modules = dict(build_zoo("seeded_swin").named_modules())
    assert any(getattr(m, "shift_size", (0, 0)) != (0, 0) for m in modules.values())
    assert sum(type(m).__name__ == "PatchMerging" for m in modules.values()) == 1


def test_images_are_smooth_in_range_and_do_not_depend_on_how_many_are_asked() -> None:
    images = seeded_images(16)
    assert images.shape == (16, 3, 32, 32)
    assert images.abs().max() <= 1
    assert torch.equal(images[:4], seeded_images(4))
    assert not torch.equal(images, seeded_images(16, seed=1))
    steps = (images[..., 1:] - images[..., :-1]).std()
    assert steps < images.std() / 2, "neighbouring pixels of white noise differ by 1.4 deviations"


def test_unknown_zoo_names_are_refused() -> None:
    for function in (build_zoo, zoo_preprocess):
        with pytest.raises(UnknownNameError, match="seeded_vit"):
            function("seeded_vitt")
    assert zoo_preprocess("seeded_vit").input_size == (3, 32, 32)
