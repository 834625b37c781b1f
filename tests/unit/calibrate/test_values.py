"""Which row makes which channel behind the attention: found whatever the layout, refused where it is no fold."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calibrate.values import ValuePath, value_paths
from vitq.core.batches import Batches
from vitq.core.roles import PROJ_IN
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.pipeline import insert, resolve

C, HEADS, TOKENS = 12, 3, 5
D = C // HEADS
ORDER = torch.randperm(C, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Plain attention; subclasses change one thing."""

    bias = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=self.bias), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), v, x)

    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y)  # type: ignore[no-any-return]


class WithoutBias(Attention):
    bias = False


class Interleaved(Attention):
    """Query, key and value of one head lie side by side."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, D)).permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(-2, -1) / D**0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), v, x)


class Reordered(Attention):
    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y[..., ORDER])  # type: ignore[no-any-return]


class Three(Attention):
    """A projection for each of query, key and value; the last is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.q, self.k = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = (f(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for f in (self.v, self.q, self.k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), v, x)


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(C, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Gated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y * self.gate(x).sigmoid())  # type: ignore[no-any-return]


class Rectified(Attention):
    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y.clamp(min=0))  # type: ignore[no-any-return]


class Leaking(Attention):
    """Values go somewhere else, too."""

    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y) + v.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class Grouped(Attention):
    """One head of keys and values for all queries: a row makes several channels."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2), v, x)


class Shared(Attention):
    """The linear behind the attention is called twice."""

    def out(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.proj(y) + self.proj(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module], blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(blocks))
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def tokens(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, TOKENS, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def paths(model: nn.Module, x: Tensor) -> dict[str, ValuePath]:
    qmodel = insert(model, trace(model, x[:1]), resolve("minmax", "w4a4"))
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    states = {site: quantizer.state for site, quantizer in qmodel.quantizers.items()}
    found = value_paths(qmodel, Batches.of(x))
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, before[name]) or bool(value.isnan().all()), "asking changes nothing"
    assert {site: quantizer.state for site, quantizer in qmodel.quantizers.items()} == states
    assert not any(quantizer.observer for quantizer in qmodel.quantizers.values())
    return found


IN_ORDER = torch.arange(C)
INTERLEAVED = torch.arange(3 * C).reshape(HEADS, 3, D)[:, 2].flatten()
FOUND = {
    Attention: (2 * C + IN_ORDER, "blocks.{}.qkv.weight", "blocks.{}.qkv.bias"),
    WithoutBias: (2 * C + IN_ORDER, "blocks.{}.qkv.weight", None),
    Interleaved: (INTERLEAVED, "blocks.{}.qkv.weight", "blocks.{}.qkv.bias"),
    Reordered: (2 * C + ORDER, "blocks.{}.qkv.weight", "blocks.{}.qkv.bias"),
    Three: (IN_ORDER, "blocks.{}.v.weight", "blocks.{}.v.bias"),
    Torch: (2 * C + IN_ORDER, "blocks.{}.mha.in_proj_weight", "blocks.{}.mha.in_proj_bias"),
}


@pytest.mark.parametrize("kind", list(FOUND))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_found_in_every_layout(kind: type[nn.Module], dtype: torch.dtype) -> None:
    rows, value, bias = FOUND[kind]
    found = list(paths(Net(kind).to(dtype).eval(), tokens(dtype=dtype)).values())
    assert len(found) == 2
    for number, path in enumerate(found):
        assert torch.equal(path.rows, rows)
        assert path.value == value.format(number)
        assert path.bias == (None if bias is None else bias.format(number))


@pytest.mark.parametrize("kind", list(FOUND))
def test_any_ratio_moved_along_a_path_keeps_the_output(kind: type[nn.Module]) -> None:
    model = Net(kind).eval()
    moved, x = copy.deepcopy(model), tokens()
    generator = torch.Generator().manual_seed(5)
    for path in paths(model, x).values():
        path.divide(moved, torch.rand(C, generator=generator) * 3 + 0.2)
        assert not torch.equal(moved.get_parameter(path.value), model.get_parameter(path.value))
    with torch.no_grad():
        torch.testing.assert_close(moved(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Gated, Rectified, Leaking, Grouped, Shared])
def test_what_is_no_fold_is_left_alone(kind: type[nn.Module]) -> None:
    assert not paths(Net(kind).eval(), tokens())


def test_one_that_is_no_fold_does_not_spoil_the_others() -> None:
    model = Net(Attention, blocks=3)
    model.blocks[1] = Leaking()
    found = paths(model.eval(), tokens())
    assert [path.value for path in found.values()] == ["blocks.0.qkv.weight", "blocks.2.qkv.weight"]


def test_a_model_without_attention_has_no_paths() -> None:
    assert not paths(nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 4)).eval(), tokens())


@pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin", "fashion_vit"])
def test_every_attention_of_the_zoo_has_a_path(name: str) -> None:
    model = build_zoo(name)
    x = seeded_images(2) if name.startswith("seeded") else torch.randn(2, 3, 28, 28)
    graph = trace(model, x[:1])
    assert set(paths(model, x)) == {site.id for site in graph.with_roles(PROJ_IN)}
