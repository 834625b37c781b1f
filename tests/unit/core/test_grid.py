"""Values on a uniform grid: the same in pieces as at once, with the gradients of LSQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitq.core import grid
from vitq.core.grid import on_grid, pieces

SHAPES = [
    ((6, 5, 8), ()), ((6, 5, 8), (8,)), ((6, 5, 8), (6, 1, 1)), ((6, 5, 8), (5, 1)), ((2, 3, 4, 8), (3, 1, 1)),
    ((2, 3, 4, 8), (1, 3, 1, 8)), ((40,), (40,)), ((40,), ()), ((6, 5, 8), (6, 5, 8)),
]  # fmt: skip


def oracle(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and the gradients for x and scale, in float64 and one element at a time."""
    shape = x.shape
    flat = [t.expand(shape).double().flatten().tolist() for t in (x, scale, low, high, grad)]
    values, by_x, by_scale = [], [], []
    for value, step, least, most, slope in zip(*flat, strict=True):
        ratio = float(torch.tensor(value) / torch.tensor(step))  # as float32 has it, so that both fall to one side
        code = float(round(ratio))
        inside = least <= code <= most
        values.append(min(max(code, least), most) * step)
        by_x.append(slope if inside else 0.0)
        by_scale.append(slope * (code - ratio if inside else least if code < least else most))
    made = [torch.tensor(each, dtype=torch.float64).view(shape) for each in (values, by_x, by_scale)]
    return made[0], made[1], made[2].sum_to_size(scale.shape)


@pytest.mark.parametrize("piece", [1, 7, 24, 10_000])
@pytest.mark.parametrize(("shape", "params"), SHAPES, ids=str)
def test_values_and_gradients_in_pieces_are_those_of_the_formula(
    shape: tuple[int, ...], params: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "PIECE", piece)
    torch.manual_seed(0)
    scale = (torch.rand(params) + 0.2).requires_grad_()
    zero_point = torch.randint(0, 8, params).float()
    low, high = -zero_point, 7 - zero_point
    for x in (3 * torch.randn(shape), 3 * torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))):
        grad = torch.randn(shape)
        values, by_x, by_scale = oracle(x, scale.detach(), low, high, grad)
        leaf = x.detach().requires_grad_()
        made = on_grid(leaf, scale, low, high)
        assert torch.allclose(made.double(), values, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(on_grid(x, scale, low, high), made)
        found_x, found_scale = torch.autograd.grad(made, (leaf, scale), grad)
        assert torch.allclose(found_x.double(), by_x)
        assert torch.allclose(found_scale.double(), by_scale, atol=1e-4)


def test_values_beyond_float32_have_a_gradient_that_is_a_number() -> None:
    x = torch.tensor([1e38, -1e38, torch.inf, 0.0], requires_grad=True)
    scale = torch.tensor(1e-3, requires_grad=True)
    on_grid(x, scale, torch.tensor(-8.0), torch.tensor(7.0)).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 1]
    assert scale.grad.item() == 7 - 8 + 7


def test_only_the_gradient_that_is_wanted_is_given() -> None:
    low, high = torch.tensor(-8.0), torch.tensor(7.0)
    x, scale = torch.randn(5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    on_grid(x, scale.detach(), low, high).sum().backward()
    on_grid(x.detach(), scale, low, high).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert on_grid(x.detach(), scale.detach(), low, high).grad_fn is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_cover_everything_once(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    cut = data.draw(st.integers(0, len(shape)))
    param = torch.randn([n if keep else 1 for n, keep in zip(shape, kept, strict=True)][cut:])
    x = (
        torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
        if data.draw(st.booleans())
        else torch.randn(shape)
    )
    made, size = torch.zeros(shape), data.draw(st.integers(1, 30))
    whole, grid.PIECE = grid.PIECE, size
    try:
        for part, out, one in pieces((x, made), (param,)):
            out += part * one
    finally:
        grid.PIECE = whole
    assert torch.equal(made, x * param)
