"""Results as CSV files, and tables made from them inside Markdown files.

A README keeps no number typed by hand: what stands between <!-- vitq:NAME --> and
<!-- /vitq:NAME --> is replaced by a table of the CSV the benchmarks wrote.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from vitq.core.errors import ArtifactError, DataError, InputError
from vitq.core.files import write_text


def read_results(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a results file, every value as text; a cell that is not there is "".

    Raises:
        DataError: the file is missing, has no heading, names a column twice, or a row is longer
            than the heading.
    """
    return _read(Path(path))[1]


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, object]], key: Sequence[str]) -> None:
    """Add rows to a results file, which is created if need be and is whole at every moment.

    A row whose key columns equal those of rows already there takes the place of the first of them,
    all cells included, and the rest of them go; other rows follow at the end, in order. Columns that
    are new come last. None is written as "".
    Two processes that append at once can lose rows of one of them.

    Args:
        rows: values are written with str().
        key: the columns that identify a row.

    Raises:
        InputError: no key, or a row that lacks a key column.
        DataError: the existing file is not a results file.
        ArtifactError: the file cannot be written.
    """
    if not key:
        raise InputError("append_rows needs at least one key column to tell rows apart.")
    path = Path(path)
    columns, kept = _read(path) if path.exists() else ([], [])
    for row in rows:
        missing = [name for name in key if name not in row]
        if missing:
            raise InputError(f"{path.name} is keyed by {', '.join(missing)}, which a row lacks: {dict(row)}.")
        text = {name: "" if value is None else str(value) for name, value in row.items()}
        columns += [name for name in text if name not in columns]
        same = [index for index, old in enumerate(kept) if _key(old, key) == _key(text, key)]
        kept = [old for index, old in enumerate(kept) if index not in same[1:]]
        if same:
            kept[same[0]] = text
        else:
            kept.append(text)
    if columns:
        _write(path, columns, kept)


def markdown_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str | tuple[str, str]]) -> str:
    """A Markdown table of some columns; those that hold only numbers are aligned right.

    Args:
        columns: names, or (name, heading) pairs, in the order wanted.

    Raises:
        InputError: no columns, or one that no row has.
    """
    if not columns:
        raise InputError("markdown_table needs at least one column.")
    pairs = [(column, column) if isinstance(column, str) else column for column in columns]
    known = list(dict.fromkeys(name for row in rows for name in row))
    missing = [name for name, _ in pairs if rows and name not in known]
    if missing:
        raise InputError(f"no row has the column {', '.join(missing)}. Known: {', '.join(known)}.")
    rules = ["---:" if _is_numeric(row.get(name, "") for row in rows) else "---" for name, _ in pairs]
    lines = [[_cell(heading) for _, heading in pairs], rules]
    lines += [[_cell(row.get(name, "")) for name, _ in pairs] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_section(text: str, name: str, body: str) -> str:
    """The text with `body` between <!-- vitq:name --> and <!-- /vitq:name -->; the rest is unchanged.

    Raises:
        InputError: the markers are missing, repeated or in the wrong order, or body holds one.
    """
    start, end = f"<!-- vitq:{name} -->", f"<!-- /vitq:{name} -->"
    if start in body or end in body:
        raise InputError(f"the new text of section {name!r} holds its own marker.")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise InputError(
            f"section {name!r} needs exactly one line {start} and, after it, one line {end}; "
            f"found {text.count(start)} and {text.count(end)}. Add them where the table shall stand."
        )
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return f"{before}{start}\n{body.strip()}\n{end}{after}"


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except OSError as error:
        raise DataError(f"results cannot be read from {path}: {error.strerror or error}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file: {error}.") from error
    if not lines:
        raise DataError(f"{path} is empty; a results file begins with a line of column names.")
    columns, *rows = lines
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} names a column twice: {', '.join(columns)}.")
    for row in rows:
        if len(row) > len(columns):
            raise DataError(f"{path}: a row has {len(row)} cells for {len(columns)} columns: {row}.")
    return columns, [dict(zip(columns, row + [""] * (len(columns) - len(row)), strict=True)) for row in rows]


def _write(path: Path, columns: list[str], rows: Sequence[Mapping[str, str]]) -> None:
    # The csv module (seen in Python 3.11) leaves a bare carriage return unquoted, which ends the row.
    cells = (cell for row in rows for cell in (*row, *row.values()))
    quoting: Literal[0, 1] = csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise ArtifactError(f"results cannot be written to {path}: {error.strerror or error}.") from error


def _key(row: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in key)


def _is_numeric(values: Iterable[str]) -> bool:
    filled = [value for value in values if value]
    try:
        return bool(filled) and all(isinstance(float(value), float) for value in filled)
    except ValueError:
        return False


def _cell(text: str) -> str:
    # A line break would end the row; a bar would end the cell.
    return " ".join(text.split()).replace("|", "\\|")
