"""Formats as local functions of an ONNX file: `vitq::log2_4bit`, `vitq::uniform_8bit` …

A uniform format is its own arithmetic in float32. Every other static format is a table: its lowered form has
`thresholds` and `levels` (quantizers/base.py), and a value's level is found by bisecting the thresholds, one comparison
per bit. Comparisons are exact, so the result is the level that the quantizer gives, for every finite float32.

Shapes:  thresholds (groups * (2**bits - 1),)    levels (groups * 2**bits,)    group broadcastable to x, its scale group
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from vitq.quantizers.base import Quantizer

DOMAIN = "vitq"


class Functions:
    """The local functions of one model, made when they are first asked for."""

    def __init__(self, model: Any, opset: int) -> None:
        self.model, self.opset = model, opset

    def uniform(self, kind: str, bits: int) -> str:
        """(x, scale, low, high) -> clamp(round(x / scale), low, high) * scale; low and high are whole steps."""
        name = f"{kind}_{bits}bit"

        def body(op: Any, x: Any, scale: Any, low: Any, high: Any) -> Any:
            steps = op.Min(op.Max(op.Round(op.Div(x, scale)), low), high)
            return op.Mul(steps, scale)

        return self._define(name, ("x", "scale", "low", "high"), body)

    def table(self, kind: str, bits: int, grouped: bool) -> str:
        """(x, thresholds, levels[, group]) -> the level of each value."""
        name = f"{kind}_{bits}bit" + ("_grouped" if grouped else "")
        count = 2**bits

        def body(op: Any, x: Any, thresholds: Any, levels: Any, group: Any = None) -> Any:
            index = None
            for step in (2**n for n in reversed(range(bits))):
                at = _integer(op, step - 1)
                if index is not None:
                    at = op.Add(index, at)
                if group is not None:
                    at = op.Add(at, op.Mul(group, _integer(op, count - 1)))
                reached = op.GreaterOrEqual(x, op.Gather(thresholds, at))
                more = op.Where(reached, _integer(op, step), _integer(op, 0))
                index = more if index is None else op.Add(index, more)
            if group is not None:
                index = op.Add(index, op.Mul(group, _integer(op, count)))
            return op.Gather(levels, index)

        return self._define(name, ("x", "thresholds", "levels", *(("group",) if grouped else ())), body)

    def _define(self, name: str, inputs: tuple[str, ...], body: Any) -> str:
        import onnx_ir as ir

        if (DOMAIN, name, "") not in self.model.functions:
            values = [ir.Value(name=given) for given in inputs]
            tape = ir.tape.Tape()
            made = body(_Ops(tape), *values)
            made.name = "value"
            graph = ir.Graph(values, [made], nodes=tape.nodes, opset_imports={"": self.opset}, name=name)
            for number, node in enumerate(graph):
                node.name = f"{node.op_type}_{number}"
                for output in node.outputs:
                    output.name = output.name or f"v{number}"
            self.model.functions[(DOMAIN, name, "")] = ir.Function(DOMAIN, name, graph=graph, attributes=[])
            self.model.opset_imports[DOMAIN] = 1
        return name


class _Ops:
    """`op.Add(a, b)` on a tape of onnx_ir."""

    def __init__(self, tape: Any) -> None:
        self.tape = tape

    def __getattr__(self, name: str) -> Any:
        return lambda *inputs, **attributes: self.tape.op(name, inputs, attributes)


def _integer(op: Any, value: int) -> Any:
    import onnx_ir as ir

    return op.Constant(value=ir.tensor(np.array(value, np.int32)))


def tables_of(quantizer: Quantizer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Thresholds and levels of all scale groups, flat, filled up to 2**bits levels per group.

    Raises:
        InputError: a format that does not fit its bits (`lower`).
    """
    lowered, count = quantizer.lower(), 2**quantizer.bits
    missing = count - lowered.levels.shape[1]
    thresholds = torch.nn.functional.pad(lowered.thresholds, (0, missing), value=math.inf)
    levels = torch.cat([lowered.levels, lowered.levels[:, -1:].expand(-1, missing)], dim=1)
    return thresholds.flatten().numpy(), levels.contiguous().flatten().float().numpy()
