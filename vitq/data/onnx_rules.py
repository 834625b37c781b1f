"""What exporters took apart, put together again in an ONNX graph: linear layers, LayerNorm, GELU.

Linear   MatMul with a constant matrix (K, N), and Add of a constant (N,) if that follows
Norm     x - mean over the last axis, over the root of the mean square of that, times a constant, plus a constant
Gelu     x / 2 (1 + erf(x / sqrt 2)), in the orders that torch's exporters write
"""

from __future__ import annotations

import ast
import math
from typing import Any

DOMAIN = "vitq"  # of the operators that stand for what was found; onnx_modules.py makes modules of them
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata that torch's newer exporter writes
CLOSE = 1e-4  # relative: constants of half precision are no nearer


def put_together(proto: Any) -> Any:
    """The model with these operators in place of what they stand for, all named by the module that was exported.

    Args:
        proto: an onnx.ModelProto with the shapes of its values.
    """
    from onnxscript.rewriter import rewrite

    paths = {node.output[0]: _path(node) for node in proto.graph.node}
    for rules in _rules():
        proto = rewrite(proto, rules)
    for number, node in enumerate(proto.graph.node):
        path = paths.get(node.output[0], "")
        own = path if node.domain == DOMAIN else ""
        node.name = own or f"{path}/{node.op_type}_{number}"
    return proto


def _path(node: Any) -> str:
    """Of the module that a node was exported from: torch's exporters tell it, or name values by it; "" if none does."""
    told = {one.key: one.value for one in node.metadata_props}.get(SCOPES)
    if told is not None:
        scopes = ast.literal_eval(told)  # a list of strings: "", the modules from the outside to the inside, the call
        return f"/{scopes[-2]}" if len(scopes) > 2 else ""
    path: str = node.output[0].rpartition("/")[0]
    return path


def _rules() -> list[Any]:
    """In this order: a product is looked at together with its bias before it is looked at alone."""
    from onnxscript.rewriter.pattern import RewriteRule as Rule
    from onnxscript.rewriter.pattern import RewriteRuleSet as Rules

    return [
        Rules(
            [
                *(Rule(form, _make_norm, _is_norm) for form in (_norm, _norm_by_product)),
                Rule(_layer_normalization, _make_norm_of, _is_norm_of),
                *(Rule(form, _make_gelu, _is_gelu) for form in (_gelu_halved_last, _gelu_halved_first, _gelu_halved)),
                Rule(_gelu, _make_gelu, _is_exact),
                Rule(_linear, _make_linear, _is_linear),
            ],
            commute=True,
        ),
        Rules([Rule(_product, _make_product, _is_product)]),
    ]


def _norm(op: Any, x: Any, weight: Any, bias: Any, eps: Any, two: Any) -> Any:
    far = op.Sub(x, op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"]))
    square = op.ReduceMean(op.Pow(far, two), _allow_other_inputs=True, _outputs=["variance"])
    return op.Add(op.Mul(op.Div(far, op.Sqrt(op.Add(square, eps))), weight), bias)


def _norm_by_product(op: Any, x: Any, weight: Any, bias: Any, eps: Any) -> Any:
    far = op.Sub(x, op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"]))
    square = op.ReduceMean(op.Mul(far, far), _allow_other_inputs=True, _outputs=["variance"])
    return op.Add(op.Mul(op.Div(far, op.Sqrt(op.Add(square, eps))), weight), bias)


def _is_norm(
    context: Any, weight: Any, bias: Any, eps: Any, mean: Any, variance: Any, two: Any = None, **others: Any
) -> bool:
    parts = [_constant(value) for value in (weight, bias)]
    return (
        all(part is not None and part.ndim == 1 for part in parts)
        and _number(eps) is not None
        and (two is None or _number(two) == 2)
        and all(_axes(value) == [-1] for value in (mean, variance))
    )


def _make_norm(op: Any, x: Any, weight: Any, bias: Any, eps: Any, **others: Any) -> Any:
    return op.Norm(x, weight, bias, epsilon=_number(eps), _domain=DOMAIN)


def _layer_normalization(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.LayerNormalization(x, weight, bias, _allow_other_attributes=True, _outputs=["normal"])


def _is_norm_of(context: Any, weight: Any, bias: Any, normal: Any, **others: Any) -> bool:
    parts, axis = [_constant(value) for value in (weight, bias)], normal.producer().attributes.get("axis")
    rank = None if normal.shape is None else len(normal.shape)
    last = axis is None or axis.as_int() in (-1, None if rank is None else rank - 1)
    return last and all(part is not None and part.ndim == 1 for part in parts)


def _make_norm_of(op: Any, x: Any, weight: Any, bias: Any, normal: Any, **others: Any) -> Any:
    given = normal.producer().attributes.get("epsilon")
    return op.Norm(x, weight, bias, epsilon=1e-5 if given is None else given.as_float(), _domain=DOMAIN)


def _gelu_halved_last(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _gelu_halved_first(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    return op.Mul(op.Mul(x, half), op.Add(op.Erf(op.Div(x, root)), one))


def _gelu_halved(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))


def _is_gelu(context: Any, root: Any, one: Any, half: Any, **others: Any) -> bool:
    wanted = ((root, math.sqrt(2)), (one, 1.0), (half, 0.5))
    return all(math.isclose(_number(value) or 0.0, exact, rel_tol=CLOSE) for value, exact in wanted)


def _gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x, _allow_other_attributes=True, _outputs=["made"])


def _is_exact(context: Any, made: Any, **others: Any) -> bool:
    how = made.producer().attributes.get("approximate")
    return how is None or how.as_string() == "none"


def _make_gelu(op: Any, x: Any, **others: Any) -> Any:
    return op.Gelu(x, _domain=DOMAIN)


def _linear(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Add(op.MatMul(x, weight), bias)


def _is_linear(context: Any, weight: Any, bias: Any, **others: Any) -> bool:
    added = _constant(bias)
    return _is_product(context, weight) and added is not None and added.shape == _constant(weight).shape[1:]


def _make_linear(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Linear(x, weight, bias, _domain=DOMAIN)


def _product(op: Any, x: Any, weight: Any) -> Any:
    return op.MatMul(x, weight)


def _is_product(context: Any, weight: Any, **others: Any) -> bool:
    found = _constant(weight)
    return found is not None and found.ndim == 2


def _make_product(op: Any, x: Any, weight: Any) -> Any:
    return op.Linear(x, weight, _domain=DOMAIN)


def _constant(value: Any) -> Any:
    """Its numbers, None where it is none."""
    import onnx_ir

    found = onnx_ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def _number(value: Any) -> float | None:
    found = _constant(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def _axes(value: Any) -> list[int] | None:
    """Over which axes a mean goes, an attribute before opset 18, then an input; the last axis is -1."""
    node = value.producer()
    given = node.attributes.get("axes")
    inner = _constant(node.inputs[1]) if given is None and len(node.inputs) > 1 else None
    axes = list(given.as_ints()) if given is not None else None if inner is None else inner.tolist()
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return None if axes is None else [axis - rank if rank is not None and axis >= 0 else axis for axis in axes]
