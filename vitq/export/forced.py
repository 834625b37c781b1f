"""A copy of an exported file for debugging: at every site, what comes out is shown, and what goes on is given.

So each piece between sites gets the simulated model's own values, and its kernels stay those of the file: where codes
are given, a product of whole numbers is still one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitq.export.edit import CODE, ORDER, PART, REST, SHIFT, SITE, USE, WEIGHT

GIVEN = "given/"  # before the name of a value: what is used in its place


@dataclass(frozen=True)
class Shown:
    """A value of the file that belongs to a site.

    Attributes:
        name: of the value.
        site, use: whose it is, and in the how manieth use.
        part: CODE, VALUE or WEIGHT.
        order: of the site's dimensions in it, empty for the same one.
        shift: what was taken from codes to make them signed bytes; None for unsigned ones.
        rest: the initializer that values of a weight lack, if any.
    """

    name: str
    site: str
    use: int
    part: str
    order: tuple[int, ...]
    shift: int | None = None
    rest: str = ""


def shown_values(model: Any) -> list[Shown]:
    """What the nodes of a file say about sites, in the order of execution."""
    return [shown for node in model.graph.node for shown in _shown(node)]


def _shown(node: Any) -> Iterator[Shown]:
    noted = {entry.key: entry.value for entry in node.metadata_props}
    if PART in noted:
        order = tuple(int(dim) for dim in noted[ORDER].split(",")) if ORDER in noted else ()
        shift = int(noted[SHIFT]) if SHIFT in noted else None
        yield Shown(node.output[0], noted[SITE], int(noted[USE]), noted[PART], order, shift, noted.get(REST, ""))


def with_given_sites(model: Any) -> Any:
    """The copy: one more input and output for every site of activations."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sites = [shown for shown in shown_values(model) if shown.part != WEIGHT]
    names = {shown.name for shown in sites}
    for node in copy.graph.node:
        for number, name in enumerate(node.input):
            if name in names:
                node.input[number] = GIVEN + name
    for shown in sites:
        byte = onnx.TensorProto.UINT8 if shown.shift is None else onnx.TensorProto.INT8
        kind = byte if shown.part == CODE else onnx.TensorProto.FLOAT
        copy.graph.input.append(onnx.helper.make_tensor_value_info(GIVEN + shown.name, kind, _any_shape(model, shown)))
        if shown.name not in {output.name for output in copy.graph.output}:
            copy.graph.output.append(onnx.helper.make_tensor_value_info(shown.name, kind, None))
    return copy


def _any_shape(model: Any, shown: Shown) -> list[None] | None:
    """As many dimensions as the value has, of any size: what is known of it decides which kernels can be taken."""
    for info in model.graph.value_info:
        if info.name == shown.name:
            return [None] * len(info.type.tensor_type.shape.dim)
    return None


def weights_alone(model: Any) -> Any:
    """A copy that computes nothing but the decoded weights."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [shown.name for shown in shown_values(model) if shown.part == WEIGHT]
    wanted, nodes = set(weights), list[Any]()
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            nodes.insert(0, node)
    for field, kept in (
        ("node", nodes),
        ("input", []),
        ("output", [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in weights]),
        ("initializer", [i for i in model.graph.initializer if i.name in wanted]),
        ("value_info", []),
    ):
        copy.graph.ClearField(field)
        getattr(copy.graph, field).extend(kept)
    return copy
