"""The command line under hard use: Ctrl-C, two runs at once, folders that cannot be written, names of all kinds."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vitq
import vitq.cli
from vitq.artifact import check_destination, schema
from vitq.core import files
from vitq.core.errors import ArtifactError
from vitq.data.zoo import build_zoo, seeded_images

VIT = "zoo:seeded_vit"
ARTIFACT = sorted([schema.CARD, schema.CONFIG, schema.TENSORS])

SECONDS = 50  # to get anywhere, on a busy machine

# Runs the command line; at the given place it says that it is there and waits to be stopped, or for a file.
DRIVER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what was started in the background
import importlib, os, sys, time
from pathlib import Path

import safetensors.torch
import vitq.cli

place, here, wait, *words = sys.argv[1:]
owner, name, after = {
    "calibration": ("vitq.calibrate.observe:Sketch", "observe", False),
    "evaluation": ("vitq.evaluate.classify", "_logits", False),
    "saving": ("safetensors.torch", "save_file", True),
    "save": ("vitq.cli.quantize", "save", False),
}[place]
module, _, cls = owner.partition(":")
holder = importlib.import_module(module)
holder = getattr(holder, cls) if cls else holder
if not hasattr(holder, name):
    sys.exit(f"no {name}")
real = getattr(holder, name)
calls = 0


def stopped(*args, **options):
    global calls
    calls += 1
    result = real(*args, **options) if after else None
    if calls == 1:
        if place == "saving":
            os.truncate(args[1], 100)
        Path(here).touch()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not (wait and Path(wait).exists()):
            time.sleep(0.01)
    return result if after else real(*args, **options)


setattr(holder, name, stopped)
sys.argv = ["vitq", *words]
vitq.cli.main()
""".replace("SECONDS", str(SECONDS))


