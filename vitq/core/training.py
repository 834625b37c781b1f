"""What a pass that trains is given: examples in an order that a seed decides, for how long, and where it is kept.

A draw (epoch, number) names an example as it is seen in an epoch: augmentation follows it, so that a run that was
interrupted goes on with the images that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.batches import Batches, leading_size, split
from vitq.core.digest import of_tensors
from vitq.core.errors import DataError, InputError
from vitq.core.recipe import Pass

Draw = tuple[int, int]
Measure = Callable[[nn.Module], Mapping[str, float]]
PRECISIONS = ("no", "bf16")
MICRO_BATCH = 16  # examples whose activations are kept for a backward at a time
EVERY = 60.0  # seconds between two states that are kept


class Examples(Protocol):
    """What is trained on.

    Attributes:
        labelled: whether examples come with labels.
        fixed: an example looks the same in every epoch.
    """

    labelled: bool
    fixed: bool

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Of what there is and how it is augmented: a run only goes on with the same."""

    def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Any, Any]]:
        """(inputs as the model takes them, labels), for each of these batches.

        Labels are classes (B,), None, or whatever the model's own loss takes.
        """


class OwnLoss(Protocol):
    """A loss of the model's own.

    Attributes:
        parts: the names of its parts.
    """

    parts: tuple[str, ...]

    def __call__(self, model: nn.Module, inputs: Any, labels: Any) -> Mapping[str, Tensor]:
        """Each part, summed over these examples, with gradients. The model is in evaluation mode, and must be after."""


class Given:
    """Calibration images as examples: no labels, no augmentation."""

    labelled, fixed = False, True

    def __init__(self, data: Batches) -> None:
        self._items = list(chain.from_iterable(split(batch, 1) for batch in data))
        if any(leading_size(item) != 1 for item in self._items):
            raise DataError(
                "training takes batches of which every tensor has the examples as its first dimension; give training="
            )
        shapes = {tuple(tuple(t.shape) for t in _tensors(item)) for item in self._items}
        if len(shapes) > 1:
            raise DataError(
                f"training takes images of one size, and these have {len(shapes)}; resize them, or take a recipe that "
                f"does not train"
            )

    def __len__(self) -> int:
        return len(self._items)

    def digest(self) -> str:
        """Of every value."""
        return of_tensors(("", t) for t in _tensors(self._items))

    def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Any, Tensor | None]]:
        """The images of each batch, one behind the other."""
        for draws in batches:
            items = [self._items[number] for _, number in draws]
            yield pytree.tree_map(_joined, *items), None


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _joined(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


@dataclass(frozen=True)
class Training:
    """How to train; what is trained and by which loss is the pass's.

    Attributes:
        epochs: how often each example is seen.
        batch_size: examples of one step of the optimizer, over all processes.
        micro_batch: so many of them go through the model at a time; gradients of the rest are added.
        precision: of the forward: "no" (float32) or "bf16". Quantizers always work in float32.
        recompute: keep only the inputs of blocks for the backward, and run them again.
        file: the state is kept in files beside this name, none without one.
        resume: go on from there.
        every: seconds between two states.
        measure: called with the model as it is quantized before the first step and after each of `looks` equal parts
            of them; what it returns is told in the artifact. In the first one of several processes.
        looks: how many parts.
        loss: of the model's own, in place of the distance to the float model and the cross-entropy of classes.
        latent: called in the end with the model without its quantizers, and told as well.

    Raises:
        InputError: numbers that cannot be.
        DataError: no examples, or a batch larger than all of them.
    """

    examples: Examples
    epochs: int = 1
    batch_size: int = 16
    micro_batch: int = MICRO_BATCH
    precision: str = "no"
    recompute: bool = False
    file: Path | None = None
    resume: bool = False
    every: float = EVERY
    measure: Measure | None = None
    looks: int = 4
    latent: Measure | None = None
    loss: OwnLoss | None = None

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.micro_batch, self.looks) < 1:
            raise InputError("training needs one epoch or more, batches of one example or more, and one look or more")
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if not len(self.examples):
            raise DataError("there is nothing to train on; give images")
        if self.batch_size > len(self.examples):
            raise DataError(
                f"a batch of {self.batch_size} is larger than the {len(self.examples)} examples; give more examples, "
                f"or a smaller batch"
            )

    @property
    def begun(self) -> bool:
        """Whether there is the state of a run that this one would begin anew."""
        return self.file is not None and self.file.exists() and not self.resume

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return self.epochs * -(-len(self.examples) // self.batch_size)

    def batches(self, seed: int, epoch: int) -> list[list[Draw]]:
        """The examples of every step of an epoch: each once, in an order that the seed decides."""
        draws = [(epoch, number) for number in order_of(len(self.examples), seed, epoch)]
        return [draws[at : at + self.batch_size] for at in range(0, len(draws), self.batch_size)]

    def stage(self, number: int) -> Training:
        """The same for one of several passes that train: each keeps its state in a file of its own."""
        return self if self.file is None else replace(self, file=self.file.with_name(f"{self.file.name}.{number}"))

    @classmethod
    def on(cls, data: Batches) -> Training:
        """One epoch on calibration images."""
        examples = Given(data)
        return cls(examples, batch_size=min(MICRO_BATCH, max(len(examples), 1)))


class TrainingPass(Pass):
    """A pass that trains.

    Attributes:
        training: set before it runs; the calibration images unless it is.
        teacher: the float model as it was given; the model with its quantizers off unless it is set.
    """

    training: Training | None = None
    teacher: nn.Module | None = None


def order_of(count: int, *seeds: int) -> list[int]:
    """A permutation that these whole numbers decide."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(*seeds))).tolist()


def mixed(*seeds: int) -> int:
    """One seed of several whole numbers."""
    return int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "little")
