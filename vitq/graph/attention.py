"""Fused attention taken apart, so that each of its matrices can be quantized.

Shapes:  B batch, H heads, N query tokens, S key tokens, D channels of a head, E = H * D
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ATEN = torch.ops.aten


class Port(Protocol):
    """What a product is run with."""

    def __call__(self, operand: str, tensor: Tensor) -> Tensor:
        """The tensor to use in place of a named operand."""

    def made(self, operand: str, result: Tensor) -> Tensor:
        """Shown the result of the product whose left operand has that name, bias included, and gives it back."""


def attend(
    port: Port,
    query: Tensor,  # (..., N, D)
    key: Tensor,  # (..., S, D), or of fewer heads, each for several of the queries'
    value: Tensor,  # (..., S, D), the same
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    nan_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scale + mask) V with every operand passed through the port.

    Args:
        nan_rows: a query that the mask keeps from every key gives NaN, else zero.

    Returns:
        (output (..., N, D), probabilities (..., N, S) as they enter the second product).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaling the queries is N/S of the work of scaling the scores, and saves a tensor of their size.
    query, key = port("query", query) * scale, shared(port("key", key), query)
    scores = port.made("query", ATEN.matmul.default(query, key.transpose(-2, -1)))
    if is_causal:
        rows, columns = scores.shape[-2:]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1)
    if mask is not None and not nan_rows:
        # A query that may see no key: zero, as the fused kernels have it.
        blind = ~mask if mask.dtype == torch.bool else mask.isneginf()
        weights = weights.masked_fill(blind.all(dim=-1, keepdim=True), 0)
    weights = port("softmax", weights)
    value = shared(port("value", value), weights)
    return port.made("softmax", ATEN.matmul.default(weights, value)), weights


def shared(operand: Tensor, left: Tensor) -> Tensor:
    """Keys or values (..., S, D) with as many heads as the left operand has: each of theirs serves several in a row.

    One head for all stays one.
    """
    heads = operand.shape[-3] if min(operand.ndim, left.ndim) > 2 else 1
    return operand.repeat_interleave(left.shape[-3] // heads, -3) if 1 < heads < left.shape[-3] else operand


def sdpa_operands(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Operands of F.scaled_dot_product_attention that exist before the call."""
    return {"query": query, "key": key, "value": value}


