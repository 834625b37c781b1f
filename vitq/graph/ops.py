"""The matrix products that vitq knows: how each is called, what its operands are, how it runs on quantized ones.

One table serves the trace and the interception, so both count the same calls in the same order. A product is
executed through its ATen overload: modes of outer owners do not count that again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.graph import attention, integer
from vitq.graph.attention import Port

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One kind of call.

    Attributes:
        kind: name in site identities.
        operands: (args, kwargs) -> operand name -> tensor, in the order in which they are used; operands that
            only exist inside the call (attention probabilities) are absent.
        run: (port, args, kwargs) -> result, every operand passed through the port, every result shown to it.
        macs: (output, args, kwargs) -> multiply-accumulates.
        inner: (args, kwargs) -> name -> shape of operands that exist only inside the call.
        bias: (args, kwargs) -> what is added along the output channels of the (first) product with a weight.
        fused: a kernel of the same arguments that does all of it in float.
        integer: (operand -> quantizer, args, kwargs) -> the result from integer codes, None where that cannot be.
        unsupported: (args, kwargs) -> what about this form is not taken apart, or "".
    """

    kind: str
    operands: Callable[..., dict[str, Tensor]]
    run: Callable[..., Any]
    macs: Callable[..., int]
    inner: Callable[..., dict[str, tuple[int, ...]]] = lambda *args, **kwargs: {}
    unsupported: Callable[..., str] = lambda *args, **kwargs: ""
    bias: Callable[..., Tensor | None] = lambda *args, **kwargs: None
    fused: Callable[..., Any] | None = None
    integer: Callable[..., Any] | None = None

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The call in float: fused where there is such a kernel, else taken apart with its operands as they are."""
        if self.fused is not None:
            return self.fused(*args, **kwargs)
        return self.run(_AsItIs(), *args, **kwargs)


class _AsItIs:
    """The port that changes nothing."""

    def __call__(self, operand: str, tensor: Tensor) -> Tensor:
        return tensor

    def made(self, operand: str, result: Tensor) -> Tensor:
        return result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    return {"input": input, "weight": weight}


def _run_linear(port: Port, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return port.made("input", ATEN.linear.default(port("input", input), port("weight", weight), bias))


def _macs_linear(out: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return input.numel() * weight.shape[0]


def _conv(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return {"input": input, "weight": weight}


def _run_conv(name: str) -> Callable[..., Tensor]:
    packet = getattr(ATEN, name)

    def run(port: Port, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return port.made("input", packet(port("input", input), port("weight", weight), *args, **kwargs))

    return run


def _macs_conv(out: Tensor, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return out.numel() * math.prod(weight.shape[1:])


def _macs_conv_transpose(out: Tensor, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return input.numel() * math.prod(weight.shape[1:])


def _pair(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"lhs": a, "rhs": b}


def _matmul(input: Tensor, other: Tensor | None = None, **kw: Any) -> dict[str, Tensor]:
    return _pair(input, other if other is not None else kw["mat2"] if "mat2" in kw else kw["tensor2"])


def _run_matmul(port: Port, *args: Any, **kw: Any) -> Tensor:
    both = _matmul(*args, **kw)
    return port.made("lhs", ATEN.matmul.default(port("lhs", both["lhs"]), port("rhs", both["rhs"])))


def _macs_matmul(out: Tensor, *args: Any, **kw: Any) -> int:
    return out.numel() * _matmul(*args, **kw)["lhs"].shape[-1]


def _with_out(*args: Any, **kwargs: Any) -> str:
    others = sorted(kwargs.keys() & {"out", "out_dtype"})
    return f"a product with {others[0]}=" if any(kwargs[k] is not None for k in others) else ""


def _rmatmul(self: Tensor, other: Tensor) -> dict[str, Tensor]:
    return _pair(other, self)


def _run_rmatmul(port: Port, self: Tensor, other: Tensor) -> Tensor:
    return _run_matmul(port, other, self)


def _macs_rmatmul(out: Tensor, self: Tensor, other: Tensor) -> int:
    return out.numel() * other.shape[-1]


def _add_matmul(input: Tensor, a: Tensor | None = None, b: Tensor | None = None, **kw: Any) -> dict[str, Tensor]:
    first = a if a is not None else kw["mat1"] if "mat1" in kw else kw["batch1"]
    return _pair(first, b if b is not None else kw["mat2"] if "mat2" in kw else kw["batch2"])


def _run_add_matmul(name: str) -> Callable[..., Tensor]:
    packet = getattr(ATEN, name)

    def run(port: Port, input: Tensor, *args: Any, **kw: Any) -> Tensor:
        both = _add_matmul(input, *args, **kw)
        scales = {k: kw[k] for k in ("beta", "alpha") if k in kw}
        return port.made("lhs", packet(input, port("lhs", both["lhs"]), port("rhs", both["rhs"]), **scales))

    return run


def _macs_add_matmul(out: Tensor, *args: Any, **kw: Any) -> int:
    return out.numel() * _add_matmul(*args, **kw)["lhs"].shape[-1]


def _einsum_tensors(tensors: tuple[Any, ...]) -> list[Tensor]:
    return list(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else list(tensors)


def _einsum(equation: str, *tensors: Any) -> dict[str, Tensor]:
    pair = _einsum_tensors(tensors)
    return _pair(pair[0], pair[1])


def _run_einsum(port: Port, equation: str, *tensors: Any) -> Tensor:
    a, b = _einsum_tensors(tensors)
    return ATEN.einsum.default(equation, [port("lhs", a), port("rhs", b)])  # type: ignore[no-any-return]


def einsum_labels(equation: str, operand: int, ndim: int) -> list[str]:
    """One label per dimension of an operand, or of the result (operand -1).

    The dimensions of an ellipsis are "0", "1", …, counted from the right.
    """
    left, _, right = equation.replace(" ", "").partition("->")
    if operand < 0 and "->" not in equation:
        labels = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in labels if labels.count(c) == 1))
    term = right if operand < 0 else left.split(",")[operand]
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *(str(n) for n in reversed(range(hidden))), *after]


def _macs_einsum(out: Tensor, equation: str, *tensors: Any) -> int:
    sizes: dict[str, int] = {}
    for number, tensor in enumerate(_einsum_tensors(tensors)):
        for label, size in zip(einsum_labels(equation, number, tensor.ndim), tensor.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())


def _einsum_unsupported(equation: str, *tensors: Any) -> str:
    count = len(_einsum_tensors(tensors))
    return "" if count == 2 else f"einsum of {count} operands"


def _left(name: str) -> Product:
    """A function that multiplies matrices and is not taken apart: found, counted, and left in float."""
    macs = _LEFT_MACS.get(name, lambda *a, **k: 0)
    return Product(name, lambda *a, **k: {}, lambda *a, **k: None, macs, unsupported=lambda *a, **k: name)


def _macs_recurrent(out: Any, input: Tensor, hidden: Any, *args: Any, **kwargs: Any) -> int:
    """Every weight matrix meets every step of every sequence."""
    # A packed sequence has its batch sizes as the second tensor, then the state; the weights are the last list.
    weights = next((a for a in reversed((hidden, *args)) if isinstance(a, (list, tuple))), ())
    return math.prod(input.shape[:-1]) * sum(int(w.numel()) for w in weights if w.ndim == 2)


def _macs_cell(out: Any, input: Tensor, hidden: Any, *weights: Any, **kwargs: Any) -> int:
    return math.prod(input.shape[:-1]) * sum(int(w.numel()) for w in weights if w is not None and w.ndim == 2)


def _macs_bilinear(out: Tensor, a: Tensor, b: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return out[..., 0].numel() * (weight.numel() + math.prod(weight.shape[:2]))


_LEFT_MACS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _macs_recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _macs_cell),
    "bilinear": _macs_bilinear,
    "mv": lambda out, matrix, vector: matrix.numel(),
    "addmv": lambda out, input, matrix, vector, **k: matrix.numel(),
    "dot": lambda out, a, b: a.numel(),
    "vdot": lambda out, a, b: a.numel(),
}


LINEAR = Product(
    "linear",
    _linear,
    _run_linear,
    _macs_linear,
    bias=lambda input, weight, bias=None: bias,
    unsupported=_with_out,
    integer=integer.linear,
)
MATMUL = Product("matmul", _matmul, _run_matmul, _macs_matmul, unsupported=_with_out)
SDPA = Product(
    "sdpa",
    attention.sdpa_operands,
    attention.run_sdpa,
    attention.sdpa_macs,
    inner=attention.sdpa_inner,
    fused=ATEN.scaled_dot_product_attention.default,
)
MHA = Product(
    "mha",
    attention.mha_operands,
    attention.run_mha,
    attention.mha_macs,
    inner=attention.mha_inner,
    unsupported=attention.mha_unsupported,
    bias=attention.mha_bias,
)

# Every callable under which a product can reach a mode.
PRODUCTS: dict[Any, Product] = {
    F.linear: LINEAR,
    torch.matmul: MATMUL,
    torch.bmm: MATMUL,
    torch.mm: MATMUL,
    Tensor.matmul: MATMUL,
    Tensor.__matmul__: MATMUL,
    operator.matmul: MATMUL,  # what `@` is while torch.export traces strictly
    Tensor.bmm: MATMUL,
    Tensor.mm: MATMUL,
    Tensor.__rmatmul__: Product("matmul", _rmatmul, _run_rmatmul, _macs_rmatmul),
    torch.einsum: Product("einsum", _einsum, _run_einsum, _macs_einsum, unsupported=_einsum_unsupported),
    F.scaled_dot_product_attention: SDPA,
    F.multi_head_attention_forward: MHA,
}
for _name in ("conv1d", "conv2d", "conv3d"):
    PRODUCTS[getattr(torch, _name)] = PRODUCTS[getattr(F, _name)] = Product("conv", _conv, _run_conv(_name), _macs_conv)
for _name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    PRODUCTS[getattr(torch, _name)] = PRODUCTS[getattr(F, _name)] = Product(
        "convt", _conv, _run_conv(_name), _macs_conv_transpose
    )
for _name in ("addmm", "baddbmm"):
    _product = Product("matmul", _add_matmul, _run_add_matmul(_name), _macs_add_matmul, unsupported=_with_out)
    PRODUCTS[getattr(torch, _name)] = PRODUCTS[getattr(Tensor, _name)] = _product
for _space, _names in {
    torch: (
        "tensordot",
        "inner",
        "dot",
        "vdot",
        "mv",
        "addmv",
        "addbmm",
        "bilinear",
        "chain_matmul",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
    ),
    Tensor: ("inner", "dot", "vdot", "mv", "addmv", "addbmm", "addmm_", "baddbmm_", "addmv_", "addbmm_"),
    torch.linalg: ("multi_dot", "vecdot"),
    F: ("bilinear", "scaled_mm", "grouped_mm", "scaled_grouped_mm"),
}.items():
    for _name in _names:
        if hasattr(_space, _name):
            PRODUCTS[getattr(_space, _name)] = _left(_name.rstrip("_"))
