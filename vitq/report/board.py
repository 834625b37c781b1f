"""The rows of a leaderboard in a CSV file and, beside it, which images each of them got right.

Files:   NAME.csv   one row per key; columns `images` and `top1` (percent) say how many images, and how many were right
         NAME.npz   for every row its images in their order, one bit each
Both are whole at every moment, and the second is written first.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import ArtifactError, DataError
from vitq.core.files import write_bytes
from vitq.report.table import append_rows, read_results

Row = Mapping[str, str]
RowKey = tuple[str, ...]


class Board:
    """A leaderboard's files, read when it is made and around every row that is added.

    Args:
        path: of the CSV file, which need not be there yet.
        columns: those that identify a row.

    Raises:
        DataError: files that hold something else.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.bits_path = path.with_suffix(".npz")
        self._read()

    def _read(self) -> None:
        rows = read_results(self.path) if self.path.exists() else []
        lacks = [name for name in (*self.columns, "images", "top1") if rows and name not in rows[0]]
        if lacks:
            raise DataError(f"{self.path} is no leaderboard: it has no column {', '.join(lacks)}; choose another file")
        self.rows: dict[RowKey, Row] = {self.key_of(row): row for row in rows}
        self._packed: dict[str, np.ndarray] = {}
        if self.bits_path.exists():
            try:
                with np.load(self.bits_path, allow_pickle=False) as file:
                    self._packed = {name: file[name] for name in file.files}
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{self.bits_path} cannot be read: {error}; delete it, and its rows are measured again"
                ) from error

    def key_of(self, row: Mapping[str, object]) -> RowKey:
        """What a row is known by."""
        return tuple(str(row[name]) for name in self.columns)

    def correct(self, key: RowKey) -> Tensor | None:
        """Which images a row got right, bool (N,); None where that is not known, or does not fit the row."""
        row, packed = self.rows.get(key), self._packed.get(_name(key))
        if row is None or packed is None or not row.get("images", "").isdigit():
            return None
        count = int(row["images"])
        if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
            return None
        right = torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))
        return right if abs(100 * float(right.double().mean()) - float(row["top1"])) < 1e-3 else None

    def add(self, row: Mapping[str, object], correct: Tensor | None) -> None:
        """Write a row, in the place of the one that has its key.

        Raises:
            ArtifactError: the files cannot be written; they are then as they were.
        """
        self._read()
        key = self.key_of(row)
        known = {_name(each) for each in (*self.rows, key)}
        packed = {name: bits for name, bits in self._packed.items() if name in known and name != _name(key)}
        if correct is not None:
            packed[_name(key)] = np.packbits(correct.numpy())
        data = io.BytesIO()
        np.savez_compressed(data, **packed)  # type: ignore[arg-type]
        try:
            write_bytes(self.bits_path, data.getvalue())
        except OSError as error:
            raise ArtifactError(f"{self.bits_path} cannot be written: {error.strerror or error}") from error
        append_rows(self.path, [row], self.columns)
        self._read()

    def change(self, key: RowKey, **cells: object) -> None:
        """Fill in cells of a row that is there."""
        append_rows(self.path, [{**self.rows[key], **cells}], self.columns)
        self._read()


def changed(old: Row, new: Mapping[str, object], parts: Sequence[str]) -> list[str]:
    """Which of these columns differ."""
    return [name for name in parts if old.get(name, "") != str(new[name])]


def _name(key: RowKey) -> str:
    """A member's name in the second file: parts are joined by what no file or recipe name holds."""
    return "|".join(key)
