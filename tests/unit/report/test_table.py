"""Results files, and the tables made from them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq.core.errors import ArtifactError, DataError, InputError
from vitq.report.table import append_rows, markdown_table, read_results, replace_section

KEY = ("model", "bits")


def row(model: str, bits: str, **more: object) -> dict[str, object]:
    return {"model": model, "bits": bits, **more}


def test_rows_are_added_replaced_in_place_and_columns_unioned(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ptq.csv"
    append_rows(path, [row("a", "w4a4", top1=50.5), row("b", "w4a4", top1=60)], KEY)
    append_rows(path, [row("c", "w8a8", bytes=7), row("a", "w4a4", top1=51, bytes=None)], KEY)
    assert path.read_text() == "model,bits,top1,bytes\na,w4a4,51,\nb,w4a4,60,\nc,w8a8,,7\n"
    assert read_results(path)[1] == {"model": "b", "bits": "w4a4", "top1": "60", "bytes": ""}


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
tables = st.lists(
    st.fixed_dictionaries({"model": st.sampled_from("abc"), "bits": cells}, optional={"x": cells, "y": cells}),
    max_size=6,
)


@given(tables, tables)
def test_the_file_holds_the_last_row_of_each_key_in_order_of_first_appearance(
    tmp_path_factory: pytest.TempPathFactory, first: list[dict[str, str]], second: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("append") / "r.csv"
    for rows in (first, second):
        append_rows(path, rows, KEY)
    expected = {(each["model"], each["bits"]): each for each in first + second}
    if not expected:
        assert not path.exists()
        return
    with path.open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    filled = [{**dict.fromkeys(written[0], ""), **each} for each in expected.values()]
    assert written == filled == read_results(path)


def test_line_breaks_and_commas_inside_a_cell_survive(tmp_path: Path) -> None:
    append_rows(tmp_path / "r.csv", [row("a\r", "w4,a4", note="two\nlines")], KEY)
    assert read_results(tmp_path / "r.csv") == [{"model": "a\r", "bits": "w4,a4", "note": "two\nlines"}]


def test_a_key_that_the_file_held_twice_is_there_once_after_replacing(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("model,bits,top1\na,4,1\nb,4,2\na,4,3\nb,4,4\n")
    append_rows(path, [row("a", "4", top1=9)], KEY)
    assert [each["top1"] for each in read_results(path)] == ["9", "2", "4"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.csv"
    append_rows(path, [row("a", "w4a4")], KEY)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ArtifactError, match="No space left"):
        append_rows(path, [row("b", "w4a4")], KEY)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_cannot_be_keyed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bits, which a row lacks"):
        append_rows(tmp_path / "r.csv", [{"model": "a"}], KEY)
    with pytest.raises(InputError, match="at least one key"):
        append_rows(tmp_path / "r.csv", [], ())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2,3\n", "3 cells for 2 columns"),
        (b"a,a\n1,2\n", "names a column twice"),
        (b"a,b\n\xff\xfe,2\n", "not a CSV file"),
    ],
)
def test_a_file_that_holds_no_results_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "r.csv")
    with pytest.raises(DataError, match=message):
        append_rows(tmp_path / "r.csv", [row("a", "4")], KEY)


def test_a_missing_file_and_an_unwritable_place_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_results(tmp_path / "absent.csv")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        append_rows(tmp_path / "file" / "r.csv", [row("a", "4")], KEY)


def test_a_short_row_has_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1\n\n2,3\n")
    assert read_results(tmp_path / "r.csv") == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]


def test_a_table_has_the_columns_asked_for_and_numbers_to_the_right() -> None:
    rows = [{"model": "deit|s", "top1": "79.25", "note": "two\nlines"}, {"model": "vit", "top1": ""}]
    assert markdown_table(rows, ["model", ("top1", "top-1 %"), "note"]).splitlines() == [
        "| model | top-1 % | note |",
        "| --- | ---: | --- |",
        "| deit\\|s | 79.25 | two lines |",
        "| vit |  |  |",
    ]


def test_a_table_without_rows_is_a_heading() -> None:
    assert markdown_table([], ["model"]).splitlines() == ["| model |", "| --- |"]


def test_a_column_that_no_row_has_is_named() -> None:
    with pytest.raises(InputError, match=r"column top5\. Known: model, top1"):
        markdown_table([{"model": "a", "top1": "1"}], ["model", "top5"])
    with pytest.raises(InputError, match="at least one column"):
        markdown_table([{"model": "a"}], [])


def test_only_the_section_named_is_replaced() -> None:
    text = "# A\n<!-- vitq:x -->\nold\n<!-- /vitq:x -->\n<!-- vitq:y -->kept<!-- /vitq:y -->\nend\n"
    assert replace_section(text, "x", "new \\1\n") == text.replace("\nold\n", "\nnew \\1\n")


@given(*[st.text(max_size=20)] * 4)
def test_replacing_is_repeatable_and_leaves_the_rest(before: str, old: str, body: str, after: str) -> None:
    start, end = "<!-- vitq:t -->", "<!-- /vitq:t -->"
    once = replace_section(f"{before}{start}{old}{end}{after}", "t", body)
    assert once == f"{before}{start}\n{body.strip()}\n{end}{after}"
    assert replace_section(once, "t", body) == once


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- vitq:t -->",
        "<!-- /vitq:t --><!-- vitq:t -->",
        "<!-- vitq:t --><!-- /vitq:t --><!-- vitq:t --><!-- /vitq:t -->",
        "<!-- vitq:other --><!-- /vitq:other -->",
    ],
)
def test_a_section_that_is_not_there_exactly_once_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="section 't' needs exactly one"):
        replace_section(text, "t", "body")


def test_a_body_with_its_own_marker_is_refused() -> None:
    with pytest.raises(InputError, match="its own marker"):
        replace_section("<!-- vitq:t --><!-- /vitq:t -->", "t", "<!-- /vitq:t -->")