def sdpa_inner(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Shape of the probabilities."""
    return {"softmax": (*_front(query, key), query.shape[-2], key.shape[-2])}


def _front(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Batch and head dimensions of the scores; with grouped queries there are fewer key heads."""
    heads = query.shape[-3:-2]  # empty without heads
    one = key.shape[: -2 - len(heads)]
    several = torch.broadcast_shapes(query.shape[: -2 - len(heads)], one)
    return (*several, *(max(h, *key.shape[-3:-2]) for h in heads))


def run_sdpa(
    port: Port,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention, taken apart. Attention dropout is not applied: it is training only.

    Grouped queries (enable_gqa) show in the shapes; torch has refused others before.
    """
    return attend(port, query, key, value, attn_mask, is_causal, scale)[0]


def sdpa_macs(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of both products."""
    per_head = query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return math.prod(out.shape[:-2]) * per_head


def mha_unsupported(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str:
    """Which argument of F.multi_head_attention_forward is not taken apart, or ""."""
    names = mha_arguments(query, key, value, *args, **kwargs)
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if names.get(name) is not None:
            return f"multi_head_attention_forward with {name}"
    if names.get("add_zero_attn"):
        return "multi_head_attention_forward with add_zero_attn"
    return ""


def mha_operands(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Operands of F.multi_head_attention_forward that exist before the call: inputs and weights."""
    a = mha_arguments(query, key, value, *args, **kwargs)
    found = {"input": query} if query is key and key is value else {"q_input": query, "k_input": key, "v_input": value}
    if key is value and query is not key:
        found.pop("v_input")
    if a["use_separate_proj_weight"]:
        found |= {
            "q_weight": a["q_proj_weight"],
            "k_weight": a["k_proj_weight"],
            "v_weight": a["v_proj_weight"],
        }
    else:
        found["weight"] = a["in_proj_weight"]
    return found | {"out_weight": a["out_proj_weight"]}


def mha_bias(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The bias of the input projections."""
    return mha_arguments(query, key, value, *args, **kwargs)["in_proj_bias"]  # type: ignore[no-any-return]


def mha_inner(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what is inside: (B, H, tokens, D), (B, H, N, S), and (N, B, E) entering the projection."""
    heads, embed = mha_arguments(query, key, value, *args, **kwargs)["num_heads"], query.shape[-1]
    rows, columns, batch = query.shape[0], key.shape[0], query.shape[1] if query.ndim == 3 else 1
    tokens = (batch, heads, columns, embed // heads)
    return {
        "query": (batch, heads, rows, embed // heads),
        "key": tokens,
        "softmax": (batch, heads, rows, columns),
        "value": tokens,
        "out_input": (rows, batch, embed),
    }


def mha_macs(out: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of the projections and of both attention products."""
    embed = query.shape[-1]
    rows, columns, batch = query.shape[0], key.shape[0], query.shape[1] if query.ndim == 3 else 1
    projections = batch * embed * (2 * rows * embed + columns * (key.shape[-1] + value.shape[-1]))
    return projections + 2 * batch * rows * columns * embed


def run_mha(port: Port, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """F.multi_head_attention_forward, taken apart; same arguments and results."""
    a = mha_arguments(query, key, value, *args, **kwargs)
    batched = query.ndim == 3
    same, kv_same = query is key and key is value, key is value
    heads, embed = a["num_heads"], query.shape[-1]
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    rows, batch = query.shape[:2]  # inputs are (tokens, batch, channels)

    q, k, v = _project(port, query, key, value, same, kv_same, a)
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))  # (B, H, tokens, D)
    mask = _merge_masks(a["attn_mask"], a["key_padding_mask"], batch, heads, q.dtype)
    out, weights = attend(port, q, k, v, mask, bool(a["is_causal"]) and mask is None, None, a["need_weights"])
    out = out.permute(2, 0, 1, 3).reshape(rows, batch, embed)
    out = ATEN.linear.default(port("out_input", out), port("out_weight", a["out_proj_weight"]), a["out_proj_bias"])
    out = port.made("out_input", out)
    if not batched:
        out = out.squeeze(1)
    if not a["need_weights"]:
        return out, None
    weights = weights.mean(dim=1) if a["average_attn_weights"] else weights
    return out, weights if batched else weights.squeeze(0)


def _project(
    port: Port, query: Tensor, key: Tensor, value: Tensor, same: bool, kv_same: bool, a: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    biases = (None, None, None) if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    if a["use_separate_proj_weight"]:
        weights = tuple(port(f"{n}_weight", a[f"{n}_proj_weight"]) for n in "qkv")
    else:
        whole = port("weight", a["in_proj_weight"])
        if same:
            out = ATEN.linear.default(port("input", query), whole, a["in_proj_bias"])
            q, k, v = port.made("input", out).chunk(3, dim=-1)
            return q, k, v
        weights = whole.chunk(3)
    if same:
        x = port("input", query)
        inputs = (x, x, x)
    else:
        k = port("k_input", key)
        inputs = (port("q_input", query), k, k if kv_same else port("v_input", value))
    q, k, v = (ATEN.linear.default(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    return q, k, v


def _merge_masks(
    mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    def additive(m: Tensor) -> Tensor:
        if m.dtype != torch.bool:
            return m
        return torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(m, -torch.inf)

    merged = None
    if mask is not None:
        merged = additive(mask)
        merged = merged.unflatten(0, (batch, heads)) if merged.ndim == 3 else merged
    if padding is not None:
        columns = additive(padding).reshape(batch, 1, 1, -1)
        merged = columns if merged is None else merged + columns
    return merged


_MHA_NAMES = (
    "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn",
    "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
    "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_MHA_DEFAULTS = {
    "need_weights": True,
    "use_separate_proj_weight": False,
    "average_attn_weights": True,
    "is_causal": False,
}

assert F.multi_head_attention_forward.__code__.co_varnames[3 : 3 + len(_MHA_NAMES)] == _MHA_NAMES, (
    "this torch has another signature of multi_head_attention_forward"
)


def mha_arguments(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of F.multi_head_attention_forward behind the first three, by name."""
    given = dict(zip(_MHA_NAMES, args, strict=False)) | kwargs
    return {name: given.get(name, _MHA_DEFAULTS.get(name)) for name in _MHA_NAMES}
