"""Channels of a QuantModel whose basis is free, and which site a weight takes its input from."""

from __future__ import annotations

from vitq.core.batches import Batches, first_of
from vitq.core.qmodel import QuantModel
from vitq.core.site import Graph, Site
from vitq.graph.channels import Channels, find_channels
from vitq.graph.insert import detached


def free_channels(qmodel: QuantModel, data: Batches) -> Channels:
    """What in the model can change its basis, found with one image and without quantizers."""
    example = first_of(next(iter(data)))
    with detached(qmodel.model, qmodel.graph, qmodel.quantizers):  # type: ignore[arg-type]
        return find_channels(qmodel.model, lambda model: data.forward(model, example))


def inputs_of(graph: Graph) -> dict[str, Site]:
    """Weight (name of the parameter) -> the site of what is multiplied with it, of the first call that uses it."""
    found: dict[str, Site] = {}
    for call in graph.calls:
        sites = {operand: graph.sites[site] for operand, site in zip(call.operands, call.sites, strict=True)}
        for weight, entering in (("weight", "input"), ("out_weight", "out_input")):
            if entering in sites and weight in sites and (name := sites[weight].param) is not None:
                found.setdefault(name, sites[entering])
    return found