def start(place: str, here: Path, wait: Path | None, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, place, str(here), str(wait or ""), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reached(child: subprocess.Popen[str], here: Path) -> None:
    """Wait until the child is where it shall be."""
    end = time.monotonic() + SECONDS
    while not here.exists():
        if child.poll() is not None or time.monotonic() > end:
            child.kill()
            pytest.fail(f"ended before it got there: {child.communicate()[1][-1500:]}")
        time.sleep(0.02)


def write_images(folder: Path, count: int = 10, seed: int = 0) -> Path:
    """Labelled images in ten class folders, as many as the model has classes."""
    pixels = ((seeded_images(count, seed=seed) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        (folder / f"class {index % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class {index % 10}" / f"{index} é.png")
    return folder


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "calib")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "held", seed=1)


def cli(*words: str | Path) -> tuple[int, str]:
    """Exit code and what was printed."""
    result = CliRunner().invoke(vitq.cli.app, [*map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_one_line_and_nothing_half_written(tmp_path: Path, calib: Path, held: Path) -> None:
    old = tmp_path / "old"
    assert cli("quantize", VIT, "--recipe", "minmax", "--calib", calib, "--calib-size", "2", "--out", old)[0] == 0
    before = {f.name: f.read_bytes() for f in old.iterdir()}
    quantize = ("quantize", VIT, "--recipe", "minmax", "--calib", calib, "--calib-size", "2")
    cases: dict[str, tuple[str, tuple[str | Path, ...]]] = {
        "a": ("calibration", (*quantize, "--out", tmp_path / "a" / "o")),
        "c": ("saving", (*quantize, "--out", old, "--force")),
        "d": ("evaluation", (*quantize, "--out", tmp_path / "d" / "o", "--eval", held)),
        "e": ("evaluation", ("evaluate", old, "--data", held, "--predictions", tmp_path / "e" / "p.csv", "--json",
                             tmp_path / "e" / "r.json")),
    }  # fmt: skip
    children = {}
    for name, (place, words) in cases.items():
        (tmp_path / name).mkdir()
        children[name] = start(place, tmp_path / f"here {name}", None, *words)
    for name, child in children.items():
        reached(child, tmp_path / f"here {name}")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=SECONDS)
        assert child.returncode == 130, (name, err)
        assert err.splitlines()[-1] == "interrupted; nothing half-written is left behind", (name, err)
        assert "Traceback" not in err + out, name
    assert files_below(tmp_path / "a") == files_below(tmp_path / "e") == []
    assert files_below(tmp_path / "d") == ["o", *(f"o/{f}" for f in ARTIFACT)]  # it was saved before it was evaluated
    vitq.load(tmp_path / "d" / "o")
    assert {f.name: f.read_bytes() for f in old.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_ctrl_c_while_cleaning_up_still_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shutil.rmtree, []

    def interrupted(*args: object, **options: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*args, **options)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr("vitq.core.files.shutil.rmtree", interrupted)

    def fill(folder: Path) -> None:
        (folder / "x").touch()

    (tmp_path / "o").mkdir()
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(tmp_path / "o", fill)
    assert files_below(tmp_path) == ["o", "o/x"]


# -- two at once ---------------------------------------------------------------------------------------------


def test_two_commands_with_one_output_leave_one_whole_artifact(tmp_path: Path, calib: Path) -> None:
    """With --force both succeed: tests/unit/artifact/test_saving.py lets two processes race for a while."""
    place = tmp_path / "results"
    place.mkdir()
    children = []
    for number, bits in enumerate(("w4a4", "w8a8")):
        words = ("quantize", VIT, "--recipe", "minmax", "--bits", bits, "--calib", calib, "--calib-size", "2")
        children.append(start("save", tmp_path / f"here {number}", tmp_path / "go", *words, "--out", place / "o"))
    for number, child in enumerate(children):
        reached(child, tmp_path / f"here {number}")
    (tmp_path / "go").touch()
    ends = [(child.communicate(timeout=SECONDS)[1], child.returncode) for child in children]
    codes = [code for _, code in ends]
    assert sorted(codes) == [0, 2], ends
    last = ends[codes.index(2)][0].splitlines()[-1]
    assert last.startswith("error: ")
    assert "--force" in last
    assert vitq.load(place / "o").plan.bits == ("w4a4", "w8a8")[codes.index(0)]
    assert files_below(place) == ["o", *(f"o/{f}" for f in ARTIFACT)]


def test_a_folder_that_another_process_filled_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel = vitq.quantize(torch.nn.Sequential(torch.nn.Linear(6, 4)), "minmax", "w8a8", torch.randn(4, 6))

    def lost(*_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(files, "_put", lost)
    with pytest.raises(ArtifactError, match=r"another process.*choose another folder.*--force"):
        vitq.save(qmodel, tmp_path / "o")


# -- folders that cannot be written --------------------------------------------------------------------------


@pytest.fixture
def not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a model is loaded nor an image read."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    for name in ("open_model", "calibration"):
        monkeypatch.setattr(vitq.cli.quantize.work, name, reached)


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, not_reached: None) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "below", tmp_path / "file", Path("/proc/vitq")):
        code, printed = cli("quantize", VIT, "--calib", tmp_path, "--out", out)
        assert code == 2
        assert len(printed.splitlines()) == 1
        assert str(out) in printed
        assert "choose" in printed


def test_a_read_only_file_system_is_refused_before_any_work(
    tmp_path: Path, not_reached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a system cannot be mounted in every test run: its answer to a new folder is imitated."""

    def refused(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    code, printed = cli("quantize", VIT, "--calib", tmp_path, "--out", tmp_path / "o")
    assert code == 2
    assert "Read-only file system; choose another folder" in printed


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder in which this process may not write; root, who may everywhere, becomes nobody for a while."""
    base = Path(tempfile.mkdtemp())
    folder = base / "closed"
    folder.mkdir()
    base.chmod(0o755)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(base)


def test_a_folder_without_permission_is_refused(closed: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written: Permission denied; choose another folder"):
        check_destination(closed / "o")


# -- names ---------------------------------------------------------------------------------------------------

MODEL_FILE = """from timm.models.vision_transformer import VisionTransformer


def build():
    return VisionTransformer(patch_size=32, embed_dim=48, depth=1, num_heads=2)
"""


def test_names_with_spaces_quotes_and_all_of_unicode(tmp_path: Path) -> None:
    place = tmp_path / "größe  зд 图 [x] 'q'"
    images = write_images(place / "fotos à b")
    (place / "mein modell é.py").write_text(MODEL_FILE, encoding="utf-8")
    torch.save(build_zoo("seeded_vit").state_dict(), place / "poids é 1.pth")
    out = place / "sortie ü"
    words = ("quantize", VIT, "--recipe", "minmax", "--calib", images, "--calib-size", "4", "--eval", images)
    files_named = ("--checkpoint", place / "poids é 1.pth", "--json", place / "r é.json", "--out", out)
    code, printed = cli(*words, *files_named)
    assert code == 0, printed
    assert (place / "r é.json").is_file()
    held = write_images(place / "held ò", seed=1)
    code, printed = cli("evaluate", out, "--data", held, "--predictions", place / "p é.csv")
    assert code == 0, printed
    assert (place / "p é.csv").is_file()
    code, printed = cli("inspect", f"{place}/mein modell é.py:build")
    assert code == 0, printed
    code, printed = cli("evaluate", place / "nothing é", "--data", held)
    assert code == 2
    assert "does not exist" in printed
    assert vitq.load(out)(seeded_images(1)).shape == (1, 10)
