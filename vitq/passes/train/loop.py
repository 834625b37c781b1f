"""The one training loop: steps of an optimizer over micro-batches and processes, kept, watched and shown.

Loss:  of a step the mean over its examples, whatever micro-batches and processes they are divided into
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitq.core.batches import moved
from vitq.core.errors import MissingExtraError
from vitq.core.progress import Progress
from vitq.core.training import Draw, Training
from vitq.passes.train.keep import Keeper, put_back, state_of

POINTS = 100  # of the curve
WINDOW = 10  # steps
DIVERGED = 3.0  # times the loss before training, in the mean of a window: that is worse than not training

Part = tuple[Sequence[Draw], Any, Any]  # of a batch: which examples, inputs, labels


class Loss(Protocol):
    """What is made small.

    Attributes:
        parts: the names of its parts.
    """

    parts: tuple[str, ...]

    def __call__(self, inputs: Any, labels: Any, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Each part, summed over these examples."""


@dataclass
class Group:
    """Parameters that share a rate.

    Attributes:
        rate: of AdamW, constant.
        sizes: by name, what each element's rate is multiplied by.
        least: by name, what each element is kept above.
    """

    rate: float
    params: dict[str, nn.Parameter]
    sizes: dict[str, Tensor] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Course:
    """How a run went; plain data.

    Attributes:
        step: how many are done.
        start: the mean loss of the first window's examples before any step.
        curve: [step, part of the loss -> mean since the point before].
        measured: [step, what was measured of the model then].
        losses: of the last window.
        good: the step whose parameters stay if the run diverges: the window behind it was not worse than the start.
        diverged: the step at which it did, None if it never did.
    """

    step: int = 0
    start: float = 0.0
    curve: list[Any] = field(default_factory=list)
    measured: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    since: dict[str, float] = field(default_factory=dict)
    good: int = 0
    diverged: int | None = None

    def add(self, parts: Mapping[str, float], every: int) -> None:
        """Note a step's loss, a finite one."""
        self.step += 1
        self.losses = [*self.losses, sum(parts.values())][-WINDOW:]
        for name, value in parts.items():
            self.since[name] = self.since.get(name, 0.0) + value
        if self.step % every == 0:
            last = self.curve[-1][0] if self.curve else 0
            self.curve.append([self.step, {name: v / (self.step - last) for name, v in self.since.items()}])
            self.since = {}

    @property
    def bad(self) -> bool:
        """Whether the last window is far above the start."""
        return len(self.losses) == WINDOW and sum(self.losses) / WINDOW > DIVERGED * self.start


