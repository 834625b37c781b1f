"""Modules for what onnx_rules.py found, and a module tree of the names in an ONNX graph.

onnx2torch gives one flat graph of calls. Blocks, which are what recipes go through one by one, are modules that are
called: the calls below a numbered path, such as encoder/layer.0, become one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions, validate_partition

from vitq.data.onnx_rules import DOMAIN

NUMBERED = re.compile(r"(.*\.\d+)\.")  # the longest path that ends in a number, with something below it
FUSED = "vitq_block_"
CONSTANTS = "initializers."  # where onnx2torch keeps those of the file
# Operators whose newer versions take more types, or options that nothing here uses: onnx2torch has older ones.
SAME = frozenset(
    ("Cast", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "Pad", "ReduceMean", "Reshape", "Shape",
     "Squeeze", "Transpose", "Unsqueeze")
)  # fmt: skip


class Slice(nn.Module):
    """ONNX's Slice: x[start:end:step] along some axes."""

    def forward(
        self, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        """x is any tensor; the others hold a whole number for each of the axes (all of them, if not given)."""
        first, last = starts.tolist(), ends.tolist()
        along = list(range(len(first))) if axes is None else axes.tolist()
        strides = [1] * len(first) if steps is None else steps.tolist()
        for start, end, axis, step in zip(first, last, along, strides, strict=True):
            reached = range(*slice(start, end, step).indices(x.size(axis)))
            if step < 0:  # torch knows no slices backwards
                x, reached = (
                    x.flip(axis),
                    range(x.size(axis) - 1 - reached.start, x.size(axis) - 1 - reached.stop, -step),
                )
            x = x[(slice(None),) * (axis % x.ndim) + (slice(reached.start, reached.stop, reached.step),)]
        return x


class Block(nn.Module):
    """A part of a graph as a module: one class for all, so that they are known as siblings."""

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__()
        for name, child in part.named_children():
            self.add_module(name, child)
        for name, value in part.named_buffers(recurse=False):
            self.register_buffer(name, value)
        self._code: Callable[..., Any] = type(part).forward

    def forward(self, *args: Any) -> Any:
        """What the part computes."""
        return self._code(self, *args)


@cache
def register() -> None:
    """Tell onnx2torch how our operators become modules."""
    import onnx
    from onnx2torch.node_converters import add_converter, get_converter
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    def constants(node: Any, graph: Any) -> list[nn.Parameter]:
        return [nn.Parameter(graph.initializers[name].to_torch().clone()) for name in node.input_values[1:]]

    def takes_first(module: nn.Module, node: Any) -> Any:
        return OperationConverterResult(module, OnnxMapping(inputs=node.input_values[:1], outputs=node.output_values))

    @add_converter("Linear", 1, DOMAIN)  # type: ignore[untyped-decorator]
    def _(node: Any, graph: Any) -> Any:
        weight, *bias = constants(node, graph)
        made: Any = nn.Linear(weight.shape[0], weight.shape[1], bias=bool(bias))
        made.weight = nn.Parameter(weight.detach().t().contiguous())
        if bias:
            made.bias = bias[0]
        return takes_first(made, node)

    @add_converter("Norm", 1, DOMAIN)  # type: ignore[untyped-decorator]
    def _(node: Any, graph: Any) -> Any:
        weight, bias = constants(node, graph)
        made = nn.LayerNorm(tuple(weight.shape), eps=node.attributes["epsilon"])
        made.weight, made.bias = weight, bias
        return takes_first(made, node)

    known: dict[str, Any] = {}
    schemas = onnx.defs.get_all_schemas_with_history()
    for schema in sorted(
        (one for one in schemas if one.name in SAME and not one.domain), key=lambda one: one.since_version
    ):
        version = schema.since_version
        try:
            known[schema.name] = get_converter(schema.name, version)
        except NotImplementedError:
            if schema.name in known:
                add_converter(schema.name, version)(known[schema.name])

    @add_converter("Gelu", 1, DOMAIN)  # type: ignore[untyped-decorator]
    def _(node: Any, graph: Any) -> Any:
        return takes_first(nn.GELU(), node)


def as_tree(flat: fx.GraphModule) -> nn.Module:
    """The same calls in modules that are named as in the file, with blocks."""
    targets = [str(node.target) for node in _calls(flat)]
    for target in targets:
        if type(flat.get_submodule(target)).__name__ == "OnnxSlice":
            flat.set_submodule(target, Slice())  # theirs indexes with lists, which torch gives up
    paths = {target: _path(target) for target in targets}
    whole = {path: _with_between(flat, [n for n in _calls(flat) if paths[str(n.target)].startswith(f"{path}.")])
             for path in _attending(flat, paths)}  # fmt: skip
    shared = Counter(node for nodes in whole.values() for node in nodes)
    blocks = {path: nodes for path, nodes in whole.items()
              if max(shared[node] for node in nodes) == 1 and validate_partition(nodes)}  # fmt: skip
    inner = [{str(n.target): paths[str(n.target)].removeprefix(f"{path}.") for n in nodes if n.op == "call_module"}
             for path, nodes in blocks.items()]  # fmt: skip
    fused = fuse_by_partitions(flat, [dict.fromkeys(nodes) for nodes in blocks.values()], FUSED)
    for number, path in enumerate(blocks):
        name = f"{FUSED}{number}"
        part = fused.get_submodule(name)
        assert isinstance(part, fx.GraphModule)
        fused.set_submodule(name, Block(_placed(part, inner[number])))
        paths[name] = path
    return _placed(fused, paths)


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_module"]


def _path(target: str) -> str:
    """onnx2torch writes a domain in front, and / in place of every dot."""
    return target.removeprefix(DOMAIN).strip("/").replace("/", ".")


def _attending(graph: fx.GraphModule, paths: dict[str, str]) -> list[str]:
    """The numbered paths right above attention, in order."""
    softmax = [target for target in paths if "softmax" in type(graph.get_submodule(target)).__name__.lower()]
    found = [NUMBERED.match(paths[target]) for target in softmax]
    return list(dict.fromkeys(match[1] for match in found if match))


def _with_between(flat: fx.GraphModule, nodes: list[fx.Node]) -> list[fx.Node]:
    """These calls, and those that need some of them and that others of them need: names do not tell all of a block."""
    order, inside = [node for node in flat.graph.nodes if node.op.startswith("call")], set(nodes)
    behind, before = set(nodes), set(nodes)
    for node in order:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
    for node in reversed(order):
        if before.intersection(node.users):
            before.add(node)
    return [node for node in order if node in inside or (node in behind and node in before)]


def _placed(flat: fx.GraphModule, paths: dict[str, str]) -> fx.GraphModule:
    """The same graph, with the module that each node calls at a path of its own."""
    root = nn.Module()
    called = [paths[str(node.target)] for node in _calls(flat)]
    containers = {path[:at] for path in called for at, letter in enumerate(path) if letter == "."}
    for name, value in flat.named_buffers():
        if name.startswith(CONSTANTS):
            _container(root, name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], value)
    for node in _calls(flat):
        module, path = flat.get_submodule(str(node.target)), paths[str(node.target)]
        if path in containers:  # something below has this name, too
            path = f"{path}.{type(module).__name__}"
        _container(root, path.rpartition(".")[0]).add_module(path.rpartition(".")[2], module)
        node.target = path
    return fx.GraphModule(root, flat.graph)


def _container(root: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
