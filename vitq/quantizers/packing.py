"""Codes <-> bytes: real 2-, 3-, 4-, 6- or 8-bit storage.

Layout: codes in row-major order, each as `bits` bits, least significant first, without gaps; the last byte is
filled with zeros. 3-bit codes take 3 bits: eight of them fill three bytes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vitq.core.errors import InputError


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers in [0, 2**bits) into bytes.

    Args:
        codes: any shape, any dtype that holds them.
        bits: 1 to 8.

    Returns:
        uint8 tensor of `packed_size(codes.numel(), bits)` elements.

    Raises:
        InputError: a code is out of range or not whole, or codes are wider than a byte.
    """
    _check_bits(bits)
    flat = codes.detach().cpu().reshape(-1)
    # Compared as Python numbers: against a uint8 tensor 2**8 would wrap to 0.
    low, high = (flat.min().item(), flat.max().item()) if flat.numel() else (0, 0)
    if not (low >= 0 and high < 2**bits) or bool((flat != flat.to(torch.int64)).any()):
        raise InputError(f"codes must be whole numbers in [0, {2**bits}); got {low} to {high}")
    array = flat.to(torch.uint8).numpy()
    if bits == 8:
        return torch.from_numpy(array.copy())
    planes = np.unpackbits(array[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Returns:
        uint8 tensor of `count` codes.

    Raises:
        InputError: the number of bytes does not match, or codes are wider than a byte.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise InputError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes; got {packed.numel()} ({packed.dtype})"
        )
    array = packed.cpu().numpy()
    if bits == 8:
        return torch.from_numpy(array.copy())
    planes = np.unpackbits(array, count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little")[:, 0])


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"codes of {bits} bits cannot be packed; packing takes 1 to 8 bits")
