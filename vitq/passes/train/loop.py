"""The one training loop: steps of an optimizer over micro-batches and processes, kept, watched and shown.

Loss:  of a step the mean over its examples, whatever micro-batches and processes they are divided into
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitq.core.errors import MissingExtraError
from vitq.core.progress import Progress
from vitq.core.training import Draw, Training
from vitq.passes.train.keep import Keeper, put_back, state_of

POINTS = 100  # of the curve
WINDOW = 10  # steps
DIVERGED = 2.0  # times the first step's loss, in the mean of the last window: that is worse than not training

Part = tuple[Sequence[Draw], Any, Tensor | None]  # of a batch: which examples, inputs, labels


class Loss(Protocol):
    """What is made small.

    Attributes:
        parts: the names of its parts.
    """

    parts: tuple[str, ...]

    def __call__(self, inputs: Any, labels: Tensor | None, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Each part, summed over these examples."""


@dataclass
class Group:
    """Parameters that share a rate.

    Attributes:
        rate: of AdamW, constant.
        least: by name, what a parameter is kept above (steps of a quantizer), element by element.
    """

    rate: float
    params: dict[str, nn.Parameter]
    least: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Course:
    """How a run went; plain data.

    Attributes:
        step: how many are done.
        curve: [step, part of the loss -> mean since the point before].
        diverged: the step at which the loss was no number or too large, None if it never was. The parameters are then
            those of the step `good`.
    """

    step: int = 0
    curve: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    since: dict[str, float] = field(default_factory=dict)
    good: int = 0
    diverged: int | None = None

    def add(self, parts: Mapping[str, float], every: int) -> None:
        """Note a step's loss."""
        self.step += 1
        self.losses.append(sum(parts.values()))
        for name, value in parts.items():
            self.since[name] = self.since.get(name, 0.0) + value
        if self.step % every == 0:
            last = self.curve[-1][0] if self.curve else 0
            self.curve.append([self.step, {name: v / (self.step - last) for name, v in self.since.items()}])
            self.since = {}

    @property
    def bad(self) -> bool:
        """Whether the last loss is no number, or the last window's mean far above the first."""
        if not math.isfinite(self.losses[-1]):
            return True
        last = self.losses[-WINDOW:]
        return len(last) == WINDOW and sum(last) / WINDOW > DIVERGED * self.losses[0]


class Loop:
    """Trains groups of parameters by a loss.

    Args:
        groups: what is trained.
        loss: what is made small.
        training: how long, and on what.
        seed: of the order of examples.
    """

    def __init__(
        self, groups: Sequence[Group], loss: Loss, training: Training, seed: int, device: torch.device
    ) -> None:
        self.groups, self.loss, self.training, self.device = list(groups), loss, training, device
        self.batches = training.batches(seed)
        self.params = {name: p for group in groups for name, p in group.params.items()}
        rates = [{"params": list(group.params.values()), "lr": group.rate} for group in groups]
        self.optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
        self.crew = crew(training.precision, device)

    def run(self, keeper: Keeper, progress: Progress) -> Course:
        """Train, or go on with a run that was kept."""
        course, good = Course(), {name: p.detach().clone() for name, p in self.params.items()}
        kept = keeper.read() if self.training.resume else None
        if kept is not None:
            tensors, told = kept
            good |= {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("good|")}
            put_back(tensors, self.params, self.optimizer)
            course = Course(**told)
        total, written = len(self.batches), time.monotonic()
        every = max(1, total // POINTS)
        with progress.task("training", total) as task:
            task.advance(course.step)
            for draws, parts in self._steps(course.step):
                if course.diverged is not None:
                    break
                course.add(self._step(draws, parts), every)
                if course.bad:
                    self._restore(good)
                    course.diverged = course.step
                elif course.step % WINDOW == 0:
                    good, course.good = {name: p.detach().clone() for name, p in self.params.items()}, course.step
                done = course.step == total or course.diverged is not None
                if self.crew.is_main_process and (done or time.monotonic() - written > self.training.every):
                    state = state_of(self.params, self.optimizer) | {f"good|{name}": t for name, t in good.items()}
                    keeper.write(state, vars(course))
                    written = time.monotonic()
                task.advance()
        return course

    def _steps(self, done: int) -> Iterator[tuple[list[Draw], list[Part]]]:
        """(draws of a step, its micro-batches of this process) for every step that is left."""
        rank, many = self.crew.process_index, self.crew.num_processes
        mine = [draws[rank::many] for draws in self.batches[done:]]
        size = self.training.micro_batch
        parts = [[draws[at : at + size] for at in range(0, len(draws), size)] for draws in mine]
        stream = self.training.examples.stream([part for each in parts for part in each])
        for draws, each in zip(self.batches[done:], parts, strict=True):
            yield draws, [(part, *next(stream)) for part in each]

    def _step(self, draws: Sequence[Draw], parts: Sequence[Part]) -> dict[str, float]:
        """One step of the optimizer; the mean loss by part."""
        self.optimizer.zero_grad(set_to_none=True)
        told = {name: torch.zeros((), device=self.device) for name in self.loss.parts}
        for some, inputs, labels in parts:
            with torch.enable_grad(), self.crew.autocast():
                found = self.loss(inputs, labels, some)
                (sum(found.values(), torch.zeros((), device=self.device)) / len(draws)).backward()
            for name, value in found.items():
                told[name] = told[name] + value.detach() / len(draws)
        means = self._over_processes(told)
        if all(math.isfinite(value) for value in means.values()):
            self.optimizer.step()
            for group in self.groups:
                for name, least in group.least.items():
                    group.params[name].data.clamp_(min=least)
        return means

    def _over_processes(self, told: dict[str, Tensor]) -> dict[str, float]:
        """Add gradients and losses of all processes."""
        if self.crew.num_processes > 1:
            for parameter in self.params.values():
                if parameter.grad is None:  # in the others it may have one
                    parameter.grad = torch.zeros_like(parameter)
            grads = [p.grad for p in self.params.values() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads] + [v.reshape(1) for v in told.values()])
            flat = self.crew.reduce(flat, "sum")
            for grad, part in zip(grads, flat.split([g.numel() for g in grads] + [1] * len(told)), strict=False):
                grad.copy_(part.view_as(grad))
            told = dict(zip(told, flat[len(flat) - len(told) :], strict=True))
        return {name: float(value) for name, value in told.items()}

    @torch.no_grad()
    def _restore(self, good: Mapping[str, Tensor]) -> None:
        for name, parameter in self.params.items():
            parameter.data.copy_(good[name])


def crew(precision: str, device: torch.device) -> Any:
    """Accelerate's view of this process among those that `accelerate launch` has started.

    Raises:
        MissingExtraError: Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "training") from error
    AcceleratorState._reset_state()  # a run before this one may have had another precision
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
