"""Every kind of image data gives the same ImageSet behaviour; reading order, skipping, sampling, overlap."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitq.core.errors import DataError, InputError
from vitq.data.images import ImageSet, open_images, without_overlap
from vitq.data.preprocess import Preprocess
from vitq.data.zoo import seeded_images

SMALL = Preprocess.from_image_size(16)


def picture(seed: int = 0, size: int = 24) -> Image.Image:
    pixels = (seeded_images(1, size=size, seed=seed)[0] + 1) * 127.5
    return Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Forty unlabelled images."""
    for index in range(40):
        write(tmp_path / "flat" / f"{index:02d}.png", index)
    return tmp_path / "flat"


def read(images: ImageSet, batch_size: int, **options: Any) -> tuple[Tensor, list[str]]:
    batches = list(images.batches(SMALL, batch_size, **options))
    return torch.cat([b.images for b in batches]), [name for b in batches for name in b.ids]


def test_batch_size_only_splits(flat: Path) -> None:
    images = open_images(flat)
    whole, ids = read(images, 40)
    assert ids == images.ids == [f"{index:02d}.png" for index in range(40)]
    for batch_size in (1, 7, 100):
        other, names = read(images, batch_size)
        assert torch.equal(whole, other)
        assert names == ids
    assert torch.equal(images.tensor(SMALL), whole)
    assert whole.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_are_decoded_as_timm_does(tmp_path: Path) -> None:
    from timm.data import ImageDataset

    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held sideways: timm's loader ignores it, so do we
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "rotated.jpg", exif=exif)
    picture(2).convert("L").save(tmp_path / "a" / "gray.jpg")
    picture(3).convert("CMYK").save(tmp_path / "a" / "cmyk.jpg")
    picture(4).convert("P").save(tmp_path / "a" / "palette.gif")
    alpha = picture(5)
    alpha.putalpha(60)
    alpha.save(tmp_path / "a" / "alpha.png")
    theirs = ImageDataset(str(tmp_path), transform=SMALL.transform())
    wanted = {Path(theirs.filename(i)).name: theirs[i][0] for i in range(len(theirs))}
    images = open_images(tmp_path)
    assert {name.split("/")[1] for name in images.ids} >= wanted.keys() >= {"rotated.jpg", "cmyk.jpg"}
    for name, image in zip(images.ids, images.tensor(SMALL), strict=True):
        if name.split("/")[1] in wanted:
            assert torch.equal(image, wanted[name.split("/")[1]])


def test_a_palette_with_transparency_needs_no_warning(tmp_path: Path) -> None:
    image = picture().convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(100)))
    expected = SMALL.transform()(Image.open(tmp_path / "p.png").convert("RGBA").convert("RGB"))
    assert torch.equal(open_images(tmp_path).tensor(SMALL)[0], expected)


def test_digests_are_those_of_the_files(flat: Path) -> None:
    images = open_images(flat)
    wanted = [hashlib.sha256((flat / name).read_bytes()).hexdigest() for name in images.ids]
    assert images.digests() == wanted
    assert images.digests([3, 1]) == [wanted[3], wanted[1]]
    assert images.subset([5, 2]).digests([1]) == [wanted[2]]


def test_a_sample_depends_on_the_seed_alone(flat: Path) -> None:
    images = open_images(flat)
    once, again, other = images.sample(8, 0), images.sample(8, 0), images.sample(8, 1)
    assert once.ids == again.ids != other.ids
    assert images.sample(12, 0).ids[:8] == once.ids, "a larger sample starts with the smaller one"
    assert once.ids == [images.ids[i] for i in np.random.default_rng(0).permutation(40)[:8]]
    with pytest.raises(DataError, match=r"asked 41, found 40 in .*flat"):
        images.sample(41, 0)
    with pytest.raises(InputError):
        images.sample(0, 0)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_bad_image_is_named_or_skipped_when_asked(flat: Path, damage: str) -> None:
    victim = flat / "07.png"
    data = victim.read_bytes()
    victim.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"not an image"}[damage])
    images = open_images(flat)
    with pytest.raises(DataError, match=r"07\.png"):
        read(images, 8)
    good, ids = read(images, 8, skip_bad=True)
    assert images.skipped == ["07.png"]
    assert len(good) == 39
    assert "07.png" not in ids
    assert [len(b.images) for b in images.batches(SMALL, 8, skip_bad=True)] == [8, 8, 8, 8, 7]
    with pytest.raises(DataError, match=r"07\.png"):
        images.check()


def test_check_counts_the_bad_and_passes_the_good(flat: Path) -> None:
    open_images(flat).check()
    for name in ("03.png", "04.png"):
        (flat / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"03\.png.*2 of 40"):
        open_images(flat).check()
    open_images(flat).check(sample=2)


def test_a_file_that_vanishes_is_named(flat: Path) -> None:
    images = open_images(flat)
    (flat / "11.png").unlink()
    with pytest.raises(DataError, match=r"11\.png"):
        read(images, 8)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no readable image"):
        read(open_images(tmp_path), 4, skip_bad=True)


