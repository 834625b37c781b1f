"""Trace: one recorded forward -> Graph. Places are found by data flow, never by names or families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitq.core.batches import ForwardFn, default_forward, is_image_list, leading_size
from vitq.core.errors import TraceError
from vitq.core.site import REASON_CONSTANT, REASON_UNSUPPORTED, Call, Graph, NormLinear, Site
from vitq.graph.axes import axes_of, inner_axes, summed_dim
from vitq.graph.blocks import block_of, find_blocks
from vitq.graph.dims import channel_ends
from vitq.graph.insert import QuantizedOwner
from vitq.graph.record import OUTSIDE, Node, Record, record
from vitq.graph.roles import inner_role, operand_role
from vitq.graph.scores import is_attention


def trace(model: nn.Module, example: Any, forward_fn: ForwardFn = default_forward) -> Graph:
    """Find every matrix product of a model: its operands, their roles and axes, and the blocks.

    Args:
        model: any module, in the mode in which it will be used (usually eval). It is run once.
        example: the pytree that `forward_fn` gives to the model; one image is enough.
        forward_fn: (model, batch) -> output.

    Raises:
        TraceError: the model does not run on the example, or is quantized already.
    """
    if any(isinstance(module, QuantizedOwner) for module in model.modules()):
        raise TraceError("this model is quantized already: trace the float model, or detach the quantizers first")
    run: Callable[[nn.Module], Any] = lambda m: forward_fn(m, example)  # noqa: E731
    try:
        log = record(model, run, example)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example {_describe(example)}: {error}. "
            f"Give an input it accepts as example=, or say how it is called with forward_fn=.{_hint(example)}"
        ) from error
    return build_graph(model, log, leading_size(example))


def build_graph(model: nn.Module, log: Record, examples: int) -> Graph:
    """Turn a record into sites, calls, blocks and norm-linear pairs."""
    products = _first_visits(log)
    attentions = [n.owner for n in products if is_attention(log, n) and not n.constant]
    blocks = find_blocks(model, attentions, log.order)
    sites: dict[str, Site] = {}
    calls: list[Call] = []
    weight_sites: dict[str, str] = {}
    for node in products:
        calls.append(_call(log, node, sites, weight_sites, blocks, max(examples, 1)))
    pairs = tuple(_pairs(model, log, products, sites))
    for pair in pairs:
        for name in pair.inputs:
            sites[name] = replace(sites[name], norm=pair.norm)
    return Graph(
        sites=sites,
        calls=tuple(calls),
        pairs=pairs,
        blocks=blocks,
        has_attention=bool(attentions),
        example_images=max(examples, 1),
    )


def _first_visits(log: Record) -> list[Node]:
    """Products by identity; a module called again (shared heads) keeps its first visit, with all the work."""
    visits: dict[tuple[str, str, int, bool], list[Node]] = {}
    for node in log.nodes:
        if node.product is not None:
            key = (node.owner, node.product.kind, node.ordinal, node.unsupported == OUTSIDE)
            visits.setdefault(key, []).append(node)
    found = []
    for nodes in visits.values():
        first = next((n for n in nodes if not n.constant), nodes[0])
        first.macs = sum(n.macs for n in nodes)
        first.unsupported = next((n.unsupported for n in nodes if n.unsupported), "")
        for node in nodes:
            node.constant = first.constant
        found.append(first)
    return found


def _call(
    log: Record,
    node: Node,
    sites: dict[str, Site],
    weight_sites: dict[str, str],
    blocks: tuple[str, ...],
    examples: int,
) -> Call:
    product = node.product
    assert product is not None
    call_id = f"{node.owner}:{'outside-' if node.unsupported == OUTSIDE else ''}{product.kind}{node.ordinal}"
    base = Call(call_id, node.owner, product.kind, node.ordinal, node.macs // examples)
    if node.unsupported:
        return _left_float(base, REASON_UNSUPPORTED, node.unsupported)
    if node.constant:
        return _left_float(base, REASON_CONSTANT)
    ids: list[str] = []
    for operand, tensor in node.operands.items():
        role, producer = operand_role(log, node, operand, tensor)
        param = _param(log, tensor)
        if param is not None and param in weight_sites:
            ids.append(weight_sites[param])  # tied weights share one site
            continue
        shape = log.shapes[tensor]
        axes = axes_of(log, node, operand, role)
        summed = summed_dim(log, node, operand)
        ids.append(_add(sites, base, operand, role, axes, shape, summed, producer, param, blocks))
        if param is not None:
            weight_sites[param] = ids[-1]
    for operand, shape in node.inner.items():
        role = inner_role(operand)
        axes = inner_axes(log, node, role, len(shape))
        summed = summed_dim(log, node, operand)
        ids.append(_add(sites, base, operand, role, axes, shape, summed, None, None, blocks))
    return replace(base, sites=tuple(ids), operands=(*node.operands, *node.inner))


def _param(log: Record, tensor: int) -> str | None:
    """The parameter that a weight operand is, unless something else than products reads it as well.

    Such a one (an embedding that serves as the classifier) is quantized where it is used, and keeps its values.
    """

    def multiplies(node: Node) -> bool:
        return tensor in node.operands.values() and not node.constant

    name = log.params.get(tensor)
    return name if name is not None and all(map(multiplies, log.consumers.get(tensor, []))) else None


def _add(
    sites: dict[str, Site],
    call: Call,
    operand: str,
    role: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    summed: int,
    producer: str | None,
    param: str | None,
    blocks: tuple[str, ...],
) -> str:
    site = Site(
        id=f"{call.id}.{operand}",
        owner=call.owner,
        op=call.op,
        ordinal=call.ordinal,
        operand=operand,
        role=role,
        axes=axes,
        shape=shape,
        producer=producer,
        param=param,
        block=block_of(call.owner, blocks),
        summed=summed,
    )
    sites[site.id] = site
    return site.id


def _left_float(call: Call, reason: str, detail: str = "") -> Call:
    return replace(call, reason=reason, detail=detail)


def _pairs(model: nn.Module, log: Record, products: list[Node], sites: dict[str, Site]) -> list[NormLinear]:
    """LayerNorms with affine parameters, each with the linears that take all of its output."""
    by_id = {id(node): node for node in products}
    found: list[NormLinear] = []
    visits: dict[str, int] = {}
    for node in log.nodes:
        if node.name == "layer_norm":
            visits[node.owner] = visits.get(node.owner, 0) + 1
    for node in log.nodes:
        if node.name != "layer_norm" or visits[node.owner] > 1 or not _has_affine(log, node):
            continue
        uses = channel_ends(log, node.outputs[0])
        if not uses or not all(_takes_channels(by_id, use, tensor) for use, tensor in uses):
            continue
        linears = [use for use, _ in uses]
        calls = [f"{n.owner}:{n.product.kind}{n.ordinal}" for n in linears if n.product]
        inputs = [_find(sites, log, c, n, weight=False) for c, n in zip(calls, linears, strict=True)]
        weights = [_find(sites, log, c, n, weight=True) for c, n in zip(calls, linears, strict=True)]
        if None in inputs or None in weights or not all(_bias_foldable(model, log, n) for n in linears):
            continue
        found.append(
            NormLinear(
                norm=node.owner,
                inputs=tuple(s for s in inputs if s),
                weights=tuple(s for s in weights if s),
                biases=tuple(_bias_name(log, n) for n in linears),
            )
        )
    return found


def _has_affine(log: Record, node: Node) -> bool:
    names = [log.params[n] for n in node.inputs if n in log.params]
    prefix = f"{node.owner}." if node.owner else ""
    return sorted(names) == [f"{prefix}bias", f"{prefix}weight"]


def _takes_channels(by_id: dict[int, Node], use: Node, tensor: int) -> bool:
    if id(use) not in by_id or use.product is None or use.unsupported or use.constant:
        return False
    return use.product.kind in ("linear", "mha") and use.operands.get("input") == tensor


def _find(sites: dict[str, Site], log: Record, call: str, node: Node, weight: bool) -> str | None:
    name = f"{call}.{'weight' if weight else 'input'}"
    if weight:
        # The fold scales this parameter's columns: nothing else may use it.
        tensor = node.operands.get("weight")
        users = [n for n in log.consumers.get(tensor, []) if n is not node] if tensor is not None else [node]
        if users or tensor not in log.params:
            return None
    return name if name in sites else None


def _bias_name(log: Record, node: Node) -> str | None:
    return None if node.bias is None else log.params.get(node.bias)


def _bias_foldable(model: nn.Module, log: Record, node: Node) -> bool:
    """Whether a shift of the input can go into the bias: a parameter of its own, or one that can be added."""
    if node.constant or node.product is None:
        return False
    if node.bias is not None:
        return node.bias in log.params and len(log.consumers.get(node.bias, [])) == 1
    if node.product.kind == "mha":
        return True
    owner = model.get_submodule(node.owner)
    return isinstance(owner, nn.Linear) and owner.bias is None


def _hint(example: Any) -> str:
    if not is_image_list(example):
        return ""
    return " A list of images is one input, as detectors take it; a classifier takes torch.stack(images)."


def _describe(example: Any) -> str:
    tensors = [t for t in torch.utils._pytree.tree_leaves(example) if isinstance(t, torch.Tensor)]
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors) or repr(example)
