"""vitq export: what is written, told and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitq.cli.export

from .conftest import Run


@pytest.fixture
def not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the export was begun")

    monkeypatch.setattr(vitq.cli.export, "export_onnx", reached)
    monkeypatch.setattr(vitq.cli.export, "export_openvino", reached)


def test_a_file_is_written_and_its_parity_told(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    answer = run("export", artifact, "--out", out, "--data", photos / "eval", "--images", 6, json_file=True)
    assert answer.code == 0, answer.err
    assert answer.json["bytes"] == out.stat().st_size
    assert (answer.json["to"], answer.json["profile"]) == ("onnx", "ort")
    parity = answer.json["parity"]
    assert (parity["images"], parity["data"]) == (6, f"6 images of {photos / 'eval'}")
    assert all(site["farthest"] <= 1 for site in parity["sites"])
    whole = sum(answer.json["products"]["whole"].values())
    assert f"ONNX Runtime does {whole} of" in answer.out
    assert f"{parity['agree']} of 6 predictions" in answer.out


def test_openvinos_own_files_are_written(run: Run, artifact: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    out = tmp_path / "ov" / "m.xml"
    out.parent.mkdir()
    answer = run(
        "export", artifact, "--to", "openvino", "--out", out, "--data", photos / "eval", "--images", 6, json_file=True
    )
    assert answer.code == 0, answer.err
    assert sorted(file.name for file in out.parent.iterdir()) == ["m.bin", "m.xml"]
    assert answer.json["bytes"] == sum(file.stat().st_size for file in out.parent.iterdir())
    assert (answer.json["to"], answer.json["profile"], answer.json["runtime"]) == ("openvino", "openvino", "OpenVINO")
    whole = sum(answer.json["products"]["whole"].values())
    assert whole
    assert f"OpenVINO does {whole} of" in answer.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "m.onnx", "--profile", "tensorrt"], "unknown export profile"),
        (["--out", "m.onnx", "--to", "onx"], "Did you mean 'onnx'"),
        (["--out", "m.onnx", "--to", "openvino"], "m.xml"),
        (["--out", "m.xml", "--to", "openvino", "--profile", "ort"], "leave --profile out"),
        (["--out", "missing/m.onnx"], "does not exist"),
        (["--out", "."], "is a folder"),
        (["--out", "m.onnx", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_the_export(
    run: Run, artifact: Path, tmp_path: Path, not_exported: None, words: list[str], told: str
) -> None:
    given = [tmp_path / word if before == "--out" else word for before, word in zip(["", *words], words, strict=False)]
    assert told in run("export", artifact, *given).error
    assert not (tmp_path / "m.onnx").exists()


def test_a_model_is_no_artifact(run: Run, tmp_path: Path, not_exported: None) -> None:
    assert "no artifact" in run("export", "zoo:seeded_vit", "--out", tmp_path / "m.onnx").error
