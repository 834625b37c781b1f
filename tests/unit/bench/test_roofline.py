"""The roofline multiplies what it says it does, and counts it rightly."""

from __future__ import annotations

import pytest
import torch

from vitq.bench import roofline

SHAPE = (32, 16, 64)


@pytest.mark.parametrize("numbers", roofline.NUMBERS)
def test_products_of_one_kind_agree_with_float64(numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for name in ("randn", "randint"):
        plain = getattr(torch, name)

        def keep(*words, plain=plain, **more):
            drawn.append(plain(*words, **more))
            return drawn[-1]

        monkeypatch.setattr(torch, name, keep)
    found = roofline.products(numbers, SHAPE, "cpu")
    x, weight = drawn
    if numbers == "bfloat16":
        x, weight = x.bfloat16(), weight.bfloat16()
    expected = x.double() @ weight.double().T
    assert len(found) >= 1
    for kernel, product in found.items():
        got = product().double()
        assert got.shape == (SHAPE[0], SHAPE[1]), kernel
        scale = 0.02 if numbers == "bfloat16" else 1e-5 if numbers == "float32" else 0
        # Without VNNI, oneDNN's bytes are added in 16 bits, with saturation: then only their time is of use.
        if not (numbers == "int8" and kernel == "onednn" and "VNNI" not in cpu_flags()):
            assert (got - expected).abs().max() <= scale * expected.abs().max(), kernel


def cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().upper()
    except OSError:
        return ""


def test_operations_are_counted_and_the_best_product_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_times", lambda product, device, seconds: [0.5, 1.0, 2.0])
    points = roofline.measure("float32", (1000, 1000, 1000), "cpu")
    assert {(point.gops, point.median_gops) for point in points} == {(4.0, 2.0)}
    best = roofline.roofline("cpu")
    assert set(best) == set(roofline.NUMBERS)
    largest = max(m * n * k for m, n, k in roofline.SHAPES)
    assert all(point.gops == pytest.approx(2e-9 * largest / 0.5) for point in best.values())
