"""What a trace finds, in modules made for one question each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitq.core import roles
from vitq.core.qmodel import QuantModel
from vitq.core.site import Graph
from vitq.graph.ops import einsum_labels
from vitq.graph.trace import trace

Plain = Callable[..., QuantModel]
Make = Callable[[Callable[..., Any]], Any]
Sqnr = Callable[[Tensor, Tensor], float]
ATTENTION = [roles.QUERY, roles.KEY, roles.SOFTMAX_OUT, roles.VALUE]


def check(model: nn.Module, x: Tensor, plain: Plain, sqnr: Sqnr) -> Graph:
    """Quantizers off: the same bits. 16 bits: 60 dB. The count of MACs is right."""
    with torch.no_grad():
        expected = model(x.clone())
        with FlopCounterMode(display=False) as counter:
            model.requires_grad_(False)(x.clone())
        qmodel = plain(model, x)
        assert sqnr(expected, qmodel(x.clone())) > 60
        qmodel.set_state("off")
        assert torch.equal(qmodel(x.clone()), expected)
    graph = trace(model, x.clone())
    assert graph.signature() == qmodel.graph.signature()
    assert graph.macs == counter.get_total_flops() // 2 // x.shape[0]
    return graph


def roles_of(graph: Graph, owner: str = "") -> dict[str, str]:
    return {s.id.split(":")[1]: s.role for s in graph.sites.values() if s.owner == owner}


# -- ways to multiply ------------------------------------------------------------------------------------


def test_a_functional_linear_uses_the_weight_of_a_child(small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr) -> None:
    graph = check(small(lambda m, x: F.linear(x, m.q.weight, m.q.bias)), tokens, plain, sqnr)
    assert graph.sites[":linear0.weight"].param == "q.weight"


def test_a_parameter_is_a_weight_on_either_side_of_a_matmul(
    small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr
) -> None:
    graph = check(small(lambda m, x: m.o.weight @ (x @ m.p).transpose(1, 2).repeat(1, 4, 1)), tokens, plain, sqnr)
    right, left = graph.sites[":matmul0.rhs"], graph.sites[":matmul1.lhs"]
    assert (right.role, right.param, right.axes) == (roles.WEIGHT, "p", ("in", "channel"))
    assert (left.role, left.param, left.axes) == (roles.WEIGHT, "o.weight", ("channel", "in"))


def test_a_transposed_parameter_is_a_computed_weight(small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr) -> None:
    graph = check(small(lambda m, x: (x @ m.p) @ m.p.t()), tokens, plain, sqnr)
    assert [s.role for s in graph.sites.values()] == [roles.PATCH_IN, roles.WEIGHT, roles.HEAD_IN, roles.WEIGHT]


def test_a_cast_that_changes_nothing_leaves_a_parameter_a_parameter(small: Make, tokens: Tensor) -> None:
    graph = trace(small(lambda m, x: F.linear(x, m.q.weight.to(x.dtype).contiguous())), tokens)
    assert graph.sites[":linear0.weight"].param == "q.weight"


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(lambda q, k, v: ((q / 8**0.5) @ k.transpose(-2, -1)).softmax(-1) @ v, id="operators"),
        pytest.param(
            lambda q, k, v: F.softmax(torch.matmul(q, k.mT).div(8**0.5), dim=3).matmul(v), id="functions and methods"
        ),
        pytest.param(
            lambda q, k, v: torch.bmm(
                torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) + torch.ones(16, 16), -1), v.flatten(0, 1)
            ).unflatten(0, (-1, 4)),
            id="heads merged into the batch",
        ),
        pytest.param(
            lambda q, k, v: (
                torch.baddbmm(torch.zeros(1), batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=0, alpha=0.3)
                .softmax(-1)
                .bmm(v.flatten(0, 1))
                .unflatten(0, (-1, 4))
            ),
            id="baddbmm",
        ),
        pytest.param(
            lambda q, k, v: (q @ k.mT).masked_fill_(torch.ones(16, 16).triu(1).bool(), -1e4).mul_(0.3).softmax(-1) @ v,
            id="in place",
        ),
    ],
)
def test_attention_by_hand_is_recognised(
    attend: Callable[..., Tensor], small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr
) -> None:
    model = small(lambda m, x: m.o(attend(*m.heads(x)).transpose(1, 2).flatten(2)))
    graph = check(model, tokens, plain, sqnr)
    assert list(roles_of(graph).values()) == ATTENTION
    assert graph.sites["o:linear0.input"].role == roles.PROJ_IN
    assert graph.has_attention
    for site in graph.with_roles(roles.QUERY, roles.KEY, roles.VALUE):
        assert site.shape[site.axes.index("channel")] == 8
        assert site.shape[site.axes.index("token")] == 16


@pytest.mark.parametrize("operands_swapped", [False, True])
def test_attention_by_einsum_is_recognised(
    operands_swapped: bool, small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in m.heads(x))  # (B, N, H, D)
        if operands_swapped:
            scores = torch.einsum("b k h d, b q h d -> b h q k", k, q * 0.3).softmax(-1)
            out = torch.einsum("bkhd,bhqk->bqhd", [v, scores])
        else:
            scores = torch.einsum("bqhd,bkhd->bhqk", q * 0.3, k).softmax(-1)
            out = torch.einsum("bhqk,bkhd->bqhd", scores, v)
        return torch.einsum("...hd,hdo->...o", out, m.o.weight.unflatten(1, (4, 8)).permute(1, 2, 0))

    graph = check(small(forward), tokens, plain, sqnr)
    found = {s.role: s for s in graph.sites.values() if s.owner == "" and s.role in ATTENTION}
    assert set(found) == set(ATTENTION)
    first, second = ("rhs", "lhs") if operands_swapped else ("lhs", "rhs")
    assert (found[roles.QUERY].operand, found[roles.KEY].operand) == (first, second)
    assert (found[roles.SOFTMAX_OUT].operand, found[roles.VALUE].operand) == (first, second)
    for role in (roles.QUERY, roles.KEY, roles.VALUE):
        assert found[role].axes == ("batch", "token", "head", "channel")
    assert found[roles.SOFTMAX_OUT].axes == ("batch", "head", "token", "token")
    weight = graph.sites[":einsum2.rhs"]
    assert (weight.role, weight.axes) == (roles.WEIGHT, ("in", "in", "channel"))
    assert graph.sites[":einsum2.lhs"].role == roles.PROJ_IN


@pytest.mark.parametrize(
    ("equation", "operand", "ndim", "labels"),
    [
        ("ij,jk->ik", 0, 2, ["i", "j"]),
        ("ij,jk", -1, 2, ["i", "k"]),
        ("...ij, ...jk -> ...ik", 1, 4, ["1", "0", "j", "k"]),
        ("i...j,j->i...", 0, 3, ["i", "0", "j"]),
        ("...ij,jk", -1, 3, ["0", "i", "k"]),
    ],
)
def test_einsum_labels_name_every_dimension(equation: str, operand: int, ndim: int, labels: list[str]) -> None:
    assert einsum_labels(equation, operand, ndim) == labels


def test_convolutions_of_every_form_are_found(plain: Plain, sqnr: Sqnr) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Conv1d(8, 8, 3, stride=2, dilation=2),
    ).eval()
    graph = check(model, torch.randn(2, 3, 8, 8), plain, sqnr)
    assert [s.role for s in graph.sites.values() if s.role != roles.WEIGHT] == [roles.PATCH_IN, *[roles.CONV_IN] * 3]
    assert graph.sites["2:convt0.weight"].axes == ("in", "channel", "kernel", "kernel")
    assert graph.sites["5:conv0.input"].axes == ("batch", "channel", "token")
    assert not graph.has_attention
    assert graph.blocks == ()


# -- shared things ---------------------------------------------------------------------------------------


def test_a_module_called_twice_shares_its_sites(small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr) -> None:
    graph = check(small(lambda m, x: m.o(m.q(F.gelu(m.q(x))))), tokens, plain, sqnr)
    assert list(graph.sites) == ["q:linear0.input", "q:linear0.weight", "o:linear0.input", "o:linear0.weight"]
    assert [c.macs for c in graph.calls] == [2 * 16 * 32 * 32, 16 * 32 * 32]


def test_tied_weights_share_one_site_under_any_operand_name(
    small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr
) -> None:
    model = small(lambda m, x: F.linear(m.q(x), m.q.weight) @ m.q.weight)
    graph = check(model, tokens, plain, sqnr)
    assert [s.id for s in graph.with_roles(roles.WEIGHT)] == ["q:linear0.weight"]
    assert [c.operands for c in graph.calls] == [("input", "weight"), ("input", "weight"), ("lhs", "rhs")]
    assert all(c.sites[1] == "q:linear0.weight" for c in graph.calls)
    # It is the quantized weight that each of the three calls sees.
    qmodel = plain(model, tokens, bits=3)
    weight = qmodel.quantizers["q:linear0.weight"](model.q.weight.data)
    for site in qmodel.sites():
        if site.role != roles.WEIGHT:
            qmodel.set_state("off", [site])
    with torch.no_grad():
        expected = F.linear(F.linear(tokens, weight, model.q.bias), weight) @ weight
        torch.testing.assert_close(qmodel(tokens), expected)


def test_modules_tied_by_a_shared_parameter_share_one_site(
    small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr
) -> None:
    model = small(lambda m, x: m.k(m.q(x)))
    model.k.weight = model.q.weight
    graph = check(model, tokens, plain, sqnr)
    assert [s.id for s in graph.with_roles(roles.WEIGHT)] == ["q:linear0.weight"]


# -- left in float ---------------------------------------------------------------------------------------


def test_what_does_not_depend_on_the_input_is_constant(small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        grid = torch.linspace(-1, 1, 32, device=x.device, dtype=x.dtype).type_as(x)[None]
        return m.q(x) + m.k(grid) + m.o.weight[:16] @ torch.ones_like(m.v.weight)

    graph = trace(small(forward), tokens)
    assert {c.id: c.reason for c in graph.calls} == {
        "q:linear0": None,
        "k:linear0": "constant",
        ":matmul0": "constant",
    }


def test_a_module_that_also_runs_on_a_constant_is_not_constant(small: Make, tokens: Tensor) -> None:
    graph = trace(small(lambda m, x: m.q(torch.ones(1, 32)) + m.q(x)), tokens)
    assert [c.reason for c in graph.calls] == [None]
    assert graph.sites["q:linear0.weight"].param == "q.weight"


@pytest.mark.parametrize(
    ("call", "detail"),
    [
        (lambda m, x: torch.einsum("bnc,cd,ed->bne", x, m.p, m.p), "einsum of 3 operands"),
        (lambda m, x: torch.tensordot(x, m.p, 1), "tensordot"),
        (lambda m, x: x.mv(m.p[:, 0]) if x.ndim == 2 else x[0].mv(m.p[:, 0]), "mv"),
        (lambda m, x: torch.matmul(x, m.p, out=torch.empty(x.shape[0], 16, 8)), "a product with out="),
        (lambda m, x: F.bilinear(x, x, m.p.view(2, 32, 4).repeat(1, 1, 8)), "bilinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_forms_stay_float_with_a_reason(
    call: Callable[..., Tensor], detail: str, small: Make, tokens: Tensor, plain: Plain
) -> None:
    # o is an owner inside an owner; the root makes a supported call after the unsupported one.
    model = small(lambda m, x: m.o(x) @ m.q.weight + call(m, x).mean())
    qmodel = plain(model, tokens)
    (left,) = [c for c in qmodel.graph.calls if c.reason]
    assert (left.reason, left.detail, left.owner) == ("unsupported", detail, "")
    assert left.macs > 0 or detail in ("mv", "bilinear")
    assert ":matmul0.lhs" in qmodel.quantizers or ":matmul1.lhs" in qmodel.quantizers
    qmodel.set_state("off")
    with torch.no_grad():
        assert torch.equal(qmodel(tokens), model(tokens))


def test_products_outside_of_any_forward_are_named(small: Make, tokens: Tensor, plain: Plain) -> None:
    model = small(lambda m, x: x @ m.p)

    def method(m: Any, x: Tensor) -> Tensor:
        return m.q(x) @ m.p  # as m.encode_image(x) would: the forward of m does not run

    graph = trace(model, tokens, method)
    assert [(c.id, c.reason) for c in graph.calls] == [("q:linear0", None), (":outside-matmul0", "unsupported")]
    qmodel = plain(model, tokens, forward_fn=lambda m, x: m(x) @ torch.ones(8, 2))
    assert [(c.id, c.reason) for c in qmodel.graph.calls] == [(":matmul0", None), (":outside-matmul0", "unsupported")]
    qmodel(tokens)


# -- data flow -------------------------------------------------------------------------------------------


def test_writing_into_a_buffer_is_followed(small: Make, tokens: Tensor, plain: Plain, sqnr: Sqnr) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 17, 32)
        hidden[:, 1:] = F.gelu(m.q(x))
        view = hidden.view(-1, 32)
        hidden[:, 0].copy_(x.mean(1))
        return m.o(view).view(x.shape[0], 17, 32)

    graph = check(small(forward), tokens, plain, sqnr)
    assert not any(c.reason for c in graph.calls)
    assert graph.sites["o:linear0.input"].producer == "gelu"


def test_an_activation_in_place_is_seen_through_earlier_views(small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.q(x)
        view = hidden.flatten(0, 1)
        F.relu(hidden, inplace=True)
        return m.o(view)

    graph = trace(small(forward), tokens)
    site = graph.sites["o:linear0.input"]
    assert (site.role, site.producer) == (roles.FC2_IN, "relu")


@pytest.mark.parametrize(
    ("act", "producer"),
    [
        (F.gelu, "gelu"),
        (F.relu, "relu"),
        (lambda h: h * torch.sigmoid(1.702 * h), "quick_gelu"),
        (lambda h: F.silu(h) * h.roll(1, -1), "swiglu"),
        (lambda h: F.dropout(F.silu(h), 0.5, False), "silu"),
    ],
    ids=["gelu", "relu", "quick_gelu", "swiglu", "silu"],
)
def test_the_second_linear_knows_what_made_its_input(
    act: Callable[[Tensor], Tensor], producer: str, small: Make, tokens: Tensor
) -> None:
    graph = trace(small(lambda m, x: m.o(m.k(act(m.q(m.v(x)))))), tokens)
    assert graph.sites["q:linear0.input"].role == roles.FC1_IN
    assert (graph.sites["k:linear0.input"].role, graph.sites["k:linear0.input"].producer) == (roles.FC2_IN, producer)
    assert graph.sites["o:linear0.input"].role == roles.HEAD_IN


KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda t: t.reshape(2, 4, 4, 32),
    "roll tokens": lambda t: t.roll((1, 2), (0, 1)),
    "window partition": lambda t: t.view(2, 2, 2, 2, 2, 32).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 32),
    "class token": lambda t: t[:, 0],
    "some tokens": lambda t: t[..., 1::2, :],
    "dropout": lambda t: F.dropout(t, 0.5, False),
    "pad nothing": lambda t: F.pad(t, (0, 0, 0, 0)),
    "channels first and back": lambda t: t.transpose(1, 2).contiguous().mT,
}
MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll channels": lambda t: t.roll(1, -1),
    "shuffle channels": lambda t: t[:, :, torch.arange(32).flip(0)],
    "list of channels": lambda t: t[..., list(range(31, -1, -1))],
    "index_select channels": lambda t: t.index_select(2, torch.arange(32).flip(0)),
    "flip channels": lambda t: t.flip(-1),
    "split channels into tokens": lambda t: t.reshape(2, 32, 16).repeat(1, 1, 2),
    "tokens as channels": lambda t: t.repeat(1, 2, 1).mT,
    "half of the channels twice": lambda t: torch.cat([t[..., :16], t[..., :16]], -1),
    "attribute T": lambda t: t[0].repeat(2, 1).T,
    "residual": lambda t: t + 1,
    # A token of zeros is not the norm's: a shift folded into the norm would miss it.
    "pad tokens": lambda t: F.pad(t, (0, 0, 0, 3)),
}


class Normed(nn.Module):
    """A LayerNorm, some way, two linears; the norm may be used elsewhere as well."""

    def __init__(self, way: Callable[[Tensor], Tensor], elsewhere: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.one, self.two = nn.Linear(32, 8, bias=bias), nn.Linear(32, 4)
        self.way = way
        self.elsewhere = elsewhere

    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        moved = self.way(normed)
        out = self.one(moved).sum() + self.two(moved).sum()
        return (out, normed) if self.elsewhere else out


@pytest.mark.parametrize("way", KEEPS.values(), ids=KEEPS)
def test_a_norm_is_paired_through_moves_that_keep_channels(way: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    (pair,) = trace(Normed(way), tokens).pairs
    assert pair.inputs == ("one:linear0.input", "two:linear0.input")
    assert pair.biases == ("one.bias", "two.bias")


@pytest.mark.parametrize("way", MIXES.values(), ids=MIXES)
def test_a_norm_is_not_paired_through_what_mixes_or_adds(way: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    graph = trace(Normed(way), tokens)
    assert graph.pairs == ()
    assert all(s.norm is None for s in graph.sites.values())


def test_a_norm_whose_output_leaves_the_model_is_not_paired(tokens: Tensor) -> None:
    assert trace(Normed(lambda t: t, elsewhere=True), tokens).pairs == ()


def test_a_linear_without_bias_is_paired_and_says_so(tokens: Tensor) -> None:
    (pair,) = trace(Normed(lambda t: t, bias=False), tokens).pairs
    assert pair.biases == (None, "two.bias")


def test_a_shared_bias_or_weight_forbids_the_pair(tokens: Tensor) -> None:
    model = Normed(lambda t: t)
    model.two = nn.Linear(32, 8)
    model.two.bias = model.one.bias
    assert trace(model, tokens).pairs == ()
    model.two = nn.Linear(32, 8)
    model.two.weight = model.one.weight
    assert trace(model, tokens).pairs == ()


def test_queries_are_scaled_before_the_site_where_the_model_does_so(small: Make, tokens: Tensor, plain: Plain) -> None:
    seen = {}

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        q = q * 0.01
        seen["query"] = q
        return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    qmodel = plain(small(forward), tokens)
    (site,) = qmodel.sites(roles.QUERY)
    caught = []
    qmodel.quantizers[site].observer = lambda quantizer, x: caught.append(x)
    qmodel(tokens)
    torch.testing.assert_close(caught[0], seen["query"])


# -- fused or not ----------------------------------------------------------------------------------------


def test_fused_and_plain_attention_of_timm_have_the_same_roles(vit: nn.Module, images: Tensor) -> None:
    fused = trace(vit, images)
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    apart = trace(vit, images)
    assert fused.macs == apart.macs
    assert fused.blocks == apart.blocks
    assert fused.pairs == apart.pairs

    def kinds(graph: Graph) -> dict[str, list[str]]:
        return {b: sorted(s.role for s in graph.sites.values() if s.block == b) for b in graph.blocks}

    assert kinds(fused) == kinds(apart)
    linear = {i: line for i, line in fused.signature().items() if "sdpa" not in i}
    assert linear == {i: line for i, line in apart.signature().items() if "attn:matmul" not in i}


def test_identity_survives_deepcopy_and_other_weights(swin: nn.Module, images: Tensor) -> None:
    first = trace(swin, images[:1])
    other = copy.deepcopy(swin)
    other.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in swin.state_dict().items()})
    assert trace(other, images).fingerprint() == first.fingerprint()
    assert trace(other, images).calls == first.calls


def test_tracing_leaves_no_trace(swin: nn.Module, images: Tensor) -> None:
    before = {n: dict(m.__dict__) for n, m in swin.named_modules()}
    trace(swin, images)
    assert {n: dict(m.__dict__) for n, m in swin.named_modules()} == before


def test_swin_masks_matter_and_stay_right(swin: nn.Module, images: Tensor, plain: Plain, sqnr: Sqnr) -> None:
    masks = [m for n, m in swin.named_buffers() if n.endswith("attn_mask")]
    assert masks
    assert all(bool((m < 0).any()) for m in masks)
    with torch.no_grad():
        expected = swin(images)
        qmodel = plain(swin, images)
        assert sqnr(expected, qmodel(images)) > 60
        for name, mask in qmodel.model.named_buffers():
            if name.endswith("attn_mask"):
                mask.zero_()
        assert sqnr(expected, qmodel(images)) < 60
