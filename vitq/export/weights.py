"""Weights as whole numbers of 4 or 8 bits, and what makes values of them.

Two to four bits take four, five to eight take eight. Where products are of whole numbers, codes and zero-points are
shifted so that they fit a signed type: value = scale * (stored - (zero_point - half)), half = 2**(width - 1).

Where a runtime wants zero at zero (signed.py), value = scale * stored + rest. Codes of fewer than eight bits less their
zero-point are signed bytes as they are, and the rest is none. Of eight bits, that is so for channels with zero in the
middle; the others are shifted by 128, and their rest is added behind the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vitq.export.edit import REST, WEIGHT, Editor
from vitq.export.signed import HIGH, LOW, MIDDLE, Rests
from vitq.export.tables import tables_of
from vitq.quantizers.base import Quantizer

NARROW, WIDE = 4, 8


def stored_bits(bits: int) -> int:
    """Bits that a weight takes in the file: 4, 8, or 32 where codes are wider than a byte."""
    return NARROW if bits <= NARROW else WIDE if bits <= WIDE else 32


def put_weight(edit: Editor, quantizer: Quantizer, weight: torch.Tensor, whole: bool, *, signed: bool = False) -> Rests:
    """Replace the mark at a weight by its codes.

    Args:
        weight: decoded values.
        whole: its products are of whole numbers, so that a DequantizeLinear of bytes is wanted. Beside a float operand
            it is not: ONNX Runtime would round that operand to a byte, too (its MatMulNBits).
        signed: of bytes with zero at zero.

    Returns:
        What values in the file lack, for `add_rests`.
    """
    width = stored_bits(quantizer.bits)
    codes = quantizer.encode(weight).cpu()
    order = list(edit.take_transposes())
    whole = whole and quantizer.affine and not quantizer.layout.group and _zero_points_fit(quantizer, width)
    rest = None
    if width > WIDE:
        value = edit.constant("values", weight.permute(order).contiguous().cpu().numpy())
    elif whole and signed and _per_output(edit, quantizer, codes.ndim, order):
        value, rest = _of_signed_bytes(edit, quantizer, codes, width, order)
    elif whole and not signed:
        value = _of_bytes(edit, quantizer, codes, width, order)
    else:
        value = _in_float(edit, quantizer, codes, width, order)
    edit.replace(value)
    return {} if rest is None else {value: rest}


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


def _of_signed_bytes(
    edit: Editor, quantizer: Quantizer, codes: torch.Tensor, width: int, order: list[int]
) -> tuple[Any, Any]:
    """A DequantizeLinear of bytes without a zero-point, and what its values lack, per output channel, or None."""
    import ml_dtypes

    zero_point, scale = (quantizer.params()[name].detach().cpu() for name in ("zero_point", "scale"))
    shift = shift_of_weight(quantizer, codes)
    attributes: dict[str, Any] = {}
    if quantizer.layout.keep:
        attributes["axis"] = order.index(codes.ndim + quantizer.layout.keep[0])
    flat = scale.flatten().numpy() if quantizer.layout.keep else scale.flatten().numpy()[0]
    if width == NARROW:
        import onnx_ir as ir

        stored = edit.constant(
            "codes", codes.permute(order).contiguous().to(torch.uint8).numpy().astype(ml_dtypes.uint4)
        )
        whole = edit.node("Cast", [stored], {"to": int(ir.DataType.INT8)})
        shifts = shift.reshape((1,) * (codes.ndim - shift.ndim) + shift.shape).permute(order)
        value = edit.node("Sub", [whole, edit.constant("shift", shifts.to(torch.int8).contiguous().numpy())])
    else:
        value = edit.constant("codes", (codes - shift).permute(order).contiguous().to(torch.int8).numpy())
    value = edit.node("DequantizeLinear", [value, edit.constant("scale", flat)], attributes, part=WEIGHT)
    if torch.equal(shift, zero_point.to(shift)):
        return value, None
    rest = edit.constant("rest", ((shift - zero_point) * scale).flatten().float().numpy())
    value.producer().metadata_props[REST] = rest.name
    return value, rest


def _per_output(edit: Editor, quantizer: Quantizer, ndim: int, order: list[int]) -> bool:
    """Whether there is one scale, or one for each column of the product."""
    if not quantizer.layout.keep:
        return True
    axis = order.index(ndim + quantizer.layout.keep[0])
    return all(axis == columns_of(use.node, ndim) for use in edit.marked.outputs[0].uses())


def columns_of(product: Any, ndim: int) -> int:
    """The axis of a product's weight that makes its columns, or the channels of a convolution."""
    if product.op_type == "Gemm":
        transposed = "transB" in product.attributes and product.attributes["transB"].as_int()
        return 0 if transposed else 1
    return 0 if product.op_type == "Conv" else ndim - 1


def shift_of_weight(quantizer: Quantizer, codes: torch.Tensor) -> torch.Tensor:
    """What is taken from codes (…, O, I) so that they are signed bytes, int16 in the shape of the zero-point."""
    zero_point = quantizer.params()["zero_point"].detach().cpu().to(torch.int16)
    steps = codes.cpu().to(torch.int16) - zero_point
    fits = (steps >= LOW) & (steps <= HIGH)
    kept = [d % codes.ndim for d in quantizer.layout.keep] if zero_point.ndim else []
    others = [d for d in range(codes.ndim) if d not in kept]
    fits = fits.all(dim=tuple(others), keepdim=True).reshape(zero_point.shape) if others else fits
    return torch.where(fits, zero_point, MIDDLE)


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
