"""Weights that make up for what quantizing their inputs loses.

Shapes:  W (out, in)   H, C (in, in) means of q^T q and of q^T (x - q), q the quantized inputs, x exact ones
Formula: argmin over D of |q (W + D)^T - x W^T|^2 + ridge mean(diag H) |D|^2, so D^T = (H + ridge mean(diag H))^-1 C W^T
Source:  Aqer of ERQ, Zhong et al., ICML 2024, arXiv 2407.06794, equation 8
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30  # of a mean square: inputs that are all zero


def absorbed(w: Tensor, h: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(out, in) weights that do on quantized inputs what w does on exact ones.

    Args:
        w: (out, in) float64.
        h: (in, in) moments of the quantized inputs q.
        cross: (in, in) moments of q and what they lack.
        ridge: in parts of the mean of the diagonal of h.
    """
    change: Tensor = torch.linalg.solve(h + ridge * strength(h), cross @ w.T)
    return w + change.T


def strength(h: Tensor) -> Tensor:
    """The identity times the mean of the diagonal."""
    return torch.eye(len(h)).to(h).mul_(h.diagonal().mean().clamp(min=SMALLEST))
