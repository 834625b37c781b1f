"""vitq bench: what is measured, told and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitq.cli.bench
from vitq.bench import deployments as registry
from vitq.bench.deployments import DEPLOYMENTS, Deployment

from .conftest import Run

FEW = "torch,onnxruntime,vitq,vitq_ort,ort_static,broken,unmade"


@pytest.fixture
def with_broken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two deployments more: one whose file is no model, one whose step fails."""
    broken = Deployment("broken", "float", "float32", "no model", "onnxruntime", "float.safetensors")
    unmade = Deployment("unmade", "float", "float32", "no step", "onnxruntime", "x.onnx", ("no_such_step",))
    monkeypatch.setattr(registry.choose, "__defaults__", ((*DEPLOYMENTS, broken, unmade),))


@pytest.mark.slow
def test_an_artifact_is_measured_beside_float_and_peers(
    run: Run, artifact: Path, weights: Path, photos: Path, tmp_path: Path, with_broken_ones: None
) -> None:
    answer = run(
        "bench", artifact, "--checkpoint", weights, "--eval", photos / "eval", "--data", photos / "calib",
        "--deployments", FEW, "--batch", "1", "--batch", "3", "--rounds", "5", "--seconds", "0.01",
        "--threads", "1", "--plot", tmp_path / "plot.png", json_file=True,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert (tmp_path / "plot.png").stat().st_size > 5000
    found = {row["name"]: row for row in answer.json["deployments"]}
    assert list(found) == ["torch", "onnxruntime", "vitq", "vitq_ort", "ort_static"]
    assert set(answer.json["not_run"]) == {"broken", "unmade"}
    assert "no_such_step" in answer.json["not_run"]["unmade"]
    assert "cannot be loaded" in answer.json["not_run"]["broken"]
    assert "the 8 images that the artifact was calibrated on" in answer.err

    assert found["onnxruntime"]["accuracy"]["agreement"] == 100.0
    simulated, exported = (found[name]["accuracy"] for name in ("vitq", "vitq_ort"))
    assert simulated["images"] == 20
    assert abs(simulated["top1"] - exported["top1"]) <= 10
    assert found["vitq"]["kind"] == "simulated"
    assert found["vitq"]["verdict"] == "simulated: not a deployment"
    assert "vitq (simulated): simulated: not a deployment" in answer.out
    assert found["vitq_ort"]["kind"] == "integer"
    assert found["vitq_ort"]["whole_products"] > 0

    size = sum(path.stat().st_size for path in artifact.iterdir())
    assert found["vitq"]["bytes"] == size < found["torch"]["bytes"]
    for row in found.values():
        assert [latency["batch"] for latency in row["latency"]] == [1, 3]
        for latency in row["latency"]:
            low, high = latency["quartiles_ms"]
            assert 0 < low <= latency["median_ms"] <= high
            assert latency["rounds"] == 5
            assert latency["images_per_second"] == pytest.approx(
                1000 * latency["batch"] / latency["median_ms"], rel=1e-2
            )
        assert row["load_seconds"] > 0
        assert row["peak_mb"] > row["own_mb"]
    ratio = found["vitq_ort"]["latency"][0]["speedup"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert answer.json["roofline_gops"].keys() == {"float32", "bfloat16", "int8"}
    assert answer.json["machine"]["threads"] == 1
    assert answer.json["macs"] > 10**5


@pytest.fixture
def not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the bench was begun")

    monkeypatch.setattr(vitq.cli.bench, "Bench", reached)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--deployments", "onnxruntme"], "Did you mean 'onnxruntime'"),
        (["--deployments", "speedy"], "torch, torch_compile"),
        (["--deployments", ","], "no deployment is named"),
        (["--batch", "0"], "at least one image"),
        (["--eval", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "nowhere"),
        (["--plot", "p.png"], "name images with --eval"),
        ([], "--checkpoint"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    run: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_begun: None, words: list[str],
    told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert told in run("bench", artifact, *words).error
    assert list(tmp_path.iterdir()) == []


def test_zero_rounds_and_no_threads_are_refused(run: Run, artifact: Path, not_begun: None) -> None:
    for words in (["--rounds", "0"], ["--threads", "0"], ["--seconds", "-1"]):
        answer = run("bench", artifact, *words)
        assert answer.code == 2
        assert words[0] in answer.err


def test_models_and_nothing_are_no_artifact(run: Run, not_begun: None) -> None:
    assert "no artifact" in run("bench", "zoo:seeded_vit").error
    assert "nowhere" in run("bench", "./nowhere").error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(run: Run, artifact: Path, not_begun: None) -> None:
    assert "cannot be used here" in run("bench", artifact, "--device", "cuda").error
