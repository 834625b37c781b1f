"""Products of a traced model, and samples of them: which there are, what they compute, how fair the samples are."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import vitq
from vitq.calibrate.products import EVEN, Chunk, Product, Samples, _chosen, products
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.site import Site
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

ALL = 2**62


def site(operand: str, param: str | None = None) -> Site:
    return Site(f"x:op0.{operand}", "", "op", 0, operand, "OTHER_IN", (), (), param=param)


def product(kind: str, param: str | None = None) -> Product:
    return Product(kind, site("lhs"), site("rhs", param), "")


def samples(
    kind: str, rows: int = ALL, entries: int = ALL, per_entry: int = ALL, images: int = 8, **options: object
) -> Samples:
    made = product(kind, **options)  # type: ignore[arg-type]
    return Samples(made, (None, None), rows, entries, per_entry, images)


# -- which there are -----------------------------------------------------------------------------------------


def test_every_product_of_a_vision_transformer_is_found_in_order() -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w4a4", seeded_images(2), freeze=False)
    found = products(qmodel)
    block = ["linear", "scores", "rows", "linear", "linear", "linear"]
    assert [p.kind for p in found] == ["conv", *block * 3, "linear"]
    assert all(p.owns_right for p in found)
    covered = {s.id for p in found for s in (p.left, p.right)}
    assert covered == {s.id for s in qmodel.sites()}


def test_a_product_with_one_quantized_operand_is_found_and_one_without_is_not() -> None:
    for bits, count in (("w4a16", 14), ("w16a4", 20)):
        qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", bits, seeded_images(2), freeze=False)
        assert len(products(qmodel)) == count


class Several(nn.Module):
    """A tied weight, a linear that is called twice, an einsum, a weight on the left, and a plain product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.mix, self.out = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        x = self.twice(torch.relu(self.twice(x)))
        x = torch.einsum("btc,st->bsc", x, self.mix)
        return (self.mix @ x) @ self.out


def test_of_tied_weights_the_first_product_owns_them() -> None:
    qmodel = vitq.quantize(Several().eval(), "minmax", "w4a4", torch.randn(8, 4, 6), freeze=False)
    found = products(qmodel)
    assert [(p.module, p.kind, p.owns_right) for p in found if p.module in ("a", "b")] == [
        ("a", "linear", True), ("b", "linear", False),
    ]  # fmt: skip
    assert sum(p.module == "twice" for p in found) >= 1
    assert [p.kind for p in found if p.module == ""] == ["rows", "rows"]


