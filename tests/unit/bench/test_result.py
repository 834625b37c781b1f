"""What is told: ratios to both floats, shares of the roofline, and what is never called fast."""

from __future__ import annotations

import json

import pytest

from vitq.bench.deployments import DEPLOYMENTS, FLOAT, INTEGER, PACKED, SIMULATED, Deployment
from vitq.bench.result import CPU, NOT_A_DEPLOYMENT, Measured, latencies
from vitq.bench.timing import Timings
from vitq.cli.bench_run import seen_kind

KINDS = {
    "torch": (FLOAT, "float32"),
    "onnxruntime": (FLOAT, "float32"),
    "torch_bf16": (FLOAT, "bfloat16"),
    "vitq": (SIMULATED, "float32"),
    "vitq_ort": (INTEGER, "int8"),
}
SECONDS = {"torch": 0.02, "onnxruntime": 0.016, "torch_bf16": 0.001, "vitq": 0.001, "vitq_ort": 0.01}


def timings(seconds: dict[str, float], rounds: int = 9) -> Timings:
    turns = {(name, 4): [one * (1 + 0.01 * (at % 3)) for at in range(rounds)] for name, one in seconds.items()}
    cpu = {key: [value / 2 for value in found] for key, found in turns.items()}
    return Timings(turns, cpu, dict.fromkeys(turns, 7))


def measured(name: str, kind: str, **more: object) -> Measured:
    (deployment,) = [found for found in DEPLOYMENTS if found.name == name]
    (row,) = latencies(timings(SECONDS), [4], KINDS, {"int8": 200.0}, 10**8)[name]
    return Measured(deployment, kind, "int8", (row,), 1.5, 300.0, 50.0, None, 10**6, {}, None)


def test_each_is_compared_with_torch_and_with_the_quickest_float32() -> None:
    found = {name: rows[0] for name, rows in latencies(timings(SECONDS), [4], KINDS, {}, 1).items()}
    ours = found["vitq_ort"]
    assert ours.speedup is not None
    assert ours.speedup.ratio == pytest.approx(2.0)
    assert ours.quickest == "onnxruntime"  # bfloat16 and what is simulated are no float32
    assert ours.speedup_quickest is not None
    assert ours.speedup_quickest.ratio == pytest.approx(1.6)
    assert (found["torch"].speedup, found["onnxruntime"].speedup_quickest) == (None, None)
    assert ours.images_per_second == pytest.approx(4 / 0.0101)
    assert ours.cpu == pytest.approx(0.0101 / 2)
    slower = SECONDS | {"onnxruntime": 0.03}
    again = latencies(timings(slower), [4], KINDS, {}, 1)["vitq_ort"][0]
    assert (again.quickest, again.speedup_quickest) == ("", None)  # torch is the quickest, and told already


def test_with_one_thread_the_processor_is_the_clock() -> None:
    found = timings(SECONDS)
    found.cpu["vitq_ort", 4] = [value / 2 for value in found.cpu["vitq_ort", 4]]  # it waited for others
    ours = latencies(found, [4], KINDS, {}, 1, CPU)["vitq_ort"][0]
    assert ours.speedup is not None
    assert ours.speedup.ratio == pytest.approx(4.0)
    assert (ours.clock, ours.seconds, ours.wall) == ("CPU", ours.cpu, pytest.approx(0.0101))
    assert ours.cpu == pytest.approx(0.0101 / 4)


def test_the_share_of_the_roofline_is_that_of_its_own_numbers() -> None:
    found = latencies(timings(SECONDS), [4], KINDS, {"int8": 200.0, "float32": 50.0}, 10**8)
    operations = 2 * 4 * 10**8
    assert found["vitq_ort"][0].of_roofline == pytest.approx(operations / 0.0101 / 200e9)
    assert found["onnxruntime"][0].of_roofline == pytest.approx(operations / 0.01616 / 50e9)
    assert found["torch_bf16"][0].of_roofline is None


def test_without_torch_nothing_is_compared_with_it() -> None:
    kinds = {name: kind for name, kind in KINDS.items() if name != "torch"}
    found = timings(SECONDS)
    found.drop("torch", "broke")
    rows = latencies(found, [4], KINDS, {}, 1)
    assert set(rows) == set(kinds)
    assert rows["vitq_ort"][0].speedup is None
    assert rows["vitq_ort"][0].quickest == "onnxruntime"


def test_nothing_simulated_is_called_fast() -> None:
    row = measured("vitq", SIMULATED)  # twenty times as fast as float, were it one
    assert row.latencies[0].speedup is not None
    assert row.latencies[0].speedup.verdict == "faster"
    assert row.verdict == NOT_A_DEPLOYMENT
    assert "faster" in measured("vitq_ort", INTEGER).verdict
    assert "the quickest float" in measured("vitq_ort", INTEGER).verdict
    assert measured("torch", FLOAT).verdict == "what the others are compared with"


def test_the_record_is_plain_data() -> None:
    found = json.loads(json.dumps(measured("vitq_ort", INTEGER).to_json()))
    assert found["latency"][0]["median_ms"] == pytest.approx(10.1)
    assert found["latency"][0]["speedup"]["verdict"] == "faster"
    assert found["bytes"] == 10**6


def entry(name: str) -> Deployment:
    return next(found for found in DEPLOYMENTS if found.name == name)


def test_what_multiplies_floats_is_not_called_integer() -> None:
    assert seen_kind(entry("vitq_compile"), 12) == (INTEGER, "int8")
    assert seen_kind(entry("vitq_compile"), 0) == (SIMULATED, "float32")
    assert seen_kind(entry("vitq_ort"), 0) == (PACKED, "float32")
    assert seen_kind(entry("ort_static"), None) == (INTEGER, "int8")
    assert seen_kind(entry("torch"), None) == (FLOAT, "float32")
