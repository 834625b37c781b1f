"""Linear layers on integer codes: what a compiled model runs on an x86 processor in place of the simulated product.

Where input and weight are uniform with one scale per tensor and per output channel, the product of the dequantized
operands is a scaled product of their codes. oneDNN computes that exactly, in bytes, faster than a float product; the
simulated one rounds every sum to float32, so the two agree to float precision, not bit for bit.

A NaN has no code: it is not passed on.

Shapes:  codes (..., K) uint8    weight (N, K) float32, already on its grid    result (..., N) float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Without VNNI, two products of bytes are added in 16 bits, with saturation.
LARGEST_PAIR = 2**15 - 1
LARGEST_BYTE = 127


class _Affine(Protocol):
    """What is needed of a quantizer with value = scale * (code - zero_point)."""

    bits: int
    baked: bool
    active: bool
    observer: Any
    scale: Tensor
    zero_point: Tensor

    def params(self) -> dict[str, Tensor]: ...
    def encode_with(self, x: Tensor, params: dict[str, Tensor]) -> Tensor: ...


def wanted() -> bool:
    """Whether this call is being compiled for a run without gradients; exported programs stay simulated."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not torch.is_grad_enabled()


def linear(
    quantizers: dict[str, nn.Module | None], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """The product on codes, or None where this processor or these formats have none."""
    x_quantizer, w_quantizer = _affine(quantizers["input"]), _affine(quantizers["weight"])
    if not _AVAILABLE or x_quantizer is None or w_quantizer is None:
        return None
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    fits = x_quantizer.active and x_quantizer.observer is None and x_quantizer.bits <= 8 and w_quantizer.baked
    if not fits or x_quantizer.scale.numel() != 1 or w_quantizer.scale.shape not in ((), (weight.shape[0], 1)):
        return None
    codes = x_quantizer.encode_with(input, x_quantizer.params()).to(torch.uint8)
    top = 2**x_quantizer.bits - 1
    found = linear_codes(codes, x_quantizer.scale, x_quantizer.zero_point, top, weight, w_quantizer.scale, bias)
    return cast(Tensor, found)


def _affine(quantizer: nn.Module | None) -> _Affine | None:
    return cast(_Affine, quantizer) if getattr(quantizer, "affine", False) else None


@torch.library.custom_op("vitq::linear_codes", mutates_args=())
def linear_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    top: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """scale * (codes - zero_point) @ weight.T + bias.

    Args:
        top: the largest code there can be.
        weight_scale: () or (N, 1), the steps that weight is made of.
    """
    packed = _PACKED.get(weight, weight_scale)
    if packed.codes is None or not codes.numel() or 2 * top * packed.largest > LARGEST_PAIR:
        return F.linear((codes - zero_point) * scale, weight, bias)
    packed.multiplied = True
    rows = codes.reshape(-1, codes.shape[-1])
    out = torch.ops.onednn.qlinear_pointwise(
        rows, float(scale), int(zero_point), packed.codes, packed.each, packed.zero_point, bias,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return cast(Tensor, out).reshape(*codes.shape[:-1], weight.shape[0])


@linear_codes.register_fake
def _(codes: Tensor, scale: Any, zero_point: Any, top: int, weight: Tensor, weight_scale: Any, bias: Any) -> Tensor:
    return weight.new_empty((*codes.shape[:-1], weight.shape[0]))


@dataclass
class _Packed:
    """A weight as oneDNN wants it, and what it was made from."""

    storage: StorageWeakRef
    version: int
    scale: Tensor  # (N, 1) or ()
    each: Tensor  # (N,) float32, the same for every output channel
    zero_point: Tensor  # (N,) int64 zeros
    codes: Any  # None for a weight that is not made of whole steps of at most a byte
    largest: int
    multiplied: bool = False  # some product was of its codes


class _Cache:
    """Packed weights by the memory they were made from; forgotten with it, made again when it was written to."""

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], _Packed] = {}

    def get(self, weight: Tensor, scale: Tensor) -> _Packed:
        """The weight in bytes, packed at its first use."""
        if weight.is_inference():  # does not say when it is written to
            return _pack(weight, scale, -1)
        key = (weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride())
        found = self.entries.get(key)
        if found is None or found.version != weight._version or not torch.equal(found.scale, scale):
            self.entries = {k: e for k, e in self.entries.items() if not e.storage.expired()}
            found = self.entries[key] = _pack(weight, scale, weight._version)
        return found


def _pack(weight: Tensor, scale: Tensor, version: int) -> _Packed:
    steps = (weight / scale).round()
    largest = float(steps.abs().max())
    codes = None
    if largest <= LARGEST_BYTE and torch.equal(steps * scale, weight):
        codes = torch.ops.onednn.qlinear_prepack(steps.to(torch.int8).contiguous(), None)
    zero_point = torch.zeros(len(weight), dtype=torch.int64)
    each = scale.flatten().expand(len(weight)).clone()
    storage = StorageWeakRef(weight.untyped_storage())
    return _Packed(storage, version, scale.clone(), each, zero_point, codes, int(min(largest, LARGEST_PAIR)))


_PACKED = _Cache()


def multiplied() -> int:
    """How many weights of this process had a product of codes so far; others were multiplied as floats."""
    return sum(packed.multiplied for packed in _PACKED.entries.values())


def _available() -> bool:
    """oneDNN's quantized kernels, on x86 with AVX2 or more."""
    kernels = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qlinear_prepack")
    return (
        kernels and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


_AVAILABLE = _available()
