"""Folders and lists of image files, and the labels that their names or a labels.csv give them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.core.errors import DataError
from vitq.data.checkpoint import some
from vitq.data.decode import EXTENSIONS
from vitq.data.stores import FileStore

WNID = re.compile(r"n\d{8}")
LABELS_FILE = "labels.csv"


def open_folder(root: Path, labels: str, num_classes: int | None) -> FileStore:
    """Image files below root. Hidden files and files that are no images by their extension are ignored.

    Raises:
        DataError: no images, or class folders that cannot be told from other folders.
    """
    if (root / LABELS_FILE).is_file():
        return _open_labelled(root, labels)
    ids = sorted(_images_below(root))
    if not ids:
        raise DataError(
            f"no images in the folder {str(root)!r} (looked for {' '.join(sorted(EXTENSIONS))}). Check the path."
        )
    nested = [name for name in ids if "/" in name]
    if labels == "none" or not nested:
        return _store(root, ids, None)
    if len(nested) < len(ids):
        loose = next(name for name in ids if "/" not in name)
        raise DataError(
            f"{str(root)!r} holds both images ({loose}) and folders of images, so its classes are unclear. "
            "Move the loose images away, or read all without labels (labels='none')."
        )
    classes = _folders(root)
    if all(name.count("/") >= 2 for name in nested):
        raise DataError(
            f"{str(root)!r} holds folders of folders ({some(classes)}): splits rather than classes? "
            "Name one of them, or read all without labels (labels='none')."
        )
    index = class_indices(classes, num_classes, str(root))
    return _store(root, ids, [index[name.split("/", 1)[0]] for name in ids])


def check_same_classes(learned: str | Path, tested: str | Path) -> None:
    """Refuse two places with class folders of which a folder's rank tells different classes.

    Raises:
        DataError: naming folders that only one of them has.
    """
    places = [Path(learned), Path(tested)]
    if any(not place.is_dir() or (place / LABELS_FILE).is_file() for place in places):
        return
    names = [set(_folders(place)) for place in places]
    if names[0] == names[1] or all(WNID.fullmatch(name) for name in names[0] | names[1]):
        return
    raise DataError(
        f"{places[0]} and {places[1]} have other class folders ({some(sorted(names[0] ^ names[1]))}), so a folder's "
        f"rank does not tell its class. Give both the same folders, empty ones too, or a labels.csv (file,label)."
    )


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def class_indices(names: list[str], num_classes: int | None, where: str) -> dict[str, int]:
    """Class index by folder name.

    Where every name is an ImageNet wnid (n and 8 digits) the index is the wnid's rank among all 1000,
    unless the model has exactly one class per folder; otherwise it is the rank among the folders.

    Raises:
        DataError: a wnid outside ImageNet-1k, or another number of folders than the model has classes.
    """
    one_each = num_classes == len(names)
    if one_each or not all(WNID.fullmatch(name) for name in names):
        if num_classes is not None and not one_each:
            raise DataError(
                f"{where} has {len(names)} class folders and the model has {num_classes} classes, so a folder's rank "
                f"does not tell its class. Give one folder per class, or a labels.csv (file,label) with class indices."
            )
        return {name: rank for rank, name in enumerate(sorted(names))}
    from timm.data.imagenet_info import ImageNetInfo

    library: Any = ImageNetInfo()
    ranks = {wnid: rank for rank, wnid in enumerate(sorted(library.label_names()))}
    foreign = [name for name in names if name not in ranks]
    if foreign:
        raise DataError(
            f"{where}: {len(foreign)} folder(s) named by a wnid outside ImageNet-1k: {some(foreign)}. "
            "Give a labels.csv (file,label) with the class indices of your model."
        )
    return {name: ranks[name] for name in names}


def open_list(path: Path, root: Path | None) -> FileStore:
    """The image files named in a text file, one a line; empty lines and lines starting with # are skipped.

    Paths are relative to root, or to the folder of the list where root is None.

    Raises:
        DataError: no names, or files that are missing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text. Save it as UTF-8, one image path a line.") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise DataError(f"{path.name} names no images. Write one path a line.")
    root = path.parent if root is None else root
    _check_exist(root, names, path.name)
    return FileStore(str(path), [root / name for name in names], names, None)


def _open_labelled(root: Path, labels: str) -> FileStore:
    path = root / LABELS_FILE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a UTF-8 CSV file ({error}). Save it again as UTF-8.") from error
    needed = {"file"} if labels == "none" else {"file", "label"}
    if not needed <= set(header):
        raise DataError(f"{path}: the header is {','.join(header)!r}, expected 'file,label'.")
    if not rows:
        raise DataError(f"{path}: names no images. Write one line file,label for each.")
    names = [(row["file"] or "").strip() for row in rows]
    _check_exist(root, names, str(path))
    if labels == "none":
        return FileStore(str(root), [root / name for name in names], names, None)
    values = []
    for line, row in enumerate(rows, 2):
        try:
            values.append(int((row["label"] or "").strip()))
        except ValueError as error:
            raise DataError(
                f"{path}, line {line}: label {row['label']!r} is not a whole number. "
                "Write the class index that the model gives."
            ) from error
    return FileStore(str(root), [root / name for name in names], names, torch.tensor(values))


def _check_exist(root: Path, names: list[str], where: str) -> None:
    missing = [name for name in names if not name or not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(names)} files are missing: {some(map(repr, missing))}. "
            f"Paths are relative to the folder {str(root)!r}."
        )
    repeated = sorted({name for name in names if names.count(name) > 1}) if len({*names}) < len(names) else []
    if repeated:
        raise DataError(f"{where}: {len(repeated)} file(s) named more than once: {some(repeated)}.")


def _images_below(root: Path) -> Iterable[str]:
    """Paths relative to root with '/', in no certain order."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield (Path(folder) / name).relative_to(root).as_posix()


def _store(root: Path, ids: list[str], labels: list[int] | None) -> FileStore:
    tensor: Tensor | None = None if labels is None else torch.tensor(labels)
    return FileStore(str(root), [root / name for name in ids], ids, tensor)
