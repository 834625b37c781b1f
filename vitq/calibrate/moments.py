"""Second moments of rows, gathered over any number of micro-batches in constant memory.

Shapes:  x (..., d), its leading dimensions are rows    matrix, covariance (d, d) and mean (d,) float64
An objective over the outputs of a linear needs no more: sum |x E^T|^2 = tr(E (sum x^T x) E^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2**12  # products of so many rows are made in float32, their sum in float64


class Moments:
    """Sums of x and of x^T x.

    Args:
        size: d.
        device: where to keep the sums.
        second: keep the products, too, not the mean alone.
    """

    def __init__(self, size: int, device: torch.device, *, second: bool = True) -> None:
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device) if second else None

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows; `weights` (rows,) has mean one over all that will be taken in."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += len(rows)
        if weights is None:
            self.total += rows.sum(0, dtype=torch.float64)
        else:
            self.total += sum(w @ part for w, part in zip(weights.split(ROWS), rows.split(ROWS), strict=True)).double()
            rows = rows * weights.sqrt()[:, None]
        if self.products is not None:
            for part in rows.split(ROWS):
                self.products += part.T @ part

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both."""
        both = Moments(self.total.numel(), self.total.device, second=self.products is not None)
        both.count, both.total = self.count + other.count, self.total + other.total
        if self.products is not None and other.products is not None:
            both.products = self.products + other.products
        return both

    @property
    def mean(self) -> Tensor:
        """(d,) mean row."""
        return self.total / max(self.count, 1)

    @property
    def matrix(self) -> Tensor:
        """(d, d) mean of x^T x."""
        assert self.products is not None
        return self.products / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """(d, d) mean of (x - mean)^T (x - mean)."""
        return self.matrix - self.mean.outer(self.mean)


class ErrorMoments:
    """Of rows q that stand for exact rows x: what a regression of x - q on q needs.

    Attributes:
        used: of q.
        error: of x - q, the mean alone.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.used, self.error = Moments(size, device), Moments(size, device, second=False)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, exact: Tensor, used: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows (n, d), aligned; `weights` as in `Moments`."""
        self.used.add(used, weights)
        error = (exact - used).detach().float()
        self.error.add(error, weights)
        if weights is not None:
            error *= weights[:, None]
        for q, e in zip(used.detach().float().split(ROWS), error.split(ROWS), strict=True):
            self.products += q.T @ e

    @property
    def matrix(self) -> Tensor:
        """(d, d) mean of q^T (x - q)."""
        return self.products / max(self.used.count, 1)

    @property
    def covariance(self) -> Tensor:
        """(d, d) mean of (q - mean)^T (x - q - mean)."""
        return self.matrix - self.used.mean.outer(self.error.mean)
