"""Orthogonal matrices with entries of one size, and those that keep the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from vitq.passes.reparam.orthogonal import flat, mean_keeping, random_flat

# Widths of published vision transformers, of their heads and stages, and some that no Hadamard matrix is known for.
KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1152, 1280]
UNKNOWN = [3, 7, 10, 36, 56, 100, 224]


@pytest.mark.parametrize("n", [*KNOWN, *UNKNOWN])
def test_it_is_orthogonal_and_its_first_row_is_constant(n: int) -> None:
    matrix = flat(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("n", KNOWN)
def test_entries_have_one_size_where_a_hadamard_matrix_is_known(n: int) -> None:
    torch.testing.assert_close(flat(n).abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("n", UNKNOWN)
def test_no_entry_is_much_larger_elsewhere(n: int) -> None:
    assert flat(n).abs().max() * n**0.5 < 1.42  # sqrt(2), the most that cos + sin can be


def test_a_power_of_two_is_sylvesters_matrix() -> None:
    assert np.array_equal((flat(16) * 4).numpy(), hadamard(16))


def test_paleys_matrix_of_size_12_is_made_of_the_squares_modulo_11() -> None:
    squares = {1, 3, 4, 5, 9}
    for row in range(11):
        for column in range(11):
            step = (row - column) % 11
            expected = 1 if step == 0 or step in squares else -1
            assert round(float(flat(12)[row + 1, column + 1]) * 12**0.5) == expected


@pytest.mark.parametrize("n", [2, 3, 12, 64, 96, 192, 224, 768])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_that_keeps_the_mean_commutes_with_layer_norm(n: int, seed: int) -> None:
    matrix = mean_keeping(random_flat(n, seed)[0])
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
    x = torch.randn(50, n, dtype=torch.float64) * torch.linspace(0.1, 30, n, dtype=torch.float64) + 3
    torch.testing.assert_close((x @ matrix).mean(1), x.mean(1))
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(norm(x @ matrix, (n,)), norm(x, (n,)) @ matrix, rtol=1e-9, atol=1e-9)


def test_the_reflection_leaves_entries_small() -> None:
    """One channel alone would otherwise land on a few: most entries stay at one size."""
    sizes = mean_keeping(random_flat(192, 0)[0]).abs() * 192**0.5
    assert sizes.max() < 5
    assert sizes.flatten().quantile(0.99) < 1.5


def test_without_the_reflection_the_mean_is_not_kept() -> None:
    matrix = random_flat(64, 0)[0]
    assert (matrix.sum(1) - 1).abs().max() > 0.5


def test_the_seed_decides_and_every_head_has_signs_of_its_own() -> None:
    first, again, other = random_flat(32, 5, 4), random_flat(32, 5, 4), random_flat(32, 6, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(m.sign()[0].tolist()) for m in first}) == 4
