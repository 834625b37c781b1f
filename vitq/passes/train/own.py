"""A loss of the model's own, as the loop takes it: a detector's, which matches what it finds with what is there.

Source:  GPLQ, arXiv 2506.11784, section 4.3: detectors are trained by their own loss, without the features' distance
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vitq.core.errors import CompositionError
from vitq.core.training import Draw, OwnLoss, mixed


class Own:
    """The loss.

    Args:
        model: what is trained.
        loss: of the model's own.
        seed: of what it draws, such as the regions that are looked at: the same for an example in an epoch, always.
        autocast: what the model runs in.
    """

    def __init__(
        self, model: nn.Module, loss: OwnLoss, seed: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.loss, self.seed, self.autocast = model, loss, seed, autocast
        self.parts = loss.parts

    def __call__(self, inputs: Any, labels: Any, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Its parts, summed over these examples.

        Raises:
            CompositionError: other parts than it has said, or none that training could make small.
        """
        cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(cuda), self.autocast():
            torch.manual_seed(mixed(self.seed, *(number for draw in draws for number in draw)))
            found = self.loss(self.model, inputs, labels)
        return {name: part.float() for name, part in self._checked(found).items()}

    def _checked(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if set(found) != set(self.parts) or any(part.ndim for part in found.values()):
            told = ", ".join(f"{name} {tuple(part.shape)}" for name, part in found.items())
            raise CompositionError(
                f"training: the model's own loss gave {told or 'nothing'}; it must give one number for each of "
                f"{', '.join(self.parts)}"
            )
        return found