class Loop:
    """Trains groups of parameters by a loss.

    Args:
        groups: what is trained.
        loss: what is made small.
        training: how long, and on what.
        seed: of the order of examples.
        device: where the model is.
        measure: the model, along the way; None for nothing.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        loss: Loss,
        training: Training,
        seed: int,
        device: torch.device,
        measure: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.groups, self.loss, self.training, self.seed, self.device = list(groups), loss, training, seed, device
        self.measure = measure
        self.params = {name: p for group in groups for name, p in group.params.items()}
        rates = [{"params": list(group.params.values()), "lr": group.rate} for group in groups]
        self.optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
        self.crew = crew(device)

    def run(self, keeper: Keeper, progress: Progress) -> Course:
        """Train, or go on with a run that was kept."""
        course, good, next_good = Course(), self._copy(), self._copy()
        total, written = self.training.steps, time.monotonic()
        looks = {round(total * part / self.training.looks) for part in range(self.training.looks + 1)}
        kept = keeper.read() if self.training.resume else None
        if kept is None:
            course.start = self._start()
            self._measure(course, looks)
        else:
            tensors, told = kept
            for prefix, copy in (("good|", good), ("next|", next_good)):
                copy |= {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            put_back(
                {n: t for n, t in tensors.items() if not n.startswith(("good|", "next|"))}, self.params, self.optimizer
            )
            course = Course(**told)
        every = max(1, total // POINTS)
        with progress.task("training", total) as task:
            task.advance(course.step)
            for draws, parts in self._steps(course.step) if course.diverged is None else ():
                means = self._step(draws, parts)
                if means is not None:
                    course.add(means, every)
                if means is None or course.bad:
                    self._restore(good)
                    course.diverged = course.step + (means is None)
                elif course.step % WINDOW == 0:
                    good, next_good, course.good = next_good, self._copy(), course.step - WINDOW
                if course.diverged is None:
                    self._measure(course, looks)
                done = course.step == total or course.diverged is not None
                if self.crew.is_main_process and (done or time.monotonic() - written > self.training.every):
                    state = state_of(self.params, self.optimizer)
                    state |= {f"good|{name}": t for name, t in good.items()}
                    keeper.write(state | {f"next|{name}": t for name, t in next_good.items()}, vars(course))
                    written = time.monotonic()
                task.advance()
                if done:
                    break
        self.optimizer.zero_grad(set_to_none=True)
        return course

    def _steps(self, done: int) -> Iterator[tuple[list[Draw], list[Part]]]:
        """(draws of a step, its micro-batches of this process) for every step that is left."""
        rank, many, size = self.crew.process_index, self.crew.num_processes, self.training.micro_batch
        for epoch in range(self.training.epochs):
            batches = self.training.batches(self.seed, epoch)
            skipped, done = min(done, len(batches)), max(0, done - len(batches))
            batches = batches[skipped:]
            mine = [draws[rank::many] for draws in batches]
            parts = [[draws[at : at + size] for at in range(0, len(draws), size)] for draws in mine]
            stream = self.training.examples.stream([part for each in parts for part in each])
            for draws, each in zip(batches, parts, strict=True):
                yield draws, [self._part(part, *next(stream)) for part in each]

    def _part(self, draws: Sequence[Draw], inputs: Any, labels: Any) -> Part:
        return draws, moved(inputs, self.device), moved(labels, self.device)

    @torch.no_grad()
    def _start(self) -> float:
        """The mean loss over the first window's examples, before any step."""
        total, count = 0.0, 0
        for draws, parts in islice(self._steps(0), WINDOW):
            told = self._told()
            for some, inputs, labels in parts:
                for name, value in self.loss(inputs, labels, some).items():
                    told[name] += value
            total += sum(self._over_processes(told, []).values())
            count += len(draws)
        return total / count

    def _measure(self, course: Course, looks: set[int]) -> None:
        if self.measure is not None and course.step in looks and self.crew.is_main_process:
            with torch.no_grad():
                course.measured.append([course.step, dict(self.measure())])

    def _told(self) -> dict[str, Tensor]:
        return {name: torch.zeros((), device=self.device) for name in self.loss.parts}

    def _step(self, draws: Sequence[Draw], parts: Sequence[Part]) -> dict[str, float] | None:
        """One step of the optimizer; the mean loss by part, None if it or a gradient is no number: no step then."""
        self.optimizer.zero_grad(set_to_none=True)
        told = self._told()
        for some, inputs, labels in parts:
            with torch.enable_grad():
                found = self.loss(inputs, labels, some)
                (sum(found.values(), torch.zeros((), device=self.device)) / len(draws)).backward()
            for name, value in found.items():
                told[name] += value.detach() / len(draws)
        if self.crew.num_processes > 1:
            for parameter in self.params.values():
                if parameter.grad is None:  # in the others it may have one
                    parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        means = self._over_processes(told, grads)
        finite = torch.stack([torch.isfinite(grad).all() for grad in grads]).all() if grads else True
        if not all(math.isfinite(value) for value in means.values()) or not bool(finite):
            return None
        self._update()
        return means

    @torch.no_grad()
    def _update(self) -> None:
        before = {name: group.params[name].clone() for group in self.groups for name in group.sizes}
        self.optimizer.step()
        for group in self.groups:
            for name, size in group.sizes.items():
                parameter = group.params[name]
                parameter.copy_(before[name] + (parameter - before[name]) * size)
            for name, least in group.least.items():
                group.params[name].clamp_(min=least)

    def _over_processes(self, told: Mapping[str, Tensor], grads: Sequence[Tensor]) -> dict[str, float]:
        """Add gradients and losses of all processes."""
        if self.crew.num_processes > 1:
            from accelerate.utils import reduce

            flat = torch.cat([g.flatten() for g in grads] + [v.reshape(1) for v in told.values()])
            flat = reduce(flat, "sum")
            for grad, part in zip(grads, flat.split([g.numel() for g in grads] + [1] * len(told)), strict=False):
                grad.copy_(part.view_as(grad))
            told = dict(zip(told, flat[len(flat) - len(told) :], strict=True))
        return {name: float(value) for name, value in told.items()}

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def _restore(self, good: Mapping[str, Tensor]) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(good[name])


def crew(device: torch.device) -> Any:
    """Accelerate's view of this process among those that `accelerate launch` has started.

    Raises:
        MissingExtraError: Accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "training") from error
    return PartialState(cpu=device.type == "cpu")
