"""A digest of tensors: what a measured number, or a run that goes on, depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def of_tensors(named: Iterable[tuple[str, Tensor]], begin: str = "") -> str:
    """sha256, as hex, of names, types, shapes and values.

    Args:
        begin: text that comes before them.
    """
    digest = hashlib.sha256(begin.encode())
    for name, value in named:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
