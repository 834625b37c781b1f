"""Following channels: streams, values and scores of models whose structure is written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.channels import Channels, find_channels

WIDTH, HEADS = 12, 3


class Block(nn.Module):
    """Attention and an MLP on a residual stream; `change` says what is odd about it."""

    def __init__(self, change: str = "", bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.rand(WIDTH))
        self.q_norm, self.head_gate = nn.LayerNorm(WIDTH // HEADS), nn.Parameter(torch.rand(WIDTH // HEADS))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        change = self.change
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if change == "q_norm":
            q = self.q_norm(q)
        if change == "rotary":
            q, k = q * torch.linspace(0, 1, q.shape[-1]), k * torch.linspace(0, 1, k.shape[-1])
        if change == "shared heads":
            k = k[:, :1].expand_as(k)
        if change == "value gate":
            v = v * self.head_gate
        if change == "eager":
            out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        if change == "local":
            out = out + v.relu()
        out = self.proj(out.transpose(1, 2).reshape(b, n, -1))
        out = out * self.gate if change == "gate" else out
        x = x + out
        if change == "scalar":
            x = x + 1.0
        if change == "stream gate":
            x = x * self.gate
        if change == "post norm":
            x = self.norm2(x)
            return x + self.fc2(self.fc1(x).relu())
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class Model(nn.Module):
    def __init__(self, change: str = "", bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.table = nn.Embedding(5, WIDTH)
        self.register_buffer("fixed", torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(Block(change, bias), Block(change, bias))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.change = change

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position
        if self.change == "buffer":
            x = x + self.fixed
        if self.change == "table":
            x = x + self.table(torch.arange(5))
        x = self.norm(self.blocks(x))
        out = self.head(x.mean(1) if self.change == "pooled" else x[:, 0])
        return (out, x) if self.change == "features" else out


def found_in(change: str = "", bias: bool = True) -> Channels:
    return find_channels(Model(change, bias).eval(), lambda model: model(torch.randn(1, 3, 8, 8)))


def test_the_stream_of_a_plain_model_is_found_with_all_that_writes_and_reads_it() -> None:
    found = found_in()
    (stream,) = found.streams
    assert stream.width == WIDTH
    blocks = ("blocks.0", "blocks.1")
    writers = {"stem.weight", *(f"{b}.{name}.weight" for b in blocks for name in ("proj", "fc2"))}
    assert {p.weight for p in stream.producers} == writers
    assert {p.bias for p in stream.producers} == {name.replace("weight", "bias") for name in writers}
    readers = {f"{b}.{name}.weight": f"{b}.{norm}.weight" for b in blocks for name, norm in
               (("qkv", "norm1"), ("fc1", "norm2"))}  # fmt: skip
    assert {c.weight: c.norm for c in stream.consumers} == readers | {"head.weight": "norm.weight"}
    assert set(stream.shifts) == {("token", 2), ("position", 2)}
    assert stream.norms["norm.weight"] == ("norm.weight", "norm.bias")
    assert not any(found.left.values())


@pytest.mark.parametrize("change", ["", "eager", "gate", "pooled"])
def test_rows_of_queries_keys_and_values_are_told_apart_by_head(change: str) -> None:
    found = found_in(change)
    size = WIDTH // HEADS
    rows = torch.arange(3 * WIDTH).reshape(3, HEADS, size).tolist()
    assert len(found.scores) == len(found.values) == 2
    for number, (scores, values) in enumerate(zip(found.scores, found.values, strict=True)):
        qkv = f"blocks.{number}.attn.qkv".replace(".attn", "")
        assert (scores.queries.weight, scores.queries.bias) == (f"{qkv}.weight", f"{qkv}.bias")
        assert [list(map(list, part.index)) for part in (scores.queries, scores.keys)] == rows[:2]
        (made,), (taken,) = values.rows, values.columns
        assert list(map(list, made.index)) == rows[2]
        assert taken.weight == f"blocks.{number}.proj.weight"
        assert list(map(list, taken.index)) == torch.arange(WIDTH).reshape(HEADS, size).tolist()


def test_a_factor_before_the_stream_belongs_to_the_weight_before_it() -> None:
    (stream,) = found_in("gate").streams
    gates = {p.weight: p.gate for p in stream.producers}
    assert gates["blocks.1.proj.weight"] == "blocks.1.gate"
    assert gates["blocks.1.fc2.weight"] is None


def test_a_table_of_positions_is_a_shift_of_the_stream() -> None:
    (stream,) = found_in("table").streams
    assert ("table.weight", 1) in stream.shifts


def test_a_missing_bias_behind_a_norm_is_named() -> None:
    found = found_in(bias=False)
    (stream,) = found.streams
    assert {c.bias for c in stream.consumers if "qkv" in c.weight} == {"blocks.0.qkv.bias", "blocks.1.qkv.bias"}
    assert found.scores[0].queries.bias is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("scalar", "goes through add"),
        ("buffer", "comes from where it is not followed"),
        ("stream gate", "is multiplied with a parameter that no weight can take up"),
        ("features", "is an output of the model"),
        ("post norm", "has the output of a norm added to it"),
    ],
)
def test_what_is_in_the_way_of_a_stream_is_told(change: str, reason: str) -> None:
    found = found_in(change)
    assert found.streams == ()
    assert reason in found.left["norms"]
    assert len(found.values) == len(found.scores) == 2


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ("q_norm", "scores", "comes out of a norm"),
        ("rotary", "scores", "comes from where it is not followed"),
        ("shared heads", "scores", "shares channels between heads, or between queries and keys"),
        ("value gate", "values", "is multiplied with a parameter"),
        ("local", "values", "goes through relu"),
    ],
)
def test_what_is_in_the_way_of_heads_is_told(change: str, kind: str, reason: str) -> None:
    found = found_in(change)
    assert getattr(found, kind) == ()
    assert found.left[kind] == {reason: 2}
    assert len(found.streams) == 1


class Shared(nn.Module):
    """A weight that is used a second time, by something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = Model(), how

    def forward(self, images: Tensor) -> Tensor:
        out = self.body(images)
        block = self.body.blocks[1]
        if self.how == "weight":
            return out + block.fc1.weight.sum()  # type: ignore[union-attr,operator]
        if self.how == "bias":
            return out + F.linear(images.flatten(1)[:, :4], torch.eye(4), block.fc2.bias[:4])  # type: ignore[union-attr,index]
        return out + block.norm2.weight.sum()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("how", ["weight", "bias", "norm"])
