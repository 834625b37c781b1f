"""Several forwards that wait for one another at places inside the model: one run of each, however many places.

Each forward has a thread, of which one runs at a time. What a forward holds where it waits stays in memory, for all of
them at once; `Room` says when that is too much. Threads, and not coroutines: torch keeps its modes by thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vitq.calibrate.blocks import Stop
from vitq.calibrate.heap import GROUP, available, held

MOST, THREADS = 64, 1024  # forwards at a time, and threads of all of them with their pools
SHARE = 4  # one part in so many of the memory that was there may be held by waiting forwards


class Room:
    """Whether waiting forwards still fit: measured from when this is made.

    Args:
        device: that the model is on.
        most: bytes that they may hold at most, besides a share of the memory that is there.
    """

    def __init__(self, device: torch.device | None, most: int | None = None) -> None:
        self.device = device
        self.start, free = held(device), available(device)
        self.most = None if free is None else min(free // SHARE, free if most is None else most)

    def left(self) -> bool:
        """Not too much is taken; never so where the machine does not tell."""
        for roughly in (True, False):
            now = held(self.device, roughly)
            if now is None or self.start is None or self.most is None:
                return False
            if now - self.start <= self.most:
                return True
        return False


class Lockstep:
    """Forwards that may pause.

    Args:
        room: checked after every step of a forward.

    Attributes:
        full: they did not fit, and were stopped.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.full = False
        self._forwards: list[_Forward] = []

    def pause(self, place: Any) -> None:
        """Called inside a forward: wait at a place until `choose` gives it.

        Raises:
            Stop: nothing further of this forward is needed.
        """
        current = threading.current_thread()
        assert isinstance(current, _Forward)
        current.wait(place)

    def run(self, runs: Iterable[Callable[[], Any]], choose: Callable[[list[Any]], Any]) -> None:
        """Run each to its end, or until it does not fit any more.

        Args:
            runs: forwards, `most()` of them at most, begun in this order.
            choose: (places where some wait) -> the place whose forwards go on, in the order in which they came there;
                None to stop all of them.
        """
        try:
            for run in runs:
                if self.full:
                    return
                forward = _Forward(run)
                self._forwards.append(forward)
                forward.start()
                self._step(forward)
            while waiting := [f for f in self._forwards if f.is_alive()]:
                place = choose([f.place for f in waiting])
                if place is None:
                    return
                for forward in waiting:
                    if forward.place == place:
                        self._step(forward)
                        if self.full:
                            return
        finally:
            for forward in self._forwards:
                forward.stop()
            self._forwards = []

    def _step(self, forward: _Forward) -> None:
        forward.go_on()
        self.full = self.full or not self.room.left()


class _Forward(threading.Thread):
    """A forward that runs while its owner waits, and waits while its owner runs."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work: Callable[[], Any] | None = run
        self.place: Any = None
        self.error: BaseException | None = None
        self.stopped = False
        self.grad, self.threads = torch.is_grad_enabled(), torch.get_num_threads()
        self.cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        try:
            torch.set_num_threads(self.threads)  # or libraries below torch would take their default here
            if self.cuda is not None:
                torch.cuda.set_device(self.cuda)
            with torch.set_grad_enabled(self.grad):
                if not self.stopped and self.work is not None:
                    self.work()
        except Stop:
            pass
        except BaseException as error:
            self.error = error
        self.work = None
        self._back.release()

    def wait(self, place: Any) -> None:
        self.place = place
        self._back.release()
        self._go.acquire()
        if self.stopped:
            raise Stop

    def go_on(self) -> None:
        """Let it run until it waits or ends; raises what it raised."""
        self._go.release()
        self._back.acquire()
        if self.work is None:
            self.join()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def stop(self) -> None:
        """End it where it waits."""
        if self.is_alive():
            self.stopped = True
            self._go.release()
            self.join()


def possible() -> bool:
    """Whether another thread would compute the same: not under modes that belong to this one."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    cuda = torch.cuda.is_initialized() and torch.cuda.current_stream() != torch.cuda.default_stream()
    return not (autocast or modes or cuda or torch.is_inference_mode_enabled())


def most() -> int:
    """Forwards at a time: each thread brings its own pool of workers, and a container may allow few of them."""
    return min(MOST, min(THREADS, _spare_threads()) // torch.get_num_threads())


def _spare_threads() -> int:
    """Half of those that the container still allows."""
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("pids.max", "pids.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return THREADS
    return (limit - used) // 2
