"""What a model predicts, image by image: files of it, and matching several of them.

File:    CSV with the columns file, label, predicted; more columns are allowed and ignored
Shapes:  labels, predicted  (N,) int64, class indices; label -1 = the true class is not known
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitq.core.errors import ArtifactError, DataError, InputError
from vitq.core.files import write_text

COLUMNS = ("file", "label", "predicted")
UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class Predictions:
    """One predicted class per image.

    Attributes:
        ids: file names relative to the data, with forward slashes; each at most once.
        labels: true classes, int64 (N,); -1 where unknown.
        predicted: predicted classes, int64 (N,).

    Raises:
        InputError: the three do not have one length.
    """

    ids: list[str]
    labels: Tensor
    predicted: Tensor

    def __post_init__(self) -> None:
        n = (len(self.ids),)
        if self.labels.shape != n or self.predicted.shape != n:
            raise InputError(
                f"{len(self.ids)} ids need as many labels and predictions, not shapes "
                f"{tuple(self.labels.shape)} and {tuple(self.predicted.shape)}."
            )

    @property
    def correct(self) -> Tensor:
        """Bool (N,); False where the label is unknown."""
        return self.predicted == self.labels


@dataclass(frozen=True)
class Alignment:
    """The images that several predictions share.

    Attributes:
        ids: the part of the path that all have in common, in the order of the first predictions.
        labels: int64 (M,); known if any of the predictions knows it, else -1.
        predicted: one int64 (M,) per predictions given.
        left_out: per predictions given, how many of its images the others lack.
    """

    ids: list[str]
    labels: Tensor
    predicted: list[Tensor]
    left_out: list[int]


def write_predictions(path: str | os.PathLike[str], predictions: Predictions) -> None:
    """Write a predictions file; an existing one stays whole until the new one is complete.

    Raises:
        DataError: an id is empty or occurs twice.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    _check_ids(predictions.ids, f"predictions for {path}")
    # The csv module (seen in Python 3.11) leaves a bare carriage return unquoted, which ends the row.
    odd = any("\r" in each for each in predictions.ids)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
    writer.writerow(COLUMNS)
    writer.writerows(zip(predictions.ids, predictions.labels.tolist(), predictions.predicted.tolist(), strict=True))
    try:
        write_text(path, text.getvalue())  # file names that are not valid UTF-8 come back unchanged
    except OSError as error:
        raise ArtifactError(f"predictions cannot be written to {path}: {error.strerror or error}.") from error


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read a file written by `write_predictions`, or by another tool in the same columns.

    Raises:
        DataError: the file is missing, empty, lacks a column, holds something that is not a class
            index, or names an image twice. The message says in which line.
    """
    path = Path(path)
    ids: list[str] = []
    labels: list[int] = []
    predicted: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} is not a predictions file: its first line must name the columns "
                    f"{', '.join(COLUMNS)}; {', '.join(missing)} not found."
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                ids.append(row["file"])
                labels.append(_class_index(row["label"], UNKNOWN_LABEL, "label", where))
                predicted.append(_class_index(row["predicted"], 0, "predicted", where))
    except OSError as error:
        raise DataError(f"predictions cannot be read from {path}: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file: {error}.") from error
    if not ids:
        raise DataError(f"{path} holds no predictions.")
    _check_ids(ids, str(path))
    return Predictions(ids, torch.tensor(labels), torch.tensor(predicted))


def align(predictions: Sequence[Predictions]) -> Alignment:
    """Bring the images that all predictions share into one order, the first one's.

    Ids are compared as they are. Where none is equal, a leading folder that all ids of one side
    share is taken off, as few folders as possible: report/n01440764/x.jpg is n01440764/x.jpg.

    Raises:
        InputError: no predictions given.
        DataError: no image is in all of them, an id occurs twice, or labels of an image disagree.
    """
    if not predictions:
        raise InputError("align needs at least one set of predictions.")
    for number, each in enumerate(predictions):
        _check_ids(each.ids, f"predictions {number}")
    first = predictions[0]
    # One map per predictions, from row of the first to row of this one.
    rows = [_matching_rows(first.ids, other.ids) for other in predictions]
    shared = [row for row in range(len(first.ids)) if all(row in found for found in rows)]
    if not shared:
        firsts = ", ".join(repr(each.ids[0]) for each in predictions if each.ids)
        raise DataError(f"no image is in all of the predictions; they begin with {firsts}.")
    order = [torch.tensor([found[row] for row in shared]) for found in rows]
    ids = [
        _common_suffix([each.ids[found[row]] for each, found in zip(predictions, rows, strict=True)]) for row in shared
    ]
    labels = torch.full((len(shared),), UNKNOWN_LABEL)
    for each, index in zip(predictions, order, strict=True):
        own = each.labels[index]
        differs = (labels >= 0) & (own >= 0) & (labels != own)
        if bool(differs.any()):
            at = int(differs.nonzero()[0])
            raise DataError(
                f"labels disagree for {ids[at]}: {int(labels[at])} and {int(own[at])}. "
                f"Were the predictions made with the same class order?"
            )
        labels = torch.where(labels >= 0, labels, own)
    return Alignment(
        ids=ids,
        labels=labels,
        predicted=[each.predicted[index] for each, index in zip(predictions, order, strict=True)],
        left_out=[len(each.ids) - len(shared) for each in predictions],
    )


def _matching_rows(ids: list[str], others: list[str]) -> dict[int, int]:
    """Row in ids -> row in others of the same image, for the least number of folders taken off."""
    ours, theirs = len(_common_folders(ids)), len(_common_folders(others))
    depths = [(i, j) for i in range(ours + 1) for j in range(theirs + 1)]
    for i, j in sorted(depths, key=lambda depth: (sum(depth), depth)):
        row_of = {_without_folders(other, j): row for row, other in enumerate(others)}
        keys = ((row, _without_folders(each, i)) for row, each in enumerate(ids))
        found = {row: row_of[key] for row, key in keys if key in row_of}
        if found:
            return found
    return {}


def _common_folders(ids: Iterable[str]) -> list[str]:
    folders = [each.split("/")[:-1] for each in ids]
    # The common start of the smallest and the largest list is common to all between them.
    return _common_start([min(folders), max(folders)]) if folders else []


def _common_start(paths: list[list[str]]) -> list[str]:
    start: list[str] = []
    # zip stops at the shortest path, which is where the common start ends at the latest.
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        start.append(parts[0])
    return start


def _common_suffix(ids: list[str]) -> str:
    return "/".join(reversed(_common_start([each.split("/")[::-1] for each in ids])))


def _without_folders(path: str, count: int) -> str:
    return path.split("/", count)[-1]


def _class_index(text: str | None, least: int, column: str, where: str) -> int:
    digits = (text or "").strip()
    # int() alone would also take "1_0", digits of other scripts, and more of them than int64 holds.
    whole = digits.isascii() and digits.removeprefix("-").isdigit() and len(digits) < 10
    if whole and int(digits) >= least:
        return int(digits)
    raise DataError(f"{where}: {column} must be a class index, not {text!r}.")


def _check_ids(ids: list[str], where: str) -> None:
    seen: set[str] = set()
    for each in ids:
        if not each:
            raise DataError(f"{where}: an image has no file name.")
        if each in seen:
            raise DataError(f"{where}: image {each!r} occurs twice.")
        seen.add(each)