def test_reading_stops_cleanly_and_reports_progress(flat: Path) -> None:
    images = open_images(flat)
    done: list[int] = []
    batches = images.batches(SMALL, 16, on_batch=done.append)
    next(batches)
    next(batches)
    assert done == [16]
    assert isinstance(batches, Iterator)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("vitq-decode")]
    list(images.batches(SMALL, 16, on_batch=done.append))
    assert done[1:] == [16, 16, 8]


def test_images_need_preprocessing_and_a_batch_size(flat: Path) -> None:
    with pytest.raises(InputError, match="Preprocess"):
        open_images(flat).tensor(None)
    with pytest.raises(InputError, match="batch_size"):
        read(open_images(flat), 0)


def test_overlap_is_left_out_of_the_evaluation(flat: Path, tmp_path: Path) -> None:
    images = open_images(flat)
    (tmp_path / "eval").mkdir()
    for index, name in enumerate(images.ids[:5]):
        (tmp_path / "eval" / f"renamed{index}.png").write_bytes((flat / name).read_bytes())
    evaluation = open_images(tmp_path / "eval")
    kept, ids = without_overlap(images.subset([0, 3, 30]), evaluation)
    assert ids == ["renamed0.png", "renamed3.png"]
    assert kept.ids == ["renamed1.png", "renamed2.png", "renamed4.png"]
    assert without_overlap(images.subset([30]), evaluation) == (evaluation, [])
    with pytest.raises(DataError, match="all 5 images"):
        without_overlap(images, evaluation)


# Tensors and iterables.


def test_a_tensor_is_taken_as_it_is() -> None:
    x = seeded_images(6)
    images = open_images(x)
    assert images.ids[5] == "tensor-5"
    assert images.labels is None
    assert torch.equal(images.tensor(None), x)
    assert torch.equal(images.tensor(SMALL), x)
    assert images.digests()[2] == hashlib.sha256(x[2].numpy().tobytes()).hexdigest()
    images.check()
    assert repr(images).startswith("ImageSet(6 unlabelled")


@pytest.mark.parametrize(
    "batches",
    [
        [(seeded_images(4), torch.arange(4)), (seeded_images(2, seed=1), torch.tensor([3, 1]))],
        [
            {"pixel_values": seeded_images(4), "labels": torch.arange(4)},
            {"image": seeded_images(2, seed=1), "label": [3, 1]},
        ],
        (seeded_images(4).repeat(2, 1, 1, 1)[:6], torch.tensor([0, 1, 2, 3, 3, 1])),
        [*zip(seeded_images(6), [0, 1, 2, 3, 3, 1], strict=True)],
        ((x, y) for x, y in [(seeded_images(6), torch.tensor([0, 1, 2, 3, 3, 1]))]),
    ],
)
def test_any_iterable_of_batches_is_read(batches: Any) -> None:
    images = open_images(batches)
    assert len(images) == 6
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 3, 3, 1]
    assert torch.equal(images.tensor(None)[:4], seeded_images(4))
    labels = [b.labels.tolist() for b in images.batches(None, 4) if b.labels is not None]
    assert labels == [[0, 1, 2, 3], [3, 1]]
    assert open_images(images, labels="none").subset([1]).labels is None
    assert open_images(images).labels is not None


def test_pil_images_and_a_data_loader_are_read() -> None:
    images = open_images([{"image": picture(i), "label": i} for i in range(3)])
    assert images.tensor(SMALL).shape == (3, 3, 16, 16)
    assert len(set(images.digests())) == 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(seeded_images(5)), batch_size=2)
    assert torch.equal(open_images(loader).tensor(None), seeded_images(5))


def poisoned(value: float) -> Tensor:
    x = seeded_images(3)
    x[1, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (poisoned(float("nan")), "NaN or Inf in 1 of 3 images, the first is number 1"),
        ([poisoned(float("inf"))], "NaN or Inf"),
        (seeded_images(1)[0], "expected \\(N, C, H, W\\)"),
        (seeded_images(0), "no images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "preprocessed floats"),
        ([], "yields nothing"),
        ([seeded_images(1), seeded_images(1, size=16)], "different shapes"),
        ([(seeded_images(2), torch.arange(3))], "2 images and 3 labels"),
        ([(seeded_images(2), torch.rand(2))], "whole numbers"),
        ([(seeded_images(2), torch.arange(2)), seeded_images(2)], "differ in kind"),
        (["a.jpg"], "a str without images"),
        ([{"text": 3}], "a dict without images"),
        (3, "is not image data"),
        ({"image": seeded_images(1)}, "is not image data"),
    ],
)
def test_data_that_cannot_be_used_is_one_clear_error(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(data)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    data = [(seeded_images(2), torch.tensor([0, label]))]
    with pytest.raises(DataError, match=f"label {label} of 'tensor-1'.*4 classes"):
        open_images(data, num_classes=4)
    assert open_images(data, num_classes=4, labels="none").labels is None


def test_an_unknown_way_of_labelling_is_refused(flat: Path) -> None:
    with pytest.raises(InputError, match="'auto' or 'none'"):
        open_images(flat, labels="no")
