"""Weights as whole numbers of 4 or 8 bits, and what makes values of them.

Two to four bits take four, five to eight take eight. Where products are of whole numbers, codes and zero-points are
shifted so that they fit a signed type: value = scale * (stored - (zero_point - half)), half = 2**(width - 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vitq.export.edit import WEIGHT, Editor
from vitq.export.tables import tables_of
from vitq.quantizers.base import Quantizer

NARROW, WIDE = 4, 8


def stored_bits(bits: int) -> int:
    """Bits that a weight takes in the file: 4, 8, or 32 where codes are wider than a byte."""
    return NARROW if bits <= NARROW else WIDE if bits <= WIDE else 32


def put_weight(edit: Editor, quantizer: Quantizer, weight: torch.Tensor, whole: bool) -> None:
    """Replace the mark at a weight by its codes.

    Args:
        weight: decoded values.
        whole: its products are of whole numbers, so that a DequantizeLinear of bytes is wanted. Beside a float operand
            it is not: ONNX Runtime would round that operand to a byte, too (its MatMulNBits).
    """
    width = stored_bits(quantizer.bits)
    codes = quantizer.encode(weight).cpu()
    order = list(edit.take_transposes())
    if width > WIDE:
        edit.replace(edit.constant("values", weight.permute(order).contiguous().cpu().numpy()))
    elif whole and quantizer.affine and not quantizer.layout.group and _zero_points_fit(quantizer, width):
        edit.replace(_of_bytes(edit, quantizer, codes, width, order))
    else:
        edit.replace(_in_float(edit, quantizer, codes, width, order))


def _zero_points_fit(quantizer: Quantizer, width: int) -> bool:
    zero_point = quantizer.params()["zero_point"]
    return bool((zero_point >= 0).all() and (zero_point < 2**width).all())


def _of_bytes(edit: Editor, quantizer: Quantizer, codes: torch.Tensor, width: int, order: list[int]) -> Any:
    """A DequantizeLinear of bytes. A runtime makes them of 4-bit numbers once, when it loads the file."""
    import ml_dtypes

    half = 2 ** (width - 1) if not _symmetric(quantizer) else 2 ** (quantizer.bits - 1)
    kind = ml_dtypes.int4 if width == NARROW else np.int8
    stored = (codes - half).permute(order).contiguous().to(torch.int8).numpy()
    params = quantizer.params()
    scale = params["scale"].detach().flatten().cpu().numpy()
    zero_point = (params["zero_point"].flatten().cpu() - half).to(torch.int8).numpy()
    attributes: dict[str, Any] = {}
    if quantizer.layout.keep:
        attributes["axis"] = order.index(codes.ndim + quantizer.layout.keep[0])
    else:
        scale, zero_point = scale[0], zero_point[0]
    value = edit.constant("codes", stored.astype(kind))
    if width == NARROW:
        import onnx_ir as ir

        value, kind = edit.node("Cast", [value], {"to": int(ir.DataType.INT8)}), np.int8
    inputs = [value, edit.constant("scale", scale)]
    if bool(zero_point.any()):
        inputs.append(edit.constant("zero_point", np.asarray(zero_point).astype(kind)))
    return edit.node("DequantizeLinear", inputs, attributes, part=WEIGHT)


def _symmetric(quantizer: Quantizer) -> bool:
    return bool((quantizer.params()["zero_point"] == 2 ** (quantizer.bits - 1)).all())


def _in_float(edit: Editor, quantizer: Quantizer, codes: torch.Tensor, width: int, order: list[int]) -> Any:
    """Codes of any format: arithmetic in float32, or a table of levels. A runtime does it once, when it loads."""
    import ml_dtypes
    import onnx_ir as ir

    layout, split = quantizer.layout, quantizer.layout.split(codes)
    kind = ml_dtypes.uint4 if width == NARROW else np.uint8
    if quantizer.affine:
        params = {name: value.detach().cpu().numpy() for name, value in quantizer.params().items()}
        stored = edit.constant("codes", split.to(torch.uint8).numpy().astype(kind))
        whole = edit.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        steps = edit.node("Sub", [whole, edit.constant("zero_point", params["zero_point"])])
        value = edit.node("Mul", [steps, edit.constant("scale", params["scale"])])
    else:
        place_of = quantizer.lower().codes.argsort().cpu()  # of each code in the order of levels
        group = torch.arange(layout.groups, dtype=torch.int32).reshape(layout.scale_shape)
        stored = edit.constant("codes", place_of[split.long()].to(torch.uint8).numpy().astype(kind))
        index = edit.node("Cast", [stored], {"to": int(ir.DataType.INT32)})
        start = edit.constant("group", (group * 2**quantizer.bits).numpy())
        index = edit.node("Add", [index, start])
        value = edit.node("Gather", [edit.constant("levels", tables_of(quantizer)[1]), index])
    if layout.group:
        value = edit.node("Reshape", [value, edit.constant("shape", np.array(codes.shape, np.int64))])
    if order != sorted(order):
        value = edit.node("Transpose", [value], {"perm": order})
    edit.note(value.producer(), WEIGHT)
    return value
