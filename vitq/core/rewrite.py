"""Rewrites: registered changes of the model itself, stored in the artifact and replayed when it is loaded.

A rewrite is a name, JSON arguments and tensors. `prepare` makes the structural part (a bias that was not
there), `apply` changes values. Loading an artifact needs `prepare` alone, because the artifact holds the
changed values; loading it onto float weights needs both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitq.core.registry import Registry


class Rewrite(ABC):
    """One change of the model.

    Attributes:
        name: registered name.
        args: JSON data: which modules, which settings.
        tensors: what was computed from calibration data.
    """

    name: str

    def __init__(self, args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.args = dict(args)
        self.tensors = dict(tensors)

    def prepare(self, model: nn.Module) -> None:
        """Make the structural part of the change, so that the changed state fits the model."""
        return

    def extra_bits(self) -> int:
        """Bits that inference needs beyond the model's own parameters and codes."""
        return 0

    def extra_macs(self) -> int:
        """Multiply-accumulates that inference of one image needs beyond the model's own."""
        return 0

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the values, in place."""


REWRITES: Registry[type[Rewrite]] = Registry("rewrite", "vitq.passes")