class Padded(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def test_a_convolution_that_pads_before_its_call_is_left_out() -> None:
    for mode, count in (("zeros", 1), ("reflect", 0)):
        qmodel = vitq.quantize(Padded(mode).eval(), "minmax", "w4a4", torch.randn(2, 3, 8, 8), freeze=False)
        assert len(products(qmodel)) == count


# -- what they compute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "scores", "rows"])
@pytest.mark.parametrize("candidates", ["left", "right", None])
def test_a_product_with_candidates_is_one_product_for_each(kind: str, candidates: str | None) -> None:
    left = torch.randn(2, 3, 5, 6)
    right = {"linear": torch.randn(7, 6), "scores": torch.randn(2, 3, 4, 6), "rows": torch.randn(2, 3, 6, 4)}[kind]
    one = {"linear": F.linear, "scores": lambda a, b: a @ b.mT, "rows": torch.matmul}[kind]
    lefts, rights = left * torch.rand(4, 1, 1, 1, 1), right * torch.rand(4, *[1] * right.ndim)
    found = product(kind).multiply(
        nn.Module(), lefts if candidates == "left" else left, rights if candidates == "right" else right
    )
    wanted = [
        one(lefts[k] if candidates == "left" else left, rights[k] if candidates == "right" else right) for k in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(wanted) if candidates else wanted[0])


@pytest.mark.parametrize("layers", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_with_candidates_is_one_for_each(layers: type) -> None:
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[layers]
    conv = layers(4, 6, 3, stride=2, padding=1, groups=2)
    conv_product = Product("conv", site("input"), site("weight"), "conv")
    model = nn.ModuleDict({"conv": conv})
    x, weight = torch.randn(2, 4, *[7] * dims), conv.weight.detach()
    bias = conv.bias.detach().reshape(-1, *[1] * dims)
    factors = torch.rand(3)
    plain = conv(x).detach() - bias
    torch.testing.assert_close(conv_product.multiply(model, x, weight), plain, rtol=1e-4, atol=1e-5)
    many = factors.reshape(3, *[1] * (dims + 2))
    wanted = many * plain
    for found in (conv_product.multiply(model, many * x, weight), conv_product.multiply(model, x, many * weight)):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_groups_that_keep_apart_in_the_result_have_a_dimension_there() -> None:
    def of(
        kind: str, side: str, keep: tuple[int, ...], sizes: tuple[int, ...], group: int = 0
    ) -> tuple[int, ...] | None:
        layout = Layout(keep, sizes, -min(keep, default=0), group)
        return product(kind).groups_of(side, UniformQuantizer(4, layout))

    table = [
        ("linear", "left", (), (), 0, ()), ("linear", "left", (-1,), (6,), 0, None),
        ("linear", "left", (-2,), (5,), 0, (-2,)),
        ("linear", "left", (-2,), (3,), 2, None), ("linear", "right", (-2,), (7,), 0, (-1,)),
        ("linear", "right", (-3, -2), (7, 3), 2, (-1,)),
        ("conv", "right", (-4,), (7,), 0, (1,)), ("conv", "left", (-3,), (4,), 0, None),
        ("scores", "left", (-3,), (2,), 0, (-3,)), ("scores", "right", (-3,), (2,), 0, (-3,)),
        ("scores", "left", (-2,), (5,), 0, (-2,)), ("scores", "right", (-2,), (5,), 0, (-1,)),
        ("scores", "left", (-1,), (6,), 0, None), ("scores", "right", (-1,), (6,), 0, None),
        ("rows", "left", (-2,), (5,), 0, (-2,)), ("rows", "right", (-2,), (5,), 0, None),
        ("rows", "left", (-1,), (5,), 0, None), ("rows", "right", (-1,), (6,), 0, (-1,)),
        ("rows", "right", (-3,), (1,), 0, ()),  # one head of values for all heads
    ]  # fmt: skip
    for kind, side, keep, sizes, group, wanted in table:
        assert of(kind, side, keep, sizes, group) == wanted, (kind, side, keep)


# -- samples -------------------------------------------------------------------------------------------------


def test_a_sample_of_everything_is_everything() -> None:
    x, w = torch.randn(8, 5, 6), torch.randn(7, 6)
    all_rows = samples("linear", param="w")
    for part, seen in ((x[:3], 0), (x[3:], 3)):
        all_rows.see_left(part)
        all_rows.see_made(part @ w.T, seen, len(part))
    all_rows.merge()
    (chunk,) = all_rows.chunks
    assert torch.equal(chunk.left, x.flatten(0, 1))
    torch.testing.assert_close(chunk.made, (x @ w.T).flatten(0, 1))
    assert chunk.right is None
    a, b = torch.randn(8, 2, 5, 6), torch.randn(8, 2, 4, 6)
    attention = samples("scores")
    for start, end in ((0, 3), (3, 8)):
        attention.see_left(a[start:end])
        attention.see_right(b[start:end])
        attention.see_made(a[start:end] @ b[start:end].mT, start, end - start)
    attention.merge()
    (chunk,) = attention.chunks
    assert chunk.right is not None
    assert torch.equal(chunk.left, a)
    assert torch.equal(chunk.right, b)
    assert chunk.by_entry


def test_whole_operands_are_let_go_when_their_product_was_seen() -> None:
    """Found by measuring: those of every product stayed until the end of the pass."""
    rows = samples("rows", entries=1, per_entry=2, images=8)
    memory = [np.ones(shape, dtype=np.float32) for shape in ((8, 2, 9, 5), (8, 2, 5, 6))]
    alive = [weakref.ref(each) for each in memory]
    a, v = map(torch.from_numpy, memory)
    rows.see_left(a)
    rows.see_right(v)
    rows.see_made(a @ v, 0, 8)
    assert rows.chunks
    del a, v, memory
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("cut", [(8,), (4, 4), (1, 2, 5), (3, 3, 2)])
def test_the_size_of_a_sample_does_not_depend_on_the_micro_batches(cut: tuple[int, ...]) -> None:
    linear, rows = samples("linear", rows=24, param="w"), samples("rows", entries=4, per_entry=3)
    seen = 0
    for images in cut:
        x, a, v = torch.randn(images, 5, 6), torch.rand(images, 2, 9, 5), torch.randn(images, 2, 5, 6)
        linear.see_left(x)
        linear.see_made(x, seen, images)
        rows.see_left(a)
        rows.see_right(v)
        rows.see_made(a @ v, seen, images)
        seen += images
    linear.merge()
    rows.merge()
    assert sum(len(chunk.left) for chunk in linear.chunks) == 24
    assert [chunk.left.shape for chunk in rows.chunks] == [(4, 2, 3, 5)]
    for chunk in rows.chunks:
        assert chunk.right is not None
        torch.testing.assert_close(chunk.left @ chunk.right, chunk.made)


@pytest.mark.parametrize("concentration", [0.0, 3.0])
def test_importance_sampling_is_unbiased(concentration: float) -> None:
    """Over orders of the rows, the mean estimate of a weighted sum is that sum."""
    draw = torch.Generator().manual_seed(0)
    square = torch.exp(concentration * torch.randn(60, 4, generator=draw))
    errors = torch.rand(60, 4, generator=draw)
    wanted = float((square * errors).sum())
    estimates = []
    for _ in range(1500):
        order = torch.randperm(60, generator=draw)
        at, weight = _chosen(square[order], 60, 10)
        assert weight is not None
        assert len(at) == 10
        estimates.append(float((weight * errors[order][at]).sum()))
    spread = torch.tensor(estimates).std() / len(estimates) ** 0.5
    assert abs(sum(estimates) / len(estimates) - wanted) < 4 * float(spread)


def test_importance_sampling_is_better_than_even_sampling_where_few_rows_matter() -> None:
    draw = torch.Generator().manual_seed(0)
    square = torch.full((197, 3), 1e-6)
    square[5] = 1.0
    off = {"importance": 0.0, "even": 0.0}
    for _ in range(100):
        order = torch.randperm(197, generator=draw)
        errors = torch.rand(197, 3, generator=draw)
        wanted = float((square[order] * errors).sum())
        at, weight = _chosen(square[order], 197, 16)
        assert weight is not None
        off["importance"] += (float((weight * errors[at]).sum()) - wanted) ** 2
        even = ((torch.arange(16) + 0.5) / 16 * 197).long()
        off["even"] += (float((square[order][even] * errors[even]).sum()) * 197 / 16 - wanted) ** 2
    assert off["importance"] < 0.01 * off["even"]


def test_rows_of_an_entry_follow_its_gradients() -> None:
    a, v = torch.rand(2, 3, 40, 6), torch.randn(2, 3, 6, 5)
    gradient = torch.zeros(2, 3, 40, 5)
    gradient[0, :, 7], gradient[1, :, 31] = 1.0, 2.0
    some = samples("rows", per_entry=8, images=2)
    some._take(a, v, a @ v, gradient, 0, 2)
    some.merge()
    (chunk,) = some.chunks
    assert chunk.weight is not None
    assert chunk.left.shape == (2, 3, 8, 6)
    assert bool((chunk.left[0] == a[0, :, 7:8]).all(-1).any())
    assert bool((chunk.left[1] == a[1, :, 31:32]).all(-1).any())
    weight = gradient.square()
    weight = EVEN * weight.mean() + (1 - EVEN) * weight
    estimate, wanted = chunk.weight.sum((1, 2, 3)), weight.sum((1, 2, 3))
    torch.testing.assert_close(estimate, wanted, rtol=0.35, atol=0)
    torch.testing.assert_close(chunk.left @ chunk.right, chunk.made)  # type: ignore[operator]


def test_without_any_gradient_errors_count_alike_but_not_beside_samples_with_some() -> None:
    """Found by this test: weights of one stood beside weights of 1e-12 and decided alone."""
    x, w = torch.randn(8, 6), torch.randn(7, 6)
    none = samples("linear", param="w")
    none._take(x, None, x @ w.T, torch.zeros(8, 7), 0, 8)
    none.merge()
    assert none.chunks[0].weight is None
    some = samples("linear", param="w")
    some._take(x, None, x @ w.T, torch.zeros(8, 7), 0, 4)
    some._take(x[:, :5], None, x @ w.T, torch.full((8, 7), 1e-6), 4, 4)
    some.merge()
    weights = [chunk.weight for chunk in some.chunks]
    assert len(weights) == 2
    assert weights[0] is not None
    assert weights[1] is not None
    assert not weights[0].any()
    assert float(weights[1].min()) > 0


@pytest.mark.parametrize(
    "shapes", [((2, 5, 6), (8, 6, 4)), ((5, 6), (8, 6, 4)), ((6,), (6, 6)), ((1, 5, 6), (8, 6, 4))]
)
def test_products_whose_entries_do_not_match_are_not_used(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left, right = torch.randn(shapes[0]), torch.randn(shapes[1])
    if shapes[0] == (2, 5, 6):
        right = right[:1]  # this one can be: all entries have the same right operand
    found = samples("rows")
    found.see_left(left)
    found.see_right(right)
    found.see_made(left @ right, 0, 8)
    assert found.unusable == (shapes[0] != (2, 5, 6))
    for chunk in found.chunks:
        assert chunk.right is not None
        torch.testing.assert_close(chunk.left @ chunk.right, chunk.made)


def test_a_part_of_a_sample_keeps_operands_together() -> None:
    a, v = torch.rand(32, 4, 6), torch.randn(32, 6, 5)
    chunk = Chunk(a, v, a @ v, None, by_entry=True).every(8)
    assert chunk.right is not None
    torch.testing.assert_close(chunk.left @ chunk.right, chunk.made)
    assert len(chunk.left) == 4
    # A weight that is computed has as many rows as the sample, by chance.
    x, w = torch.randn(32, 6), torch.randn(32, 6)
    chunk = Chunk(x, w, x @ w.T, None).every(8)
    assert chunk.right is not None
    torch.testing.assert_close(chunk.left @ chunk.right.T, chunk.made)


def test_an_operand_that_changed_before_its_gradient_came_gives_no_sample() -> None:
    w = torch.randn(7, 6)
    for change in (False, True):
        x = torch.randn(8, 6).requires_grad_().clone()
        found = samples("linear", param="w")
        found.see_left(x)
        made = x @ w.T
        found.see_made(made, 0, 8, lambda: True)
        if change:
            x.add_(1)
        made.sum().backward()
        assert bool(found.chunks) != change


class Computed(nn.Module):
    """A weight that is computed at every call, with as many rows as a small sample has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = parametrizations.weight_norm(nn.Linear(6, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("objective", ["mse", "hessian"])
def test_computed_weights_are_sampled_with_the_result(objective: str) -> None:

    passes = (PassSpec.of("fit"), PassSpec.of("fit_products", objective=objective, rows=32))
    recipe = Recipe("computed", "none", (Rule(Format("uniform", 4)),), passes)
    qmodel = vitq.quantize(Computed().eval(), recipe, "w4a4", torch.randn(32, 4, 6))
    assert qmodel.log["fit_products"]["fitted"] == 1
