"""Folders, lists and labels.csv: what is an image, and which label it gets."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from vitq.core.errors import DataError
from vitq.data.images import open_images
from vitq.data.preprocess import Preprocess

# Ranks of a few wnids among the 1000 of ImageNet-1k.
WNIDS = {"n01440764": 0, "n01443537": 1, "n02123045": 281, "n15075141": 999}


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (len(path.name), 0, 0)).save(path)
    return path


def labels_of(root: Path, **options: object) -> dict[str, int]:
    images = open_images(root, **options)  # type: ignore[arg-type]
    assert images.labels is not None
    return dict(zip(images.ids, images.labels.tolist(), strict=True))


def test_sub_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/x/2.png", "cat/3.JPEG", "eel/4.webp"):
        write(tmp_path / name)
    assert labels_of(tmp_path) == {"cat/3.JPEG": 0, "cat/x/2.png": 0, "dog/1.png": 1, "eel/4.webp": 2}


def test_wnids_map_to_their_rank_even_where_some_are_missing(tmp_path: Path) -> None:
    for wnid in WNIDS:
        write(tmp_path / wnid / "a.jpg")
    assert labels_of(tmp_path, num_classes=1000) == {f"{w}/a.jpg": rank for w, rank in WNIDS.items()}
    assert list(labels_of(tmp_path, num_classes=4).values()) == [0, 1, 2, 3]
    with pytest.raises(DataError, match="10 classes"):
        open_images(tmp_path, num_classes=10)


def test_one_name_that_is_no_wnid_makes_it_a_sorted_index(tmp_path: Path) -> None:
    for name in (*WNIDS, "other"):
        write(tmp_path / name / "a.jpg")
    assert list(labels_of(tmp_path).values()) == [0, 1, 2, 3, 4]


def test_a_wnid_outside_imagenet_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "n01440764" / "a.jpg")
    write(tmp_path / "n00000001" / "a.jpg")
    with pytest.raises(DataError, match="n00000001"):
        open_images(tmp_path)


def test_an_empty_class_folder_keeps_its_index(tmp_path: Path) -> None:
    write(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / ".cache").mkdir()
    assert labels_of(tmp_path) == {"b/1.png": 1}


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a b" / "ein Bild ä 图.png")
    write(tmp_path / "a b" / ".hidden.png")
    write(tmp_path / ".git" / "x.png")
    (tmp_path / "a b" / "notes.md").write_text("x")
    images = open_images(tmp_path)
    assert images.ids == ["a b/ein Bild ä 图.png"]
    assert images.tensor(Preprocess.from_image_size(8)).shape == (1, 3, 8, 8)


def test_unlabelled_folders_are_read_flat_or_nested(tmp_path: Path) -> None:
    write(tmp_path / "flat" / "b.png")
    write(tmp_path / "flat" / "a.png")
    images = open_images(tmp_path / "flat")
    assert (images.ids, images.labels) == (["a.png", "b.png"], None)
    write(tmp_path / "deep" / "x" / "y" / "z.png")
    write(tmp_path / "deep" / "w.png")
    nested = open_images(tmp_path / "deep", labels="none")
    assert (nested.ids, nested.labels) == (["w.png", "x/y/z.png"], None)
    assert open_images(tmp_path / "flat" / "a.png").ids == ["a.png"]


def test_unclear_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mixed" / "x.png")
    write(tmp_path / "mixed" / "cat" / "y.png")
    with pytest.raises(DataError, match=r"both images \(x\.png\)"):
        open_images(tmp_path / "mixed")
    write(tmp_path / "splits" / "train" / "cat" / "y.png")
    write(tmp_path / "splits" / "val" / "cat" / "y.png")
    with pytest.raises(DataError, match="train, val"):
        open_images(tmp_path / "splits")


def test_missing_empty_and_foreign_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(tmp_path / "none")
    with pytest.raises(DataError, match="no images in the folder"):
        open_images(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.zip is no kind"):
        open_images(str(tmp_path / "x.zip"))


def write_csv(folder: Path, rows: list[list[str]]) -> Path:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_labels_csv_gives_the_labels_and_the_order(tmp_path: Path) -> None:
    for name in ("b.png", "sub dir/ä.png", "unlisted.png"):
        write(tmp_path / name)
    write_csv(tmp_path, [["file", "label"], ["sub dir/ä.png", "7"], ["b.png", "0"]])
    assert labels_of(tmp_path) == {"sub dir/ä.png": 7, "b.png": 0}
    assert open_images(tmp_path, labels="none").labels is None
    with pytest.raises(DataError, match=r"label 7 of 'sub dir/ä\.png'"):
        open_images(tmp_path, num_classes=5)


def test_labels_csv_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\r\na.png, 3\r\n", encoding="utf-8-sig")
    assert labels_of(tmp_path) == {"a.png": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file", "label"], ["a.png", "1"], ["gone.png", "2"]], r"1 of 2 files are missing: 'gone\.png'"),
        ([["name", "class"], ["a.png", "1"]], "header is 'name,class', expected 'file,label'"),
        ([["a.png", "1"]], "expected 'file,label'"),
        ([["file", "label"], ["a.png", "cat"]], "line 2: label 'cat' is not a whole number"),
        ([["file", "label"], ["a.png", "1.5"]], "not a whole number"),
        ([["file", "label"], ["a.png"]], "label None is not a whole number"),
        ([["file", "label"], ["a.png", "-3"]], "label -3"),
        ([["file", "label"], ["", "1"]], "missing"),
        ([["file", "label"], ["a.png", "1"], ["a.png", "1"]], "named more than once"),
        ([["file", "label"]], "names no images"),
        ([], "expected 'file,label'"),
    ],
)
def test_a_labels_csv_that_cannot_be_used_says_why(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        open_images(write_csv(tmp_path, rows))


def test_a_labels_csv_that_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        open_images(tmp_path)


def test_a_list_names_images_relative_to_itself_or_to_a_root(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "a b.png")
    write(tmp_path / "photos" / "c.png")
    beside = tmp_path / "photos" / "list.txt"
    beside.write_text("# calibration\nc.png\n\na b.png\n", encoding="utf-8")
    assert open_images(beside).ids == ["c.png", "a b.png"]
    away = tmp_path / "lists" / "list.txt"
    away.parent.mkdir()
    away.write_text("photos/c.png\n", encoding="utf-8")
    assert open_images(away, root=tmp_path).tensor(Preprocess.from_image_size(8)).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"1 of 1 files are missing: 'photos/c\.png'"):
        open_images(away)
    away.write_text("\n")
    with pytest.raises(DataError, match="names no images"):
        open_images(away)
    away.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        open_images(away)


@pytest.mark.real
def test_the_shared_photos_get_the_labels_that_official_code_used(shared: Path) -> None:
    with (shared / "reference/peer_predictions/report/float.csv").open(newline="") as file:
        wanted = {row["file"].removeprefix("report/"): int(row["label"]) for row in csv.DictReader(file)}
    assert labels_of(shared / "data/imagenet_sample/report", num_classes=1000) == wanted
    with pytest.raises(DataError, match="splits rather than classes"):
        open_images(shared / "data/imagenet_sample")


@pytest.mark.real
def test_the_shared_calibration_lists_open(shared: Path) -> None:
    lists = sorted((shared / "reference/peer_predictions").rglob("calibration_seed*.txt"))
    for path in lists:
        assert len(open_images(path, root=shared / "data/imagenet_sample")) == 32
    assert lists


def test_a_rank_is_no_class_where_folders_and_classes_differ_in_number(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    assert open_images(tmp_path, num_classes=3).labels is not None
    with pytest.raises(DataError, match=r"3 class folders and the model has 10 classes.*labels\.csv"):
        open_images(tmp_path, num_classes=10)
    assert len(open_images(tmp_path, num_classes=10, labels="none")) == 3