def test_a_parameter_that_is_used_elsewhere_is_not_touched(how: str) -> None:
    found = find_channels(Shared(how).eval(), lambda model: model(torch.randn(1, 3, 8, 8)))
    assert found.streams == ()
    assert found.left["norms"] == {"a parameter is used in another way, too": 5}


def test_merged_tokens_lie_side_by_side_and_the_next_stage_has_a_stream_of_its_own() -> None:
    """Of the seeded Swin the first stage starts with a norm whose output is the stream, so it has none."""
    found = find_channels(build_zoo("seeded_swin"), lambda model: model(seeded_images(1)))
    (stream,) = found.streams
    assert stream.width == 64
    assert "layers.1.downsample.reduction.weight" in {p.weight for p in stream.producers}
    assert len(stream.norms) == 5
    assert len(found.values) == len(found.scores) == 4


class Merging(nn.Module):
    """Three stages with mergings of four tokens between; the first one's are padded."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(8), nn.LayerNorm(16)])
        self.mlps = nn.ModuleList([nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(16, 16)])
        self.merges = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(32)])
        self.reduces = nn.ModuleList([nn.Linear(16, 8, bias=False), nn.Linear(32, 16, bias=False)])
        self.head, self.odd = nn.Linear(16, 4), odd

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).permute(0, 2, 3, 1)
        for stage, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            x = x + mlp(norm(x))
            if stage < 2:
                x = F.pad(x, (0, 0, 0, 4, 0, 4)) if self.odd and stage == 0 else x
                x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
                x = self.reduces[stage](self.merges[stage](x))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("odd", [False, True])
def test_a_weight_that_reads_one_stream_writes_the_next_with_the_bias_that_it_gets(odd: bool) -> None:
    found = find_channels(Merging(odd).eval(), lambda model: model(torch.randn(1, 3, 16, 16)))
    first, second, third = found.streams
    assert [stream.width for stream in found.streams] == [4, 8, 16]
    assert ("reduces.0.weight", "reduces.0.bias") in {(c.weight, c.bias) for c in first.consumers}
    assert ("reduces.0.weight", "reduces.0.bias") in {(p.weight, p.bias) for p in second.producers}
    assert ("reduces.1.weight", "reduces.1.bias") in {(p.weight, p.bias) for p in third.producers}
    assert {c.weight for c in third.consumers} == {"mlps.2.weight", "head.weight"}


class PaddedBehindNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mlp = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(F.pad(self.norm(self.stem(x)), (0, 0, 0, 1)))  # type: ignore[no-any-return]


def test_padding_behind_a_norm_has_no_share_of_its_shift() -> None:
    found = find_channels(PaddedBehindNorm().eval(), lambda model: model(torch.randn(1, 5, 6)))
    assert found.streams == ()
    assert found.left["norms"] == {"is padded behind a norm": 1}
