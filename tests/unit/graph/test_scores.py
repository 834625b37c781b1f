"""Attention that is not softmax(Q K^T) V and nothing else, in modules made for one question each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.core import roles
from vitq.core.site import Graph
from vitq.graph.trace import trace

Make = Callable[[Callable[..., Any]], Any]


def roles_of(graph: Graph, owner: str = "") -> list[str]:
    return [s.role for s in graph.sites.values() if s.owner == owner and s.role != roles.WEIGHT]


class Talking(nn.Module):
    """Scores and probabilities mixed over 4 heads, by linears or by 1x1 convolutions."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.by = by
        self.before, self.after = (nn.Linear(4, 4) if by == "linear" else nn.Conv2d(4, 4, 1) for _ in range(2))

    def mix(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.by == "linear" else layer(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = self.mix(self.after, self.mix(self.before, q @ k.mT * 0.3).softmax(-1))
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by", ["linear", "conv"])
def test_talking_heads_are_seen_through(by: str, tokens: Tensor) -> None:
    graph = trace(Talking(by).eval(), tokens)
    assert roles_of(graph) == [roles.QUERY, roles.KEY, roles.SOFTMAX_MIX, roles.VALUE]
    assert [graph.sites[f"{m}:linear0.input"].role for m in "qkvo"] == [*[roles.QKV_IN] * 3, roles.PROJ_IN]
    before, after = (graph.sites[f"{m}:{by}0.input"] for m in ("before", "after"))
    assert (before.role, after.role) == (roles.SCORES, roles.SOFTMAX_OUT)
    heads = ("batch", "token", "token", "head") if by == "linear" else ("batch", "head", "token", "token")
    assert before.axes == after.axes == heads
    assert graph.with_roles(roles.SOFTMAX_MIX)[0].axes == ("batch", "head", "token", "token")


def test_a_projection_after_one_head_is_not_taken_for_a_mixing_of_heads(small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (1, 32)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    graph = trace(small(forward), tokens)
    assert graph.sites["o:linear0.input"].role == roles.PROJ_IN


@pytest.mark.parametrize("fused", [False, True])
def test_channel_attention_has_the_axes_of_channels(fused: bool, small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (F.normalize(t.mT, dim=-1) for t in m.heads(x))  # (B, H, D, N)
        out = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT).softmax(-1) @ v
        return m.o(out.permute(0, 3, 1, 2).flatten(2))

    found = {s.role: s for s in trace(small(forward), tokens).sites.values()}
    assert found[roles.QUERY].axes == found[roles.VALUE].axes == ("batch", "head", "channel", "token")
    assert found[roles.SOFTMAX_OUT].axes == ("batch", "head", "channel", "channel")
    key = found[roles.KEY]
    assert key.shape[key.axes.index("channel")] == 8
    assert found[roles.PROJ_IN].owner == "o"


def test_a_gated_mean_of_two_softmaxes_is_still_probabilities(small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        gate = torch.sigmoid(m.p.mean())
        weights = (1 - gate) * (q @ k.mT).softmax(-1) + gate * torch.eye(16).softmax(-1)
        weights /= weights.sum(dim=-1).unsqueeze(-1)
        return m.o((weights @ v).transpose(1, 2).flatten(2))

    graph = trace(small(forward), tokens)
    assert roles_of(graph) == [roles.QUERY, roles.KEY, roles.SOFTMAX_OUT, roles.VALUE]


@pytest.mark.parametrize("fused", [False, True])
def test_relative_positions_times_queries_are_scores(fused: bool, small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        bias = torch.einsum("bhnd,nkd->bhnk", q, m.p[:16, None, :].expand(16, 16, 8) * 2)
        out = (q @ k.mT + bias).softmax(-1) @ v if not fused else F.scaled_dot_product_attention(q, k, v, bias)
        return m.o(out.transpose(1, 2).flatten(2))

    graph = trace(small(forward), tokens)
    assert graph.sites[":einsum0.lhs"].role == roles.QUERY
    assert graph.sites[":einsum0.rhs"].role == roles.WEIGHT
    assert graph.sites["q:linear0.input"].role == roles.QKV_IN
    assert len(graph.with_roles(roles.VALUE)) == 1


@pytest.mark.parametrize("after", [lambda t, v: t + v * 2, lambda t, v: F.layer_norm(t, (32,))], ids=["sum", "norm"])
def test_attention_with_something_added_or_normalised_still_enters_its_projection(
    after: Callable[..., Tensor], small: Make, tokens: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        out = (q @ k.mT).softmax(-1) @ v
        return m.o(after(out.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)))

    assert trace(small(forward), tokens).sites["o:linear0.input"].role == roles.PROJ_IN


def test_linear_attention_is_reported_as_none(small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.relu() for t in m.heads(x))
        return m.o((q @ (k.mT @ v)).transpose(1, 2).flatten(2))

    graph = trace(small(forward), tokens)
    assert not graph.has_attention
    assert roles_of(graph) == [roles.OTHER_IN] * 4
    assert graph.sites["o:linear0.input"].role == roles.HEAD_IN


# -- other roles -----------------------------------------------------------------------------------------


MERGED: dict[str, Callable[[Tensor], Tensor]] = {
    "neighbours by reshape": lambda t: t.view(2, 2, 2, 4, 32).permute(0, 1, 3, 2, 4).flatten(3),
    "neighbours by cat": lambda t: torch.cat([t[:, 0::2], t[:, 1::2]], -1),
}
NOT_MERGED: dict[str, Callable[[Tensor], Tensor]] = {
    "a map and back": lambda t: t.view(2, 4, 4, 32).permute(0, 3, 1, 2).flatten(2).mT,
    "two different tensors": lambda t: torch.cat([t, t.exp()], -1),
}


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("way", [*MERGED, *NOT_MERGED])
def test_merged_tokens_are_told_from_moved_ones(way: str, normalised: bool, tokens: Tensor) -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(32, 32), nn.LayerNorm(64)
            self.reduce, self.last = nn.LazyLinear(32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            merged = (MERGED | NOT_MERGED)[way](self.first(x) + 1)
            merged = self.norm(merged) if normalised and merged.shape[-1] == 64 else merged
            return self.last(self.reduce(merged).sin())

    model = Merging().eval()
    model(tokens)
    expected = roles.MERGE_IN if way in MERGED else roles.OTHER_IN
    assert trace(model, tokens).sites["reduce:linear0.input"].role == expected


def test_both_linears_before_a_gate_feed_an_activation(small: Make, tokens: Tensor) -> None:
    graph = trace(small(lambda m, x: m.o(F.silu(m.k(m.q(x))) * m.v(m.q(x)))), tokens)
    assert [graph.sites[f"{m}:linear0.input"].role for m in "kv"] == [roles.FC1_IN] * 2


def test_a_depthwise_convolution_does_not_hide_the_activation_behind_it(tokens: Tensor) -> None:
    class MixFfn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(self.first(x)).mT.unflatten(2, (4, 4))
            return self.fc2(F.gelu(self.depthwise(hidden).flatten(2).mT))

    graph = trace(MixFfn().eval(), tokens)
    assert graph.sites["fc1:linear0.input"].role == roles.FC1_IN
    assert graph.sites["fc2:linear0.input"].role == roles.FC2_IN


def test_embedded_text_enters_query_key_and_value_projections(small: Make) -> None:
    embedding = nn.Embedding(9, 32)

    def forward(m: Any, ids: Tensor) -> Tensor:
        q, k, v = m.heads(embedding(ids))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    graph = trace(small(forward), torch.randint(0, 9, (2, 5)))
    assert [graph.sites[f"{m}:linear0.input"].role for m in "qkv"] == [roles.QKV_IN] * 3


# -- blocks and counts -----------------------------------------------------------------------------------


class TwoAttentions(nn.Module):
    """One block with two attentions of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x, x, x)[0]
        return x + self.outer(x, x, x)[0]


def test_two_attentions_of_one_class_are_one_block(tokens: Tensor) -> None:
    model = nn.Sequential(nn.Linear(32, 32), TwoAttentions(), TwoAttentions()).eval()
    assert trace(model, tokens).blocks == ("1", "2")


def test_constant_attention_makes_no_block(tokens: Tensor) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = (nn.ModuleList(TwoAttentions() for _ in range(2)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            text = torch.linspace(-1, 1, 96).view(1, 3, 32)
            for one, other in zip(self.image, self.text, strict=True):
                x, text = one(x), other(text)
            return x @ text.mT

    graph = trace(Towers().eval(), tokens)
    assert graph.blocks == ("image.0", "image.1")


def test_recurrent_layers_are_counted_and_left_float(tokens: Tensor) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.cell = nn.LSTM(32, 8, bias=False, batch_first=True), nn.GRUCell(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.lstm(x)[0][:, 0])

    calls = {c.id: c for c in trace(Recurrent().eval(), tokens).calls}
    assert calls["lstm:lstm0"].macs == 16 * 4 * (32 * 8 + 8 * 8)
    assert calls["cell:gru_cell0"].macs == 3 * (8 * 4 + 4 * 4)
    assert {c.reason for c in calls.values()} == {"unsupported"}
