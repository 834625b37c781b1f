"""A save that goes wrong, in whatever way, loses nothing and leaves nothing behind."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import vitq
from vitq.artifact import check_destination, schema
from vitq.core import files
from vitq.core.errors import ArtifactError

from .conftest import TINY_IN, outputs, tiny, tiny_qmodel

# Replaces an artifact several times, or stops in the middle of doing so; MODE is "kill" or "race".
CHILD = """
import os, signal, sys
import safetensors.torch
import torch
import vitq
from torch import nn

mode, out, bits = sys.argv[1:]
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)).eval()
qmodel = vitq.quantize(model, "minmax", bits, torch.randn(8, 6))
if mode == "kill":
    write = safetensors.torch.save_file

    def half(tensors, path, metadata=None):
        write(tensors, path, metadata=metadata)
        os.truncate(path, 100)
        print("stopping", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    vitq.save(qmodel, out, force=True)
"""


def start(*words: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, words)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An artifact that is there already."""
    vitq.save(tiny_qmodel("w8a8"), tmp_path / "out")
    return tmp_path / "out"


# -- destinations --------------------------------------------------------------------------------------------


def test_an_artifact_is_replaced_only_by_force(old: Path) -> None:
    before = content(old)
    with pytest.raises(ArtifactError, match="--force"):
        vitq.save(tiny_qmodel(), old)
    assert content(old) == before
    vitq.save(tiny_qmodel(), old, force=True)
    assert content(old) != before
    assert vitq.load(old, model=tiny()).plan.bits == "w4a4"
    assert hidden(old.parent) == []


@pytest.mark.parametrize("files_there", [["thesis.txt"], ["config.json"], ["model.safetensors"]])
def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path: Path, files_there: list[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in files_there:
        (folder / name).write_text("years of work")
    before = content(folder)
    for force in (False, True):
        with pytest.raises(ArtifactError, match="another folder"):
            vitq.save(tiny_qmodel(), folder, force=force)
    assert content(folder) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    vitq.save(tiny_qmodel(), tmp_path / "out")
    vitq.load(tmp_path / "out", model=tiny())


def test_folders_above_are_made(tmp_path: Path) -> None:
    vitq.save(tiny_qmodel(), tmp_path / "a" / "größe  b" / "图")
    vitq.load(tmp_path / "a" / "größe  b" / "图", model=tiny())


def test_destinations_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
        (Path("/proc/vitq"), "cannot be written"),
        (Path("/"), "mount point"),
    ):
        with pytest.raises(ArtifactError, match=says):
            check_destination(path, force=True)
    monkeypatch.chdir(tmp_path)
    for here in (".", "..", tmp_path):
        with pytest.raises(ArtifactError, match="current folder"):
            check_destination(here, force=True)


def test_a_parent_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(ArtifactError, match="Permission denied"):
        vitq.save(tiny_qmodel(), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ArtifactError, match="cannot be written"):
        check_destination(tmp_path / "closed" / "out")


def test_only_a_frozen_model_is_saved(tmp_path: Path) -> None:
    qmodel = vitq.quantize(tiny(), "minmax", "w8a8", TINY_IN, freeze=False)
    with pytest.raises(ArtifactError, match="freeze"):
        vitq.save(qmodel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_were_changed_after_freezing_are_noticed(tmp_path: Path) -> None:
    qmodel = tiny_qmodel()
    with torch.no_grad():
        qmodel.model.get_parameter("fc1.weight").mul_(1.01)
    with pytest.raises(ArtifactError, match=r"fc1.*changed"):
        vitq.save(qmodel, tmp_path / "out")


# -- permissions and links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        vitq.save(tiny_qmodel(), tmp_path / "out")
        files.write_text(tmp_path / "x.json", "{}")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "x.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file.name


def test_a_link_to_a_folder_stays_one(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    vitq.save(tiny_qmodel(), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert vitq.load(old, model=tiny()).plan.bits == "w4a4"
    assert hidden(tmp_path) == []
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    vitq.save(tiny_qmodel(), tmp_path / "dangling")
    vitq.load(tmp_path / "later", model=tiny())


def test_writing_text_keeps_links_and_does_not_replace_devices(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    files.write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    files.write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    assert files.is_stream(Path("/dev/stdout"))
    os.mkfifo(tmp_path / "pipe")
    assert files.is_stream(tmp_path / "pipe")
    assert hidden(tmp_path) == []


# -- failures in the middle ----------------------------------------------------------------------------------


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.write_text",
                                   "pathlib.Path.write_bytes", "vitq.core.files._exchange"])  # fmt: skip
def test_a_full_disk_leaves_the_old_artifact(old: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = content(old)
    qmodel = tiny_qmodel()
    with monkeypatch.context() as patch:
        patch.setattr(where, no_space)
        with pytest.raises(ArtifactError, match=r"No space left.*unchanged"):
            vitq.save(qmodel, old, force=True)
        assert hidden(old.parent) == []
    assert content(old) == before
    assert vitq.load(old, model=tiny()).plan.bits == "w8a8"
    vitq.save(qmodel, old, force=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_other_end_leaves_the_old_artifact_and_nothing_else(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: object) -> str:
        raise error

    before = content(old)
    monkeypatch.setattr(importlib.import_module("vitq.artifact.save"), "model_card", stop)
    with pytest.raises(error):
        vitq.save(tiny_qmodel(), old, force=True)
    with pytest.raises(error):
        vitq.save(tiny_qmodel(), old.parent / "new")
    assert content(old) == before
    assert [p.name for p in old.parent.iterdir()] == ["out"]


def test_without_an_exchange_in_one_step_a_failed_second_step_is_undone(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    before = content(old)
    vitq.save(tiny_qmodel("w8a8"), old, force=True)
    assert content(old).keys() == before.keys()
    before = content(old)
    real, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ArtifactError, match="broken"):
        vitq.save(tiny_qmodel(), old, force=True)
    assert content(old) == before
    assert hidden(old.parent) == []


def test_what_appears_meanwhile_is_not_replaced_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(folder: Path) -> None:
        (folder / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OSError, match="not empty"):
        files.write_folder(tmp_path / "out", fill, replace=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]
    assert hidden(tmp_path) == []


def test_a_folder_that_comes_and_goes_meanwhile_is_replaced_in_the_end(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[Path, Path], None] = files._exchange
    calls = []

    def gone(new: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise OSError(errno.ENOENT, "gone")
        real(new, path)

    monkeypatch.setattr(files, "_exchange", gone)
    vitq.save(tiny_qmodel(), old, force=True)
    assert len(calls) == 3
    assert vitq.load(old, model=tiny()).plan.bits == "w4a4"


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_artifact(old: Path) -> None:
    before = content(old)
    child = start("kill", old, "w4a4")
    out, err = child.communicate("go\n", timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    assert "stopping" in out
    assert content(old) == before
    assert torch.isfinite(outputs(vitq.load(old, model=tiny()), TINY_IN)).all()
    vitq.save(tiny_qmodel(), old, force=True)


def test_two_processes_saving_to_one_place_leave_one_whole_artifact(tmp_path: Path) -> None:
    children = [start("race", tmp_path / "out", bits) for bits in ("w4a4", "w8a8")]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5)).eval()
    assert vitq.load(tmp_path / "out", model=model).plan.bits in ("w4a4", "w8a8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(content(tmp_path / "out")) == sorted([schema.CARD, schema.CONFIG, schema.TENSORS])
