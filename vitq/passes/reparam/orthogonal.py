"""Orthogonal matrices that spread every channel evenly over all others: Hadamard matrices with random signs.

Shapes:  n channels; matrices (n, n) float64, x -> x R
Formula: R = H diag(signs) / sqrt(n), entries +-1 / sqrt(n)
         R keeps the mean of the channels if R 1 = 1: a reflection behind it takes what R makes of the ones back to them
Source:  Paley, J. Math. Phys. 12, 1933 (Hadamard matrices of size q + 1 for a prime q = 3 mod 4); random signs: QuIP#,
         arXiv 2402.04396, section 3
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flat(n: int) -> Tensor:
    """An orthogonal matrix whose first row is constant, with entries of one size where a Hadamard matrix is known.

    Sizes 2**k and 2**k (q + 1) with a prime q = 3 mod 4 are known here, which covers the widths of published vision
    transformers; another odd factor gets the Hartley transform, cos + sin.
    """
    from scipy.linalg import hadamard

    power = n & -n
    splits = (power >> shift for shift in range(power.bit_length()))
    for outer in splits:
        inner = _paley(n // outer)
        if inner is not None:
            break
    else:
        outer, inner = power, _hartley(n // power)
    return torch.kron(torch.from_numpy(hadamard(outer)).double(), inner) / math.sqrt(n)


def random_flat(n: int, seed: int, count: int = 1) -> Tensor:
    """(count, n, n) the flat matrix with random signs of its columns. The seed decides, on any machine."""
    draw = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (count, 1, n), generator=draw).double() - 1
    return flat(n) * signs


def mean_keeping(matrix: Tensor) -> Tensor:
    """The same orthogonal matrix behind a reflection, after which R 1 = 1."""
    ones = matrix.new_full((matrix.shape[0],), 1 / math.sqrt(matrix.shape[0]))
    normal = matrix @ ones - ones
    length = normal @ normal
    if length < torch.finfo(matrix.dtype).eps:
        return matrix
    return matrix - torch.outer(normal, normal @ matrix) * (2 / length)


def _paley(n: int) -> Tensor | None:
    """A Hadamard matrix of this size with a first row of ones, if n - 1 is a prime 3 mod 4, or n is 1."""
    q = n - 1
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if q % 4 != 3 or any(q % divisor == 0 for divisor in range(3, math.isqrt(q) + 1, 2)):
        return None
    residues = torch.full((q,), -1.0, dtype=torch.float64)
    residues[[i * i % q for i in range(1, q)]] = 1.0
    residues[0] = 0.0
    steps = torch.arange(q)
    matrix = torch.eye(n, dtype=torch.float64)
    matrix[1:, 1:] += residues[(steps[:, None] - steps) % q]
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    return matrix


def _hartley(n: int) -> Tensor:
    steps = torch.arange(n, dtype=torch.float64)
    angles = 2 * math.pi / n * (torch.outer(steps, steps) % n)
    return angles.cos() + angles.sin()
