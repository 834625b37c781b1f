"""Which products work on what the model chose by its values: a detector's heads on the regions that it proposes.

There, rows are other ones as soon as anything before them is quantized: nothing that was measured row by row with the
float model may be put beside them.
"""

from __future__ import annotations

from vitq.core.batches import Batches, first_of
from vitq.core.qmodel import QuantModel
from vitq.graph.insert import detached
from vitq.graph.record import record

# Their results are numbers of places, or stand in an order that values decide.
CHOICES = frozenset({"topk", "sort", "argsort", "nonzero", "nms", "msort", "masked_select", "unique"})


def behind_choices(qmodel: QuantModel, data: Batches) -> set[str]:
    """Calls that see what was chosen, found with one image and without quantizers."""
    example = first_of(next(iter(data)))
    with detached(qmodel.model, qmodel.graph, qmodel.quantizers):  # type: ignore[arg-type]
        log = record(qmodel.model, lambda model: data.forward(model, example), example)
    chosen: set[int] = set()
    calls: set[str] = set()
    for node in log.nodes:
        if node.name not in CHOICES and chosen.isdisjoint(node.inputs):
            continue
        chosen.update(node.outputs)
        if node.product is not None:
            calls.add(f"{node.owner}:{node.product.kind}{node.ordinal}")
    return calls
