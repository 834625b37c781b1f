"""Parquet in the layout of Hugging Face datasets: a column of encoded images, and one of labels or none.

One row group is held at a time, encoded, and as many as ROOM bytes hold where images are asked for one by one in any
order; nothing decoded is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.core.errors import DataError, MissingExtraError
from vitq.data.decode import ADVICE
from vitq.data.stores import Thunk

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
ROOM = 2**28  # in every process that reads
WINDOW = 512  # images of a shuffled order for which each row group is read only once


class ParquetStore:
    """Rows of one or more Parquet files, in file order."""

    def __init__(self, where: str, files: list[Any], column: str, ids: list[str], labels: Tensor | None) -> None:
        self.where, self.files, self.column = where, files, column
        self.ids, self.labels = ids, labels
        self.starts: list[tuple[int, int, int]] = []  # first row, file, row group
        row = 0
        for number, file in enumerate(files):
            for group in range(file.num_row_groups):
                self.starts.append((row, number, group))
                row += file.metadata.row_group(group).num_rows
        self.bounds = torch.tensor([start for start, _, _ in self.starts])
        self.held: OrderedDict[int, tuple[Any, int]] = OrderedDict()  # group -> its column, bytes; last used last

    def thunks(self, indices: Sequence[int]) -> Iterator[Thunk]:
        for first in range(0, len(indices), WINDOW):
            window = indices[first : first + WINDOW]
            rows = torch.tensor(window)
            places = (torch.searchsorted(self.bounds, rows, right=True) - 1).tolist()
            data: dict[int, bytes | None] = {}
            # Ends with the group of the last row, where an ordered reader goes on.
            for place in sorted(set(places)):
                table = self._group(place)
                start = self.starts[place][0]
                for index, where in zip(window, places, strict=True):
                    if where == place:
                        data[index] = _bytes(table[index - start])
            for index in window:
                yield partial(_present, data[index], self.ids[index])

    def one(self, index: int) -> Thunk:
        place = int(torch.searchsorted(self.bounds, index, right=True)) - 1
        column = self._group(place, ROOM)
        return partial(_present, _bytes(column[index - self.starts[place][0]]), self.ids[index])

    def _group(self, place: int, room: int = 0) -> Any:
        if place not in self.held:
            _, number, group = self.starts[place]
            size = self.files[number].metadata.row_group(group).total_byte_size
            while self.held and size + sum(held for _, held in self.held.values()) > room:
                self.held.popitem(last=False)  # let go of old groups before the new one is read
            try:
                table = self.files[number].read_row_group(group, columns=[self.column])
            except Exception as error:  # pyarrow's errors have no common base of their own
                raise DataError(f"{self.where}: row group {group} cannot be read ({error}).") from error
            self.held[place] = table.column(self.column), size
        self.held.move_to_end(place)
        return self.held[place][0]


def _bytes(cell: Any) -> bytes | None:
    value: Any = cell.as_py()
    found: bytes | None = value["bytes"] if isinstance(value, dict) else value
    return found


def _present(data: bytes | None, name: str) -> bytes:
    if data is None:
        raise DataError(f"image {name!r} has no bytes in the Parquet file (only a path?). {ADVICE}")
    return data


def open_parquet(paths: list[Path], labels: str) -> ParquetStore:
    """A store over the files, in the order given; ids are row-000000 and up, counted over all files.

    Raises:
        DataError: damaged file, no image column, labels that are not whole numbers, no rows.
        MissingExtraError: without pyarrow.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "hf", "reading Parquet") from error

    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    files = []
    for path in paths:
        try:
            files.append(pq.ParquetFile(path))
        except Exception as error:  # pyarrow's errors have no common base of their own
            raise DataError(
                f"{path}: cannot be read as Parquet ({error}). The file is truncated or of another kind."
            ) from error
    names = list(files[0].schema_arrow.names)
    column = next((name for name in IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise DataError(f"{where}: no column 'image' or 'img'; the columns are {', '.join(names)}.")
    for path, file in zip(paths, files, strict=True):
        _check_image_type(file.schema_arrow, column, path)
    rows = sum(file.metadata.num_rows for file in files)
    if rows == 0:
        raise DataError(f"{where}: no rows. Give a file with images.")
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    found = None if labels == "none" or label is None else _labels(files, label, where)
    return ParquetStore(where, files, column, [f"row-{row:06d}" for row in range(rows)], found)


def _check_image_type(schema: Any, column: str, path: Path) -> None:
    if column not in schema.names:
        raise DataError(f"{path}: no column {column!r}, which the other files have.")
    kind = str(schema.field(column).type)
    encoded = kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: " in kind)
    if not encoded:
        raise DataError(
            f"{path}: column {column!r} is {kind}, expected encoded images: binary, or struct "
            "{bytes, path} as Hugging Face datasets writes them."
        )


def _labels(files: list[Any], column: str, where: str) -> Tensor | None:
    values: list[int | None] = []
    for file in files:
        table = file.read(columns=[column])
        kind = str(table.schema.field(column).type)
        if not kind.startswith(("int", "uint")):
            raise DataError(
                f"{where}: column {column!r} is {kind}, expected whole numbers (class indices). "
                "Read the images without labels (labels='none'), or encode the classes."
            )
        values.extend(table.column(column).to_pylist())
    if all(value is None or value == -1 for value in values):
        return None  # how datasets marks a test split whose labels are not published
    if None in values:
        raise DataError(f"{where}: row {values.index(None)} has no label, while others have one.")
    return torch.tensor(values)
