"""A float model that exists only as an ONNX file, as a PyTorch module.

onnx2torch converts it, after onnx_rules.py has put together what exporters take apart; onnx_modules.py gives it back
the module tree of its names. Only what the file computes is taken: no code is run that it names.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from vitq.core.errors import InputError, MissingExtraError
from vitq.data.onnx_modules import as_tree, register
from vitq.data.onnx_rules import put_together

REMEDY = "export it with opset 17 or below, or take the model that it was exported from"
INPUTS = {"ReduceMean": 1, "Pad": 3}  # that onnx2torch knows
QUANTIZED = re.compile(r"Q(uantize|Linear|Gemm|Attention)|Dequantize|DynamicQuantize|Integer$|MatMulNBits")


def read_onnx(path: Path) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model in eval mode, and the shape of its input without the batch, None where the file leaves it open.

    Raises:
        InputError: no such file, no ONNX model, one that is quantized, or an operator that cannot be converted.
        MissingExtraError: onnx, onnxscript or onnx2torch is not installed.
    """
    if not path.is_file():
        raise InputError(f"no file {path.as_posix()!r}. Check the path.")
    try:
        import onnx
        import onnx2torch
        import onnxscript  # noqa: F401 - before long work
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx2torch", "onnx", "reading an ONNX model") from error
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf's, the checker's, or of data beside the file
        raise InputError(f"{path.name} is not a usable ONNX model: {_first_line(error)}") from error
    kinds = {node.op_type for node in proto.graph.node}
    if taken := sorted(kind for kind in kinds if QUANTIZED.match(kind)):
        raise InputError(f"{path.name} is quantized already (it has {', '.join(taken[:3])}); give the float model")
    shape = _input_shape(path, proto)
    proto = put_together(onnx.shape_inference.infer_shapes(proto))
    register()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries' own
            flat = onnx2torch.convert(_plain(path, proto))
    except NotImplementedError as error:
        raise InputError(f"{path.name} cannot be converted to PyTorch: {_first_line(error)}; {REMEDY}") from error
    return as_tree(flat).eval(), shape


def _plain(path: Path, proto: Any) -> Any:
    """The same model without what onnx2torch does not know and nothing needs."""
    import onnx

    constants = {one.name: one for one in proto.graph.initializer}
    for node in proto.graph.node:
        second = constants.get(node.input[1]) if len(node.input) > 1 else None
        values = None if second is None else onnx.numpy_helper.to_array(second)
        if node.op_type == "Reshape" and values is not None and (values != 0).all():  # what allowzero is about
            kept = [one for one in node.attribute if one.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
        if node.op_type == "ReduceMean" and values is not None:
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("axes", values.tolist()))
        if len(node.input) > INPUTS.get(node.op_type, len(node.input)):
            raise InputError(f"{path.name}: {node.op_type} ({node.name}) takes axes that are computed; {REMEDY}")
    return proto


def _input_shape(path: Path, proto: Any) -> tuple[int, ...] | None:
    constants = {one.name for one in proto.graph.initializer}
    inputs = [one for one in proto.graph.input if one.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise InputError(f"{path.name} has {len(inputs)} inputs ({names}); a model of images has one")
    batch, *sizes = (one.dim_value for one in inputs[0].type.tensor_type.shape.dim)
    if batch:
        raise InputError(f"{path.name} takes {batch} images at a time; export it with a free batch size (dynamic axes)")
    return tuple(sizes) if len(sizes) == 3 and all(sizes) else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
