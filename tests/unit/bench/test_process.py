"""Deployments in processes of their own: what they compute, what they tell, and how they fail."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitq.bench.deployments import DEPLOYMENTS, Deployment, choose
from vitq.bench.errors import DeploymentError
from vitq.bench.job import CALIBRATION, IMAGES, Job, filled, write_images, write_weights
from vitq.bench.makers import MAKERS
from vitq.bench.process import Process, Running, run_step
from vitq.bench.runners import RUNTIMES
from vitq.core.errors import InputError, UnknownNameError
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

TORCH, *_ = DEPLOYMENTS


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    loaded = load_model("zoo:seeded_vit")
    found = Job(str(tmp_path_factory.mktemp("job")), loaded.source, False, 1, "cpu", (1, 4))
    found.write()
    write_weights(found.path("float.safetensors"), loaded.model)
    write_images(found.path(IMAGES), seeded_images(4))
    return found


def test_the_registry_names_what_there_is() -> None:
    names = [deployment.name for deployment in DEPLOYMENTS]
    assert len(set(names)) == len(names)
    for deployment in DEPLOYMENTS:
        assert deployment.runtime in RUNTIMES
        assert set(deployment.makes) <= set(MAKERS)
        assert bool(deployment.makes) + bool(deployment.profile) <= 1


def test_what_is_chosen() -> None:
    assert choose(["all"]) == list(DEPLOYMENTS)
    assert [found.name for found in choose(["ort_static", "onnxruntime"])] == ["torch", "onnxruntime", "ort_static"]
    with pytest.raises(UnknownNameError, match=r"Did you mean 'onnxruntime'.*torch, torch_compile.*nncf"):
        choose(["onnx_runtime"])
    with pytest.raises(InputError, match="no deployment is named"):
        choose([])


def test_the_record_comes_back(job: Job) -> None:
    assert Job.read(job.folder) == job


def test_a_batch_is_filled() -> None:
    images = seeded_images(3)
    assert torch.equal(filled(images, 2), images[:2])
    assert torch.equal(filled(images, 5), torch.cat([images, images[2:], images[2:]]))


def test_what_is_missing_is_told(job: Job, tmp_path: Path) -> None:
    known = {found.name: found for found in DEPLOYMENTS}
    assert known["torch"].missing(job) == ""
    assert "--data" in known["ort_static"].missing(job)
    assert "--device cuda" in known["tensorrt"].missing(job)
    on_cuda = Job(str(tmp_path), job.source, False, 1, "cuda:0", (1,))
    assert "runs on cpu only" in known["vitq_ort"].missing(on_cuda)
    assert "has no TensorrtExecutionProvider" in known["tensorrt"].missing(on_cuda)
    absent = Deployment("x", "float", "float32", "", "torch", "", packages=("nncf_of_nobody",))
    with pytest.raises(KeyError):
        absent.missing(job)  # an entry must say how to install what it needs


def test_sizes_count_all_that_is_loaded(tmp_path: Path) -> None:
    job = Job(str(tmp_path), {}, False, 1, "cpu", (1,))
    for name, size in (
        ("m.xml", 10),
        ("m.bin", 100),
        ("n.onnx", 1000),
        ("n.onnx.data", 10**4),
        ("d/e", 10**5),
        ("m.onnx", 7),
        ("m.st", 5),
    ):
        job.path(name).parent.mkdir(exist_ok=True)
        job.path(name).write_bytes(b"x" * size)
    sizes = {
        name: Deployment("x", "float", "float32", "", "torch", name).bytes_on_disk(job)
        for name in ("m.xml", "n.onnx", "d", "missing", "m.onnx", "m.st")
    }
    assert sizes == {"m.xml": 110, "n.onnx": 11000, "d": 10**5, "missing": 0, "m.onnx": 7, "m.st": 5}


def test_a_process_computes_what_the_model_does(job: Job, tmp_path: Path) -> None:
    images = seeded_images(7, seed=5)
    write_images(tmp_path / "images.safetensors", images)
    running = Running(TORCH, job)
    try:
        with torch.no_grad():
            expected = job.float_model()(images)
        assert torch.allclose(running.logits(tmp_path / "images.safetensors"), expected, atol=1e-5)
        calls = running.time(4, 3)
        assert len(calls) == 3
        assert all(wall > 0 and 0 < cpu < 1.5 * wall + 0.01 for wall, cpu in calls)
        assert running.load_seconds > 0
        assert running.memory()["peak_mb"] >= running.before_mb > 50
        with pytest.raises(DeploymentError, match=r"missing\.safetensors"):
            running.logits(tmp_path / "missing.safetensors")
        assert len(running.time(1, 1)) == 1  # it goes on after an error
        os.kill(running.process.process.pid, signal.SIGKILL)
        with pytest.raises(DeploymentError, match="ended by signal 9"):
            running.time(1, 1)
    finally:
        running.end()
    assert running.process.process.poll() is not None


def test_a_deployment_that_cannot_be_loaded_says_why(job: Job) -> None:
    with pytest.raises(DeploymentError, match=r"nothing\.onnx"):
        Running(Deployment("x", "float", "float32", "", "onnxruntime", "nothing.onnx"), job)


def test_a_step_that_fails_says_why(job: Job) -> None:
    with pytest.raises(DeploymentError, match=r"FileNotFoundError.*float\.onnx|float\.onnx"):
        run_step(job, "prepared_onnx")
    with pytest.raises(DeploymentError, match="KeyError"):
        run_step(job, "no_such_step")


def test_a_process_that_dies_at_once_shows_its_last_line(job: Job, tmp_path: Path) -> None:
    with (
        Process(Job(str(tmp_path / "nowhere"), {}, False, 1, "cpu", (1,)), ["make", "float_onnx"]) as process,
        pytest.raises(DeploymentError, match=r"job\.json"),
    ):
        process.ask()
    with (
        Process(job, ["make"], {"PYTHONPATH": "", "PYTHONHOME": str(tmp_path)}) as process,
        pytest.raises(DeploymentError, match="exit code 1"),
    ):
        process.ask()


@pytest.fixture(scope="module")
def calibrated(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = shutil.copytree(job.folder, tmp_path_factory.mktemp("calibrated") / "job")
    found = replace(job, folder=str(folder))
    found.write()
    write_images(found.path(CALIBRATION), seeded_images(16, seed=1))
    return found


PEERS = [found for found in DEPLOYMENTS if found.makes and found.device != "cuda"]


@pytest.mark.slow
@pytest.mark.parametrize("deployment", PEERS, ids=lambda deployment: deployment.name)
def test_what_other_runtimes_and_peers_make_computes_the_model(
    deployment: Deployment, calibrated: Job, tmp_path: Path
) -> None:
    if missing := deployment.missing(calibrated):
        pytest.skip(missing)
    for step in deployment.makes:
        run_step(calibrated, step)
    images = seeded_images(6, seed=7)
    write_images(tmp_path / "images.safetensors", images)
    running = Running(deployment, calibrated)
    try:
        found = running.logits(tmp_path / "images.safetensors").double()
    finally:
        running.end()
    with torch.no_grad():
        expected = calibrated.float_model()(images).double()
    error = float((found - expected).norm() / expected.norm())
    # Float is float; eight bits are near, and are not float in disguise.
    low, high = {"float32": (0, 1e-4), "bfloat16": (0, 0.05), "int8": (1e-3, 0.25)}[deployment.numbers]
    assert low <= error <= high
    smaller = deployment.kind == "integer"
    assert (deployment.bytes_on_disk(calibrated) < 0.5 * TORCH.bytes_on_disk(calibrated)) == smaller
