"""How fast this machine multiplies matrices at best: what the products of a deployment can reach, and no more.

Float, bfloat16 and 8-bit products of several sizes, through oneDNN as torch ships it (on the CPU, float32 through
torch's own library, too); the quickest repetition of the quickest one is the roofline, so that other work on the
machine lowers it as little as possible.

Shapes:  x (M, K)    weight (N, K)    result (M, N)
Units:   billions of operations a second; a product of (M, K) and (N, K) is 2 M N K operations
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = ("float32", "bfloat16", "int8")
# Short products fit between two turns of whatever else runs; a GPU needs long ones to be busy.
SHAPES = ((256, 256, 256), (384, 384, 384), (512, 512, 512), (197, 192, 768), (197, 768, 768), (788, 192, 768))
LARGE = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))
REPEATS = 5  # of every product, at least
SECONDS = 0.2  # for every product
Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Point:
    """One product.

    Attributes:
        numbers, kernel: what was multiplied by what.
        shape: (M, N, K).
        gops: billions of operations a second, of the quickest repetition.
        median_gops: of the median one.
    """

    numbers: str
    kernel: str
    shape: tuple[int, int, int]
    gops: float
    median_gops: float


def products(numbers: str, shape: tuple[int, int, int], device: str) -> dict[str, Product]:
    """Kernel -> a product of random matrices. Its result is x times the transposed weight; of int8, in int32 or float.

    Args:
        numbers: one of NUMBERS.
        shape: (M, N, K).
        device: "cpu", "cuda" …
    """
    m, n, k = shape
    if numbers != "int8":
        dtype = getattr(torch, numbers)
        x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        found: dict[str, Product] = {"torch": lambda: torch.nn.functional.linear(x, weight)}
        if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
            found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return found
    codes, steps = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    found = {"int_mm": lambda: torch._int_mm(codes, steps.t())}
    if device == "cpu" and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
        bytes_packed = torch.ops.onednn.qlinear_prepack(steps.contiguous(), None)
        ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int64)
        found["onednn"] = lambda: torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, bytes_packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return found


def measure(numbers: str, shape: tuple[int, int, int], device: str, seconds: float = SECONDS) -> list[Point]:
    """Every product of these numbers that this machine has."""
    m, n, k = shape
    points = []
    for kernel, product in products(numbers, shape, device).items():
        try:
            product()
        except RuntimeError:  # a device or a size that has no such kernel
            continue
        times = _times(product, device, seconds)
        best, median = times[0], times[len(times) // 2]
        work = 2 * m * n * k / 1e9
        points.append(Point(numbers, kernel, shape, work / best, work / median))
    return points


def shapes(device: str) -> tuple[tuple[int, int, int], ...]:
    """Sizes (M, N, K) whose products are tried."""
    return SHAPES if device == "cpu" else LARGE


def roofline(device: str, seconds: float = SECONDS) -> dict[str, Point]:
    """Numbers -> the quickest product; without those that this machine cannot multiply."""
    best: dict[str, Point] = {}
    for numbers in NUMBERS:
        points = [point for shape in shapes(device) for point in measure(numbers, shape, device, seconds)]
        if points:
            best[numbers] = max(points, key=lambda point: point.gops)
    return best


def _times(product: Product, device: str, seconds: float) -> list[float]:
    """Seconds of repetitions, ascending."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while len(found) < REPEATS or time.perf_counter() < end:
            start = time.perf_counter()
            product()
            if device != "cpu":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
    return sorted(found)
