"""What a site of activations becomes: a pair of QuantizeLinear and DequantizeLinear, or a local function.

Of fewer than eight bits, codes are bytes between two Clip bounds: kernels that multiply whole numbers take bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vitq.export.edit import CODE, VALUE, Editor
from vitq.export.tables import DOMAIN, Functions, tables_of
from vitq.quantizers.base import Quantizer

BYTE = 8


def put_activation(
    edit: Editor,
    kind: str,
    quantizer: Quantizer | None,
    functions: Functions,
    paired: bool,
    *,
    alone: bool = False,
) -> Any:
    """Replace the mark at an activation; gives what stands for its values now.

    Args:
        kind: name of the format.
        quantizer: None for a dynamic format, whose arithmetic is in the graph already.
        paired: as QuantizeLinear and DequantizeLinear; the format `fits_bytes`.
        alone: nothing comes between the pair, and what is transposed is transposed behind it. With fewer than eight
            bits, values are clipped before they are rounded, instead of codes. OpenVINO takes the pair for whole
            numbers only then, and makes the transposition a part of the product.
    """
    x = edit.marked.inputs[0]
    if quantizer is None:
        value = edit.node("Identity", [x], part=VALUE)
    elif paired:
        value = _pair(edit, x, quantizer, alone)
    else:
        value = _as_function(edit, x, kind, quantizer, functions)
    edit.replace(value)
    return value


def _as_function(edit: Editor, x: Any, kind: str, quantizer: Quantizer, functions: Functions) -> Any:
    grouped = quantizer.layout.group
    lead = [0] * (len(x.shape) - 1)
    if grouped:
        x = edit.node("Reshape", [x, edit.constant("split", np.array([*lead, -1, grouped], np.int64))])
    value = _function(edit, x, kind, quantizer, functions)
    if grouped:
        value = edit.node("Reshape", [value, edit.constant("join", np.array([*lead, -1], np.int64))])
    edit.note(value.producer(), VALUE)
    return value


def fits_bytes(quantizer: object) -> bool:
    """Whether codes and zero-points are bytes, with one scale for all.

    ONNX Runtime takes every DequantizeLinear before a MatMul for its own; one with several scales, it then fails on.
    """
    if not isinstance(quantizer, Quantizer) or not quantizer.affine or quantizer.layout.keep or quantizer.bits > BYTE:
        return False
    zero_point = quantizer.params()["zero_point"]
    return bool((zero_point >= 0).all() and (zero_point < 2**BYTE).all())


def _pair(edit: Editor, x: Any, quantizer: Quantizer, alone: bool) -> Any:
    import onnx_ir as ir

    shape = edit.marked.outputs[0].shape
    order = edit.take_transposes()
    moved = order != tuple(range(len(x.shape)))
    if moved and not alone:
        x, shape = edit.node("Transpose", [x], {"perm": order}), edit.marked.outputs[0].shape
    elif moved:
        edit.order = ()  # codes are as the site has them
    params = quantizer.params()
    with_scale = [
        edit.constant("scale", params["scale"].detach().cpu().numpy()),
        edit.constant("zero_point", params["zero_point"].to(torch.uint8).cpu().numpy()),
    ]
    whole = quantizer.bits == BYTE
    if not whole and alone:
        steps = torch.tensor([0, 2**quantizer.bits - 1]) - params["zero_point"].cpu()
        low, high = (steps * params["scale"].detach().cpu()).numpy()
        ends = [edit.constant("low_value", np.asarray(low)), edit.constant("high_value", np.asarray(high))]
        x, whole = edit.node("Clip", [x, *ends]), True
    code = edit.node("QuantizeLinear", [x, *with_scale], part=CODE if whole else "")
    if not whole:
        ends = [
            edit.constant(name, np.array(end, np.uint8)) for name, end in (("low", 0), ("high", 2**quantizer.bits - 1))
        ]
        code = edit.node("Clip", [code, *ends], part=CODE)
    # Where a copy of the file is given codes, their number of dimensions decides which kernels can be taken.
    code.shape, code.dtype = shape, ir.DataType.UINT8
    value = edit.node("DequantizeLinear", [code, *with_scale])
    value.shape, value.dtype = shape, ir.DataType.FLOAT
    return edit.node("Transpose", [value], {"perm": order}) if moved and alone else value


def _function(edit: Editor, x: Any, kind: str, quantizer: Quantizer, functions: Functions) -> Any:
    if quantizer.affine:
        params = {name: value.detach().cpu() for name, value in quantizer.params().items()}
        low, high = -params["zero_point"], 2**quantizer.bits - 1 - params["zero_point"]
        parts = {"scale": params["scale"], "low": low, "high": high}
        inputs = [x, *(edit.constant(name, value.numpy()) for name, value in parts.items())]
        return edit.node(functions.uniform(kind, quantizer.bits), inputs, domain=DOMAIN)
    thresholds, levels = tables_of(quantizer)
    inputs = [x, edit.constant("thresholds", thresholds), edit.constant("levels", levels)]
    groups = quantizer.layout.groups
    if groups > 1:
        group = torch.arange(groups, dtype=torch.int32).reshape(quantizer.layout.scale_shape)
        inputs.append(edit.constant("group", group.numpy()))
    return edit.node(functions.table(kind, quantizer.bits, groups > 1), inputs, domain=DOMAIN)
