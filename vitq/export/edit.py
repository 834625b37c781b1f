"""Small edits of an ONNX graph: nodes put in front of another one, constants, and what a node says about its site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# Metadata of a node, so that whatever differs can be traced to a site; tools keep it, runtimes ignore it.
SITE = "vitq.site"
USE = "vitq.use"  # the how manieth use of the site in one forward
PART = "vitq.part"
ORDER = "vitq.order"  # of the site's dimensions in the node's output, where it is another one
SHIFT = "vitq.shift"  # what was taken from codes so that they are signed bytes
REST = "vitq.rest"  # the initializer that values of a shifted weight lack
CODE, VALUE, WEIGHT = "code", "value", "weight"  # what the node's output is: codes, their values, or a decoded weight


class Editor:
    """Puts what a site becomes in front of the node that marks it."""

    def __init__(self, graph: Any, marked: Any) -> None:
        self.graph, self.marked = graph, marked
        self.site: str = marked.attributes["site"].as_string()
        self.use: int = marked.attributes["use"].as_int()
        self.name = self.site + (f"#{self.use}" if self.use else "")
        self.kinds: Counter[str] = Counter()  # of nodes so far, for their names
        self.order: tuple[int, ...] = ()  # of the site's dimensions, where it is another one

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> Any:
        """An initializer of the site; one of that name stays what it is."""
        return initializer(self.graph, f"{self.site}/{name}", array)

    def node(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        part: str = "",
    ) -> Any:
        """Insert a node; gives its output."""
        import onnx_ir as ir

        self.kinds[kind] += 1
        name = f"{self.name}/{kind}" + (f"_{self.kinds[kind]}" if self.kinds[kind] > 1 else "")
        made = ir.node(kind, inputs, attributes or {}, domain=domain, name=name, num_outputs=1)
        made.outputs[0].name = name
        made.metadata_props[SITE], made.metadata_props[USE] = self.site, str(self.use)
        if part:
            self.note(made, part)
        self.graph.insert_before(self.marked, made)
        return made.outputs[0]

    def note(self, node: Any, part: str) -> None:
        """Write down what the node's output is."""
        node.metadata_props[PART] = part
        if self.order:
            node.metadata_props[ORDER] = ",".join(map(str, self.order))

    def take_transposes(self) -> tuple[int, ...]:
        """Remove the transpositions that everybody who reads the marked value begins with, if they are all the same.

        Returns:
            Their permutation: what stands for the site has to come in that order. None: the order as it is.
        """
        marked = self.marked.outputs[0]
        nodes = only_consumers(marked, "Transpose")
        orders: set[tuple[int, ...]] = {tuple(node.attributes["perm"].as_ints()) for node in nodes}
        if len(orders) != 1:
            return tuple(range(len(marked.shape)))
        (order,) = orders
        marked.shape = nodes[0].outputs[0].shape
        for node in nodes:
            drop(self.graph, node, marked)
        self.order = order if order != tuple(sorted(order)) else ()
        return order

    def replace(self, value: Any) -> None:
        """Everybody who reads the marked value reads this one from now on; the mark goes."""
        import onnx_ir as ir

        old = self.marked.outputs[0]
        value.shape, value.dtype = old.shape, old.dtype
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(self.marked, safe=True)


def initializer(graph: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    """An initializer of a graph; one of that name stays what it is."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        )
    return graph.initializers[name]


def only_consumers(value: Any, kind: str) -> list[Any]:
    """The nodes that read a value, if all of them are of one kind and no output of the model is it; else none."""
    nodes = [use.node for use in value.uses()]
    return (
        nodes
        if nodes and not value.is_graph_output() and all(n.op_type == kind and not n.domain for n in nodes)
        else []
    )


def drop(graph: Any, node: Any, instead: Any) -> None:
    """Remove a node; who read its output reads this value."""
    import onnx_ir as ir

    ir.convenience.replace_all_uses_with(node.outputs[0], instead, replace_graph_outputs=True)
    graph.remove(node, safe=True)
