"""Attention taken apart equals attention fused, for every argument of the fused functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.core import roles
from vitq.core.qmodel import QuantModel
from vitq.graph import attention
from vitq.graph.ops import PRODUCTS
from vitq.graph.trace import trace

Plain = Callable[..., QuantModel]
B, H, N, S, D = 2, 4, 5, 7, 8


class Seeing:
    """The port that changes nothing, and notes what it is shown."""

    def __init__(self) -> None:
        self.operands: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}

    def __call__(self, operand: str, tensor: Tensor) -> Tensor:
        self.operands[operand] = tensor
        return tensor

    def made(self, operand: str, result: Tensor) -> Tensor:
        self.results[operand] = result
        return result


def qkv(heads: int = H, key_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, heads, N, D), torch.randn(B, key_heads, S, D), torch.randn(B, key_heads, S, D + 2)


SDPA_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": torch.rand(N, S, generator=torch.Generator().manual_seed(1)) > 0.4},
    "float mask": {"attn_mask": torch.linspace(-3, 3, N * S).reshape(N, S)},
    "mask per head": {"attn_mask": torch.linspace(-3, 3, H * N * S).reshape(1, H, N, S)},
    "mask of -inf": {"attn_mask": torch.zeros(N, S).masked_fill(torch.arange(S) > 3, -torch.inf)},
    "query that sees nothing": {"attn_mask": torch.arange(N)[:, None] != torch.zeros(S)},
    "float query that sees nothing": {"attn_mask": torch.zeros(N, S).index_fill(0, torch.tensor([2]), -torch.inf)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.1},
    "scale and mask": {"scale": 2.0, "attn_mask": torch.linspace(-1, 1, S)[None]},
}


@pytest.mark.parametrize("kwargs", SDPA_CASES.values(), ids=SDPA_CASES)
def test_sdpa_taken_apart_equals_the_fused_function(kwargs: dict[str, Any]) -> None:
    operands = qkv()
    fused = F.scaled_dot_product_attention(*operands, **kwargs)
    torch.testing.assert_close(attention.run_sdpa(Seeing(), *operands, **kwargs), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_sdpa_with_grouped_queries_equals_the_fused_function(key_heads: int) -> None:
    operands = qkv(H, key_heads)
    fused = F.scaled_dot_product_attention(*operands, enable_gqa=True)
    port = Seeing()
    apart = attention.run_sdpa(port, *operands, enable_gqa=True)
    torch.testing.assert_close(apart, fused, atol=1e-5, rtol=1e-5)
    assert all(port.operands[name] is x for name, x in zip(("query", "key", "value"), operands, strict=True))
    assert attention.sdpa_inner(*operands, enable_gqa=True) == {"softmax": (B, H, N, S)}
    assert attention.sdpa_macs(fused, *operands) == B * H * N * S * (D + D + 2)


def test_sdpa_counts_work_where_queries_are_broadcast() -> None:
    query, key, value = qkv()
    out = F.scaled_dot_product_attention(query[:1], key, value)
    assert attention.sdpa_macs(out, query[:1], key, value) == B * H * N * S * (D + D + 2)
    assert attention.sdpa_inner(query[:1], key) == {"softmax": (B, H, N, S)}


def test_every_operand_of_sdpa_goes_through_the_port_and_every_result_is_shown_to_it() -> None:
    port, (query, key, value) = Seeing(), qkv()
    out = attention.run_sdpa(port, query, key, value)
    shapes = {name: tuple(tensor.shape) for name, tensor in port.operands.items()}
    assert shapes == {"query": (B, H, N, D), "key": (B, H, S, D), "softmax": (B, H, N, S), "value": (B, H, S, D + 2)}
    torch.testing.assert_close(port.results["query"], query @ key.mT / D**0.5)
    assert port.results["softmax"] is out


class Attend(nn.Module):
    """nn.MultiheadAttention with its arguments fixed, as a part of a model."""

    def __init__(self, how: str, **init: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, H, **init)
        self.how = how

    def forward(self, query: Tensor, other: Tensor | None = None, third: Tensor | None = None, **kwargs: Any) -> Any:
        key = query if other is None else other
        value = key if third is None else third
        return self.attention(query, key, value, **kwargs)


FLOAT_MASK = torch.linspace(-2, 2, N * N).reshape(N, N)
MHA_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights per head": ({}, {"average_attn_weights": False}),
    "bool mask": ({}, {"attn_mask": torch.ones(N, N).triu(1).bool()}),
    "float mask": ({}, {"attn_mask": FLOAT_MASK}),
    "causal": ({}, {"attn_mask": torch.ones(N, N).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "3-D mask": ({}, {"attn_mask": torch.linspace(-2, 2, B * H * N * N).reshape(B * H, N, N)}),
    "padding": ({"batch_first": True}, {"key_padding_mask": torch.arange(N)[None] > torch.tensor([[2], [3]])}),
    "padding and mask": (
        {"batch_first": True},
        {
            "key_padding_mask": torch.zeros(B, N).masked_fill(torch.arange(N) > 2, -1e9),
            "attn_mask": FLOAT_MASK,
            "need_weights": False,
        },
    ),
}


def _same(out: Any, expected: Any, atol: float = 1e-5) -> None:
    assert (out[1] is None) == (expected[1] is None)
    for a, b in zip(out, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(("init", "kwargs"), MHA_CASES.values(), ids=MHA_CASES)
def test_multihead_attention_taken_apart_equals_the_original(
    init: dict[str, Any], kwargs: dict[str, Any], plain: Plain
) -> None:
    model = Attend("self", **init).eval()
    x = torch.randn(B, N, 32) if init.get("batch_first") else torch.randn(N, B, 32)
    with torch.no_grad():
        expected = model(x, **kwargs)
        data = {"query": x, **kwargs}
        qmodel = plain(model, [data], example=data)
        _same(qmodel(x, **kwargs), expected, 1e-2)
        qmodel.set_state("off")
        _same(qmodel(x, **kwargs), expected)
    # All four matrices, both inputs of projections and all operands of attention.
    found = sorted(site.rsplit(".", 1)[1] for site in qmodel.quantizers)
    assert found == ["input", "key", "out_input", "out_weight", "query", "softmax", "value", "weight"]


@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}], ids=["same width", "separate weights"])
@pytest.mark.parametrize("shared", [True, False], ids=["key is value", "three inputs"])
def test_cross_attention_taken_apart_equals_the_original(sizes: dict[str, int], shared: bool, plain: Plain) -> None:
    sizes = {"kdim": 12, "vdim": 12} if sizes and shared else sizes
    model = Attend("cross", batch_first=True, **sizes).eval()
    x, key = torch.randn(B, N, 32), torch.randn(B, S, sizes.get("kdim", 32))
    data = {"query": x, "other": key}
    if not shared:
        data["third"] = torch.randn(B, S, sizes.get("vdim", 32))
    with torch.no_grad():
        expected = model(**data)
        qmodel = plain(model, data)
        _same(qmodel(**data), expected, 1e-2)
        qmodel.set_state("off")
        _same(qmodel(**data), expected)
    operands = {site.rsplit(".", 1)[1] for site in qmodel.quantizers}
    assert {"q_input", "k_input"} <= operands
    assert ("v_input" in operands) == (not shared)
    assert ({"q_weight", "k_weight", "v_weight"} <= operands) == bool(sizes)


def test_unbatched_multihead_attention_equals_the_original(plain: Plain) -> None:
    model, x = Attend("self").eval(), torch.randn(N, 32)
    with torch.no_grad():
        expected = model(x, average_attn_weights=False)
        qmodel = plain(model, [{"query": x}], example={"query": x})
        qmodel.set_state("off")
        _same(qmodel(x, average_attn_weights=False), expected)
    assert qmodel.graph.sites["attention:mha0.input"].axes == ("token", "channel")


def test_the_input_of_multihead_attention_has_tokens_first(plain: Plain) -> None:
    graph = trace(Attend("self", batch_first=True).eval(), torch.randn(B, N, 32))
    site = graph.sites["attention:mha0.input"]
    assert site.shape == (N, B, 32)
    assert site.axes == ("token", "batch", "channel")
    assert graph.sites["attention:mha0.out_input"].axes == ("token", "batch", "channel")
    assert graph.sites["attention:mha0.input"].role == roles.QKV_IN


@pytest.mark.parametrize("init", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_forms_not_taken_apart_stay_float_with_a_reason(init: dict[str, Any], plain: Plain) -> None:
    model = nn.Sequential(nn.Linear(32, 32), _First(nn.MultiheadAttention(32, H, **init)), nn.Linear(32, 4)).eval()
    x = torch.randn(N, B, 32)
    qmodel = plain(model, x)
    (left,) = [c for c in qmodel.graph.calls if c.reason]
    assert (left.reason, left.owner) == ("unsupported", "1.attention")
    assert next(iter(init)).replace("add_bias_kv", "bias_k") in left.detail
    assert left.macs > 0
    qmodel.set_state("off")
    with torch.no_grad():
        assert torch.equal(qmodel(x), model(x))


class _First(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.own = nn.Parameter(torch.eye(32))

    def forward(self, x: Tensor) -> Tensor:
        # A product of its own makes this an owner around the unsupported one.
        return self.attention(x @ self.own, x, x)[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_transformer_encoder_does_not_go_around_the_quantizers(
    norm_first: bool, nested: bool, plain: Plain
) -> None:
    if nested and norm_first:
        pytest.skip("torch does not nest with norm_first")
    layer = nn.TransformerEncoderLayer(32, H, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval().requires_grad_(False)
    x = torch.randn(B, N, 32)
    padding = torch.arange(N)[None] > torch.tensor([[3], [4]])
    data = {"src": x, "src_key_padding_mask": padding} if nested else {"src": x}
    with torch.no_grad():
        expected = model(**data)
        qmodel = plain(model, data, bits=3)
        assert float((qmodel(**data) - expected).abs().max()) > 1e-2
        block = qmodel.model.get_submodule("layers.0")
        assert float((block(x) - model.layers[0](x)).abs().max()) > 1e-2
        qmodel.set_state("off")
        kept = ~padding if nested else torch.ones(B, N, dtype=torch.bool)
        torch.testing.assert_close(qmodel(**data)[kept], expected[kept], atol=1e-5, rtol=1e-4)
    assert len(qmodel.graph.blocks) == 2


def test_every_name_of_sdpa_and_multihead_attention_is_known() -> None:
    assert PRODUCTS[F.scaled_dot_product_attention].kind == "sdpa"
    assert PRODUCTS[F.multi_head_attention_forward].kind == "mha"
