"""Training examples: what is seen follows from seed, epoch and number, and from nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitq.core.errors import DataError, InputError, UnknownNameError
from vitq.data.examples import ImageExamples
from vitq.data.images import open_images
from vitq.data.preprocess import Preprocess

PREPROCESS = Preprocess(input_size=(3, 32, 32))
DRAWS = [[(0, 1), (0, 4)], [(1, 1), (0, 2), (1, 4)]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 56, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def examples(
    photos: Path, augment: str = "none", seed: int = 0, workers: int = 0, labels: bool = True
) -> ImageExamples:
    return ImageExamples(open_images(photos), PREPROCESS, augment=augment, seed=seed, workers=workers, labels=labels)


def seen(given: ImageExamples) -> list[Tensor]:
    return [images for images, _ in given.stream(DRAWS)]


def test_without_augmentation_images_are_as_evaluation_sees_them(photos: Path) -> None:
    given = examples(photos)
    plain = open_images(photos).tensor(PREPROCESS)
    for (images, labels), draws in zip(given.stream(DRAWS), DRAWS, strict=True):
        numbers = [number for _, number in draws]
        assert torch.equal(images, plain[numbers])
        assert labels is not None
        assert torch.equal(labels, open_images(photos).labels[numbers])
    assert given.fixed
    assert next(iter(examples(photos, labels=False).stream(DRAWS)))[1] is None


@pytest.mark.parametrize("augment", ["crop", "deit"])
def test_an_augmented_image_follows_from_seed_epoch_and_number(photos: Path, augment: str) -> None:
    first, second = seen(examples(photos, augment))
    assert not examples(photos, augment).fixed
    assert not torch.equal(first[0], second[0]), "another epoch"
    assert not torch.equal(first[0], seen(examples(photos, augment, seed=1))[0][0]), "another seed"
    random.seed(5)
    torch.manual_seed(5)
    alone = next(iter(examples(photos, augment).stream([[(1, 1)]])))[0]
    assert torch.equal(alone[0], second[0]), "whatever came before"


def test_workers_change_nothing(photos: Path) -> None:
    assert all(map(torch.equal, seen(examples(photos, "deit")), seen(examples(photos, "deit", workers=2))))


def test_random_numbers_of_others_go_on_as_if_nothing_had_been(photos: Path) -> None:
    wanted: list[tuple[float, float]] = []
    for augment in ("none", "deit"):
        random.seed(0)
        np.random.seed(0)
        next(iter(examples(photos, augment).stream(DRAWS)))
        wanted.append((random.random(), np.random.random()))
    assert wanted[0] == wanted[1]


def test_digests_tell_what_a_run_must_not_change(photos: Path) -> None:
    same = examples(photos).digest()
    assert same == examples(photos).digest()
    others = [examples(photos, "crop"), examples(photos, seed=1), examples(photos, labels=False)]
    assert len({same, *(other.digest() for other in others)}) == 4


def test_what_cannot_be_is_refused(photos: Path) -> None:
    with pytest.raises(UnknownNameError, match="crop"):
        examples(photos, "crops")
    with pytest.raises(InputError, match="no labels"):
        ImageExamples(open_images(photos, labels="none"), PREPROCESS)
    with pytest.raises(InputError, match="none"):
        ImageExamples(open_images(torch.zeros(2, 3, 8, 8)), None, augment="crop", labels=False)


def test_a_bad_image_is_named(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    given = ImageExamples(open_images(tmp_path, labels="none"), PREPROCESS, labels=False)
    with pytest.raises(DataError, match=r"bad\.png"):
        next(iter(given.stream([[(0, 0)]])))
