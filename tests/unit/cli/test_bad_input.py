"""Bad input gets one clear line and exit code 2 before any long work, and nothing is written."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitq
import vitq.cli
from vitq.cli.console import Say
from vitq.core.errors import MissingExtraError, SiteNotFoundError
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

from .conftest import Quantize, Run

VIT = "zoo:seeded_vit"


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("deit_tny_patch16_224", "deit_tiny_patch16_224"),
        ("zoo:seeded_vt", "seeded_vit"),
        ("torchvision:vit_b_17", "vit_b_16"),
        ("zo:seeded_vit", "zoo"),
        ("nothing.py:build", "no file 'nothing.py'"),
        ("nothing.py", "no function"),
    ],
)
def test_unknown_model(quantize: Quantize, model: str, says: str) -> None:
    assert says in quantize(model=model).error


def test_unknown_recipe(quantize: Quantize) -> None:
    assert "unknown recipe 'repq_vt'. Did you mean 'repq_vit'" in quantize("--recipe", "repq_vt").error


def test_unknown_modifier(quantize: Quantize) -> None:
    assert "unknown modifier 'gptqq'" in quantize("--recipe", "repq_vit+gptqq").error


@pytest.mark.parametrize(
    ("bits", "says"), [("4a4", "w4a4"), ("4/4", "w4a4"), ("w4", "w4a4"), ("w1a4", "2 to 8"), ("w4a12", "2 to 8")]
)
def test_unknown_bits(quantize: Quantize, bits: str, says: str) -> None:
    error = quantize("--bits", bits).error
    assert repr(bits) in error
    assert says in error


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("parit=true", "parity"),
        ("parity", "KEY=VALUE"),
        ("parity=maybe", "true or false"),
        ("parity=1", "true or false"),
        ("weight_bits=3", "weight_bits"),
    ],
)
def test_unknown_option(quantize: Quantize, option: str, says: str) -> None:
    assert says in quantize("--option", option).error


def test_an_option_that_needs_a_number(quantize: Quantize) -> None:
    assert "must be float" in quantize("--recipe", "percentile", "--option", "p=high").error


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_unknown_device(quantize: Quantize, device: str) -> None:
    error = quantize("--device", device).error
    assert repr(device) in error
    assert "auto" in error


def test_calib_size_zero(quantize: Quantize) -> None:
    assert "at least one image" in quantize("--calib-size", "0").error


def test_diagnose_by_something_unknown(run: Run, artifact: Path, photos: Path) -> None:
    assert "site, role, block" in run("diagnose", artifact, "--data", photos / "flat", "--by", "colour").error


# -- recipes in files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def mine(:\n    pass\n", "syntax error in line 1"),
        ("x = 1\nraise ValueError('no luck')\n", "ValueError in line 2: no luck"),
        ("import not_there_at_all\n", "ModuleNotFoundError in line 1"),
        ("def mine(w, a):\n    return 1 / 0\n", "ZeroDivisionError in line 2"),
        ("def mine(w, a):\n    return 3\n", "not a Recipe"),
        ("def mine(w):\n    return 3\n", "mine"),
        ("def mines(w, a):\n    return 3\n", "mines"),
    ],
)
def test_a_recipe_file_that_cannot_be_used(quantize: Quantize, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad_recipe.py").write_text(text)
    error = quantize("--recipe", f"{tmp_path}/bad_recipe.py:mine").error
    assert says in error


def test_a_recipe_file_without_a_function_or_that_is_not_there(quantize: Quantize, tmp_path: Path) -> None:
    assert "FUNCTION" in quantize("--recipe", "mine.py").error
    assert "does not exist" in quantize("--recipe", f"{tmp_path}/none.py:mine").error


@pytest.mark.parametrize("text", ["def build(:\n", "raise ValueError('no')\n", "def build():\n    return 3\n"])
def test_a_model_file_that_cannot_be_used(quantize: Quantize, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad_model.py").write_text(text)
    assert "bad_model.py" in quantize(model=f"{tmp_path}/bad_model.py:build").error


# -- sites -------------------------------------------------------------------------------------------------


@pytest.fixture
def passes_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("passes were run")

    monkeypatch.setattr("vitq.pipeline.run_passes", reached)


@pytest.mark.parametrize(
    "words",
    [
        ("--exclude", "block.0"),
        ("--exclude", "role=HEADIN"),
        ("--set", "role=HEDA_IN:w8a8"),
        ("--set", "blocks.9:a8"),
    ],
)
def test_a_requested_site_that_is_not_found(
    run: Run, photos: Path, tmp_path: Path, words: tuple[str, str], passes_not_run: None
) -> None:
    answer = run("quantize", VIT, "--calib", photos / "calib", "--calib-size", "4", "--out", tmp_path / "o", *words)
    assert "matches no site" in answer.error
    assert repr(words[1].partition(":")[0]) in answer.error
    assert "vitq inspect" in answer.error


def test_a_scope_that_is_not_found() -> None:
    with pytest.raises(SiteNotFoundError, match="encoder"):
        vitq.quantize(load_model(VIT).model, "minmax", "w8a8", seeded_images(2), scope="encoder")


def test_an_override_that_is_none(quantize: Quantize) -> None:
    assert "PATTERN:BITS" in quantize("--set", "head").error
    assert "understood" in quantize("--set", "head:8").error


def test_nothing_to_quantize(run: Run, photos: Path, tmp_path: Path, passes_not_run: None) -> None:
    words = ("quantize", VIT, "--calib", photos / "calib", "--calib-size", "4", "--out", tmp_path / "o")
    assert "nothing to quantize" in run(*words, "--exclude", "role=*").error
    (tmp_path / "flat.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Flatten()\n")
    assert "nothing to quantize" in run("inspect", f"{tmp_path}/flat.py:build").error


def test_a_model_that_does_not_run_on_its_example(run: Run, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(5, 2)\n")
    assert "Linear" in run("inspect", f"{tmp_path}/odd.py:build").error


def test_a_model_whose_preprocessing_is_not_known(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(5, 2)\n")
    assert "prepares its images" in quantize(model=f"{tmp_path}/own.py:build").error


# -- outputs -----------------------------------------------------------------------------------------------


def test_an_existing_output_folder(run: Run, artifact: Path, photos: Path, tmp_path: Path, not_reached: None) -> None:
    words = ("quantize", VIT, "--calib", photos / "calib", "--out")
    before = {f.name: f.read_bytes() for f in artifact.iterdir()}
    assert "--force" in run(*words, artifact).error
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    assert "not an artifact" in run(*words, tmp_path / "notes", "--force").error
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").touch()
    assert "is a file" in run(*words, tmp_path / "file", "--force").error
    assert "cannot be written" in run(*words, tmp_path / "file" / "below").error
    assert "current folder" in run(*words, ".").error
    assert {f.name: f.read_bytes() for f in artifact.iterdir()} == before


def test_result_files_that_cannot_be_written(
    run: Run, artifact: Path, photos: Path, tmp_path: Path, not_reached: None
) -> None:
    words = ("quantize", VIT, "--calib", photos / "calib", "--out", tmp_path / "o")
    (tmp_path / "file").touch()
    assert "is a folder" in run(*words, "--json", tmp_path).error
    assert "cannot be written" in run(*words, "--json", tmp_path / "file" / "x.json").error
    evaluate = ("evaluate", artifact, "--data", photos / "eval")
    assert "is a folder" in run(*evaluate, "--predictions", tmp_path).error


# -- artifacts ---------------------------------------------------------------------------------------------


def test_artifacts_that_are_none(run: Run, photos: Path, tmp_path: Path) -> None:
    ask = ("--data", photos / "eval")
    assert "does not exist" in run("evaluate", tmp_path / "none", *ask).error
    assert "not an artifact" in run("evaluate", tmp_path, *ask).error
    (tmp_path / "file.txt").touch()
    assert "is a file" in run("evaluate", tmp_path / "file.txt", *ask).error
    assert "unknown timm model" in run("evaluate", "deit_tny", *ask).error


def test_a_damaged_artifact(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[:-100])
    assert "damaged" in run("evaluate", copy, "--data", photos / "eval").error
    assert "damaged" in run("diagnose", copy, "--data", photos / "eval").error


def test_an_artifact_whose_model_is_a_file_needs_trust(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "from pathlib import Path\n\nfrom vitq.data.source import load_model\n\n\n"
        "def build():\n    Path(__file__).with_name('ran').touch()\n    return load_model('zoo:seeded_vit').model\n"
    )
    model = load_model(f"{tmp_path}/code.py:build")
    qmodel = vitq.quantize(model.model, "minmax", "w8a8", seeded_images(2))
    qmodel.source, qmodel.preprocess = model.source, load_model(VIT).preprocess.to_dict()  # type: ignore[union-attr]
    vitq.save(qmodel, tmp_path / "o")
    (tmp_path / "ran").unlink()
    words = ("evaluate", tmp_path / "o", "--data", photos / "eval")
    assert "--trust-code" in run(*words).error
    assert not (tmp_path / "ran").exists()
    trusted = run(*words, "--trust-code")
    assert trusted.code == 0, trusted.err
    assert (tmp_path / "ran").exists()
    (tmp_path / "code.py").write_text((tmp_path / "code.py").read_text() + "# edited\n")
    assert "not the file it was" in run(*words, "--trust-code").error


def test_compare_refuses_before_it_runs_a_model(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    assert "at least two" in run("compare", artifact, "--data", photos / "eval").error
    assert "twice" in run("compare", artifact, artifact, "--data", photos / "eval").error
    (tmp_path / "a.csv").write_text("file,label,predicted\nx,0,0\n")
    assert "--data" in run("compare", tmp_path / "a.csv", artifact).error
    assert "b.csv" in run("compare", artifact, tmp_path / "b.csv", "--data", photos / "eval").error


def test_a_size_where_none_can_be_chosen(run: Run, artifact: Path, photos: Path, not_reached: None) -> None:
    words = ("diagnose", "--data", photos / "flat", "--size", "64")
    assert "an artifact keeps" in run(*words, artifact).error
    assert f"which {VIT} is not" in run(*words, VIT, "--calib", photos / "flat").error
    assert f"which {VIT} is not" in run("quantize", VIT, "--calib", photos / "flat", "--size", "64", "--out", "o").error


def test_a_model_to_diagnose_needs_calibration_images(run: Run, photos: Path, not_reached: None) -> None:
    assert "--calib" in run("diagnose", VIT, "--data", photos / "flat").error


# -- packages, interruption, memory --------------------------------------------------------------------------


def test_a_missing_package_names_the_extra_to_install(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert "vitq[hf]" in quantize(model="hf:google/vit-base-patch16-224").error
    with pytest.raises(MissingExtraError, match=r"vitq\[hf\]"):
        load_model("hf:google/vit-base-patch16-224")


@pytest.mark.parametrize("where", ["quantize", "evaluate", "save"])
def test_ctrl_c_leaves_a_clean_message_and_what_was_saved(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vitq.cli.quantize, where, interrupted)
    answer = run("quantize", VIT, "--recipe", "minmax", "--calib", photos / "calib", "--calib-size", "4", "--eval",
                 photos / "eval", "--out", tmp_path / "o")  # fmt: skip
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "interrupted; nothing half-written is left behind"
    assert "Traceback" not in answer.err
    assert (tmp_path / "o").exists() == (where == "evaluate")
    if where == "evaluate":
        vitq.load(tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory\nmore"), OSError(28, "x")])
def test_errors_of_the_machine_are_one_line(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(vitq.cli.quantize, "quantize", fails)
    assert quantize().error


def test_quiet_still_prints_errors(quantize: Quantize) -> None:
    assert "repq_vit" in quantize("--recipe", "repq_vt", "--quiet").error


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    Say(quiet=True).error("error: a  b\n   c\n")
    assert capsys.readouterr().err == "error: a  b c\n"
