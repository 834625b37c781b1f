"""Parquet in the layout of Hugging Face datasets."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitq.core.errors import DataError, MissingExtraError
from vitq.data import parquet
from vitq.data.images import open_images
from vitq.data.parquet import ParquetStore
from vitq.data.preprocess import Preprocess

pa = pytest.importorskip("pyarrow", reason="needs pyarrow (extra 'hf')")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (extra 'hf')")
SMALL = Preprocess.from_image_size(8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 2 * value, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, values: range, columns: dict[str, Any] | None = None, image: str = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    columns = {"label": list(values)} if columns is None else columns
    pq.write_table(pa.table({image: images} | columns), path, row_group_size=3)
    return path


def test_rows_come_in_order_and_in_any_order(tmp_path: Path) -> None:
    images = open_images(write(tmp_path / "a.parquet", range(10)))
    assert images.ids[3] == "row-000003"
    assert images.labels is not None
    assert images.labels.tolist() == list(range(10))
    whole = images.tensor(SMALL)
    assert torch.allclose((whole[:, 0, 0, 0] + 1) * 127.5, torch.arange(10.0), atol=1e-3)
    order = [9, 0, 5, 3, 4, 4]
    assert torch.equal(images.subset(order).tensor(SMALL), whole[order])
    assert images.digests([7]) == [hashlib.sha256(png(7)).hexdigest()]
    images.check()


def test_a_folder_of_files_is_one_set(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / "data" / f"test-0000{index}.parquet", range(index * 4, index * 4 + 4))
    for folder in (tmp_path, tmp_path / "data"):
        images = open_images(folder)
        assert images.labels is not None
        assert images.labels.tolist() == list(range(12))
        assert images.sample(5, 0).tensor(SMALL).shape == (5, 3, 8, 8)


def test_a_shuffled_read_opens_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(write(tmp_path / "a.parquet", range(30))).sample(30, 0)
    reads: list[int] = []
    original = ParquetStore._group

    def counted(self: ParquetStore, place: int) -> Any:
        reads.append(place)
        return original(self, place)

    monkeypatch.setattr(ParquetStore, "_group", counted)
    images.tensor(SMALL)
    assert sorted(reads) == list(range(10))


def test_single_images_in_any_order_read_each_row_group_once_if_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(write(tmp_path / "a.parquet", range(30)))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    whole, store, reads = images.tensor(SMALL), images._store, list[int]()
    assert isinstance(store, ParquetStore)
    assert len(store.held) == 1, "an ordered reader holds one"
    for room, most in ((2**28, 10), (0, 30)):
        store.held.clear()
        reads.clear()
        monkeypatch.setattr(parquet, "ROOM", room)
        file = store.files[0]
        monkeypatch.setattr(store, "files", [Counted(file, reads)])
        for number in order:
            assert torch.equal(images.image(number, SMALL.transform()), whole[number])
        monkeypatch.setattr(store, "files", [file])
        assert len(reads) == most if room else 10 < len(reads) <= most
        assert len(store.held) == (10 if room else 1)


class Counted:
    """A file that notes which row groups are read."""

    def __init__(self, file: Any, reads: list[int]) -> None:
        self.metadata, self.file, self.reads = file.metadata, file, reads

    def read_row_group(self, group: int, columns: list[str]) -> Any:
        self.reads.append(group)
        return self.file.read_row_group(group, columns=columns)


def test_img_columns_plain_bytes_and_missing_labels_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(2), {}, image="img")
    assert open_images(tmp_path / "a.parquet").labels is None
    pq.write_table(pa.table({"image": [png(1)], "label": [-1]}), tmp_path / "b.parquet")
    assert open_images(tmp_path / "b.parquet").labels is None
    assert open_images(tmp_path / "b.parquet").tensor(SMALL).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": [b"x"]}, "no column 'image' or 'img'; the columns are picture"),
        ({"image": ["a.png"]}, "expected encoded images"),
        ({"image": [b"x"], "label": ["cat"]}, "expected whole numbers"),
        ({"image": [b"x", b"y"], "label": [1, None]}, "row 1 has no label"),
        ({"image": [b"x"], "label": [12]}, "label 12 of 'row-000000'.*10 classes"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "a.parquet", num_classes=10)


def test_damaged_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", range(4))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_images(path)
    write(tmp_path / "b.parquet", range(0), {"label": pa.array([], pa.int64())})
    with pytest.raises(DataError, match=r"no rows|expected encoded"):
        open_images(tmp_path / "b.parquet")


def test_a_row_without_bytes_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "x.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row-000001"):
        images.tensor(SMALL)
    assert len(images.tensor(SMALL, skip_bad=True)) == 1
    assert images.skipped == ["row-000001"]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", range(1))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"vitq\[hf\]"):
        open_images(path)


@pytest.mark.real
def test_the_shared_cifar_opens_without_decoding_it_all(shared: Path) -> None:
    images = open_images(shared / "data" / "cifar10" / "test.parquet", num_classes=10)
    assert len(images) == 10_000
    assert images.sample(32, 0).tensor(Preprocess.from_image_size(32)).shape == (32, 3, 32, 32)
