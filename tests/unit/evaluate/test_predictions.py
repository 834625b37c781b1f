"""Prediction files, and matching the images of several of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitq.core.errors import ArtifactError, DataError, InputError
from vitq.evaluate.predictions import Predictions, align, read_predictions, write_predictions

PEERS = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "peer_predictions"
needs_peers = pytest.mark.skipif(not PEERS.is_dir(), reason="the shared peer predictions are not there")

NAMES = ["n01/a.jpg", "n01/b.jpg", "n02/c.jpg", "n03/d.jpg"]


def made(ids: list[str], labels: list[int] | None = None, shift: int = 0) -> Predictions:
    """Predictions whose label follows from the file name, so that any two sets agree on it."""
    known = torch.tensor([ord(each[-5]) for each in ids] if labels is None else labels)
    return Predictions(ids, known, known + shift)


def under(folder: str, ids: list[str] = NAMES) -> list[str]:
    return [f"{folder}/{each}" for each in ids]


def read_text(tmp_path: Path, text: str) -> Predictions:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    return read_predictions(path)


def test_the_file_has_the_three_columns(tmp_path: Path) -> None:
    write_predictions(tmp_path / "new" / "p.csv", made(NAMES[:2], [3, -1]))
    written = (tmp_path / "new" / "p.csv").read_bytes()
    assert written == b"file,label,predicted\nn01/a.jpg,3,3\nn01/b.jpg,-1,-1\n"


@settings(max_examples=50)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_any_file_name_survives_writing_and_reading(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "p.csv"
    index = torch.arange(len(ids))
    write_predictions(path, Predictions(ids, index, index + 1))
    back = read_predictions(path)
    assert back.ids == ids
    assert torch.equal(back.labels, index)
    assert torch.equal(back.predicted, index + 1)


def test_a_file_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write_predictions(tmp_path / "p.csv", made([name], [1]))
    assert read_predictions(tmp_path / "p.csv").ids == [name]


def test_columns_in_any_order_a_byte_order_mark_and_more_columns_are_read(tmp_path: Path) -> None:
    back = read_text(tmp_path, "\ufeffpredicted,score,file,label\r\n5,0.9,x.jpg,4\r\n")
    assert (back.ids, back.labels.tolist(), back.predicted.tolist()) == (["x.jpg"], [4], [5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "label, predicted not found"),
        ("file,label\nx,1\n", "predicted not found"),
        ("file,label,predicted\n", "no predictions"),
        ("file,label,predicted\nx,1,cat\n", "line 2: predicted must be a class index, not 'cat'"),
        ("file,label,predicted\nx,1,2\ny,1.0,2\n", "line 3: label .* '1.0'"),
        ("file,label,predicted\nx,1\n", "predicted .* None"),
        ("file,label,predicted\nx,-2,0\n", "label .* '-2'"),
        ("file,label,predicted\nx,1,-1\n", "predicted .* '-1'"),
        ("file,label,predicted\nx,1_0,1\n", "'1_0'"),
        ("file,label,predicted\nx,99999999999999999999,1\n", "'99999999999999999999'"),
        ("file,label,predicted\nx,1,1\nx,1,2\n", "image 'x' occurs twice"),
        ("file,label,predicted\n,1,1\n", "no file name"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_text(tmp_path, text)
    assert "p.csv" in str(caught.value)


def test_a_missing_or_binary_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: No such file"):
        read_predictions(tmp_path / "absent.csv")
    (tmp_path / "image.csv").write_bytes(bytes(range(1, 256)))
    with pytest.raises(DataError, match="not a predictions file"):
        read_predictions(tmp_path / "image.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.csv"
    write_predictions(path, made(NAMES))
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ArtifactError, match="No space left"):
        write_predictions(path, made(NAMES, shift=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_predictions(tmp_path / "file" / "p.csv", made(NAMES))


def test_two_images_of_one_name_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="occurs twice"):
        write_predictions(tmp_path / "p.csv", made(["a.jpg", "a.jpg"]))
    assert not any(tmp_path.iterdir())


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match="2 ids"):
        Predictions(["a", "b"], torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (NAMES, NAMES),
        (NAMES, under("report")),
        (under("report"), NAMES),
        (under("photos/report"), under("report")),
        (under("mine"), under("theirs")),
        (NAMES[:1], under("report")),
        (under("report"), NAMES[:2]),
        (under("n01", ["n01/a.jpg", "n01/b.jpg"]), NAMES),
    ],
)
def test_leading_folders_do_not_hinder_a_match(first: list[str], second: list[str]) -> None:
    found = align([made(first), made(second[::-1], shift=1)])
    shared = [name for name in NAMES if any(each.endswith(name) for each in first)]
    shared = [name for name in shared if any(each.endswith(name) for each in second)]
    assert [each[-9:] for each in found.ids] == shared
    assert torch.equal(found.labels, made(shared).labels)
    assert torch.equal(found.predicted[1], found.predicted[0] + 1)


def test_a_folder_that_not_all_share_is_not_taken_off() -> None:
    with pytest.raises(DataError, match=r"no image .* 'n01/a.jpg', 'n09/a.jpg'"):
        align([made(["n01/a.jpg", "n02/b.jpg"]), made(["n09/a.jpg", "n08/b.jpg"])])


def test_three_with_different_folders_keep_the_common_part() -> None:
    found = align([made(under("x/report")), made(NAMES), made(under("report"))])
    assert found.ids == NAMES


@given(st.permutations(range(4)), st.permutations(range(4)), st.permutations(range(3)))
def test_order_does_not_matter(rows: list[int], others: list[int], sets: list[int]) -> None:
    given_ = [
        made([NAMES[i] for i in rows]),
        made(under("report", [NAMES[i] for i in others]), shift=1),
        made(under("photos/report", NAMES[1:]), shift=2),
    ]
    found = align([given_[i] for i in sets])
    assert sorted(found.ids) == NAMES[1:]
    assert torch.equal(found.labels, made(found.ids).labels)
    for number, predicted in zip(sets, found.predicted, strict=True):
        assert torch.equal(predicted, found.labels + number)
    assert [found.left_out[sets.index(number)] for number in range(3)] == [1, 1, 0]


def test_partial_overlap_uses_the_common_images_and_counts_the_rest() -> None:
    found = align([made(NAMES[:3]), made(NAMES[1:]), made(NAMES[1:2])])
    assert found.ids == NAMES[1:2]
    assert found.left_out == [2, 2, 0]


def test_labels_that_disagree_name_the_image() -> None:
    with pytest.raises(DataError, match=r"n01/b\.jpg: 1 and 7"):
        align([made(NAMES[:2], [0, 1]), made(under("report", NAMES[:2]), [0, 7])])


def test_an_unknown_label_is_filled_from_the_other_set() -> None:
    ids = NAMES[:2]
    found = align([made(ids, [-1, -1]), made(ids, [4, -1])])
    assert found.labels.tolist() == [4, -1]


def test_twice_the_same_image_and_no_sets_are_refused() -> None:
    with pytest.raises(DataError, match=r"predictions 1: image 'a\.jpg' occurs twice"):
        align([made(["a.jpg"]), made(["a.jpg", "a.jpg"])])
    with pytest.raises(InputError, match="at least one"):
        align([])


@needs_peers
def test_the_peers_float_model_has_its_published_accuracy() -> None:
    for split, images, top1 in (("report", 400, 79.25), ("ablate", 300, 78.67)):
        found = read_predictions(PEERS / split / "float.csv")
        assert len(found.ids) == images
        assert 100 * found.correct.double().mean().item() == pytest.approx(top1, abs=0.005)


@needs_peers
def test_every_peer_file_pairs_with_ids_of_ours() -> None:
    files = sorted((PEERS / "report").glob("*.csv"))
    peers = [read_predictions(path) for path in files]
    ours = [each.removeprefix("report/") for each in peers[0].ids]
    found = align([Predictions(ours, peers[0].labels, peers[0].predicted), *peers])
    assert found.ids == ours
    assert set(found.left_out) == {0}
