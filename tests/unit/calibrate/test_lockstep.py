"""Forwards that wait for one another: the same as each alone, stopped where they do not fit, and no thread left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitq.calibrate import capture, heap
from vitq.calibrate import lockstep as lockstep_module
from vitq.calibrate.blocks import Stop
from vitq.calibrate.lockstep import Lockstep, Room, most, possible
from vitq.core.batches import Batches
from vitq.data.zoo import build_zoo, seeded_images
from vitq.pipeline import quantize


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Endless(Room):
    """Room for so many steps."""

    def __init__(self, steps: int = 10**6) -> None:
        self.steps = steps

    def left(self) -> bool:
        self.steps -= 1
        return self.steps >= 0


def walk(lockstep: Lockstep, told: list[Any], name: str, places: str) -> None:
    for place in places:
        told.append((name, place))
        lockstep.pause(place)
    told.append((name, "end"))


def test_all_wait_at_a_place_before_any_goes_on() -> None:
    lockstep, told = Lockstep(Endless()), list[Any]()

    def choose(places: list[str]) -> str:
        told.append(sorted(places))
        return min(places)

    ways = {"x": "ab", "y": "b", "z": "ac"}  # y takes a way around a
    lockstep.run([lambda n=n, p=p: walk(lockstep, told, n, p) for n, p in ways.items()], choose)
    assert told == [
        ("x", "a"), ("y", "b"), ("z", "a"), ["a", "a", "b"],
        ("x", "b"), ("z", "c"), ["b", "b", "c"],
        ("x", "end"), ("y", "end"), ["c"], ("z", "end"),
    ]  # fmt: skip


@pytest.mark.parametrize(("room", "choice"), [(10**6, None), (3, "a")])
def test_nothing_goes_on_where_no_place_is_chosen_or_there_is_no_room(room: int, choice: str | None) -> None:
    lockstep, told = Lockstep(Endless(room)), list[Any]()
    lockstep.run([lambda n=n: walk(lockstep, told, n, "ab") for n in "xyz"], lambda places: choice)
    assert told[:3] == [(n, "a") for n in "xyz"]
    assert ("y", "b") not in told
    assert lockstep.full == (choice is not None)


def test_errors_come_out_and_the_mode_of_gradients_goes_in() -> None:
    modes = []

    def broken() -> None:
        modes.append((torch.is_grad_enabled(), torch.get_num_threads()))
        raise KeyError("site")

    lockstep = Lockstep(Endless())
    waiting = [lambda: lockstep.pause("a"), broken]
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(KeyError, match="site"):
            lockstep.run(waiting, min)
    assert modes == [(True, torch.get_num_threads()), (False, torch.get_num_threads())]


def test_a_forward_may_end_early() -> None:
    def stopping() -> None:
        raise Stop

    Lockstep(Endless()).run([stopping], min)


def test_other_threads_are_no_place_for_modes_of_this_one() -> None:
    assert possible()
    with torch.autocast("cpu"):
        assert not possible()
    with torch.device("cpu"):  # a mode that answers for every function
        assert not possible()
    with torch.inference_mode():
        assert not possible()


def test_as_many_forwards_as_threads_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lockstep_module, "GROUP", tmp_path)
    for cores, wanted in ((1, 64), (16, 64), (64, 16), (256, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        assert most() == wanted
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "pids.current").write_text("40\n")
    assert most() == 4
    (tmp_path / "pids.max").write_text("1064\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert most() == 32


class Odd:
    """An output that torch knows nothing of."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Remembers(nn.Module):
    """Keeps its input on itself on the way, as some models keep sizes: two forwards at a time confuse it."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(8, 8), nn.Linear(8, 8), odd

    def forward(self, x: Tensor) -> Any:
        self.kept = x
        x = self.first(x)
        x = self.second(x + self.kept)
        return Odd(x) if self.odd else x


def fitted(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    return quantize(model, "repq_vit", "w4a4", batches).state_dict()


@pytest.mark.parametrize("odd", [False, True])
def test_models_that_keep_things_on_themselves_are_run_one_by_one(odd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = Remembers(odd), [torch.randn(2, 5, 8) for _ in range(3)]
    found = fitted(model, batches)
    monkeypatch.setattr(capture, "possible", lambda: False)
    alone = fitted(model, batches)
    assert all(torch.equal(found[key], alone[key]) for key in alone)
    monkeypatch.undo()
    monkeypatch.setattr(capture._Stages, "_separate", lambda stages: True)  # trying is what keeps them apart
    confused = fitted(model, batches)
    assert any(not torch.equal(confused[key], alone[key]) for key in alone)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_what_does_not_fit_on_the_way_is_gone_on_with_block_by_block(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = build_zoo("seeded_swin"), list(seeded_images(5).split(2))
    whole = fitted(model, batches)
    monkeypatch.setattr(capture._Stages, "_separate", lambda stages: True)
    monkeypatch.setattr(capture, "Room", lambda device, most: Endless(steps))
    cut = fitted(model, batches)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_one_run_of_each_micro_batch_serves_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    batches = list(seeded_images(6).split(2))

    def forward(model: nn.Module, batch: Tensor) -> Any:
        counted.append(len(batch))
        return model(batch)

    model = build_zoo("seeded_vit")
    quantize(model, "repq_vit", "w4a4", Batches.of(batches, forward), forward_fn=forward)
    together = sum(counted)
    counted.clear()
    monkeypatch.setattr(capture, "possible", lambda: False)
    quantize(model, "repq_vit", "w4a4", Batches.of(batches, forward), forward_fn=forward)
    assert sum(counted) - together >= 2  # besides the blocks, which are not counted when they run alone
    assert together <= 2 * 6 + 2 * 2 + 2  # two fits at most, four images to compare, and the trace


def test_memory_is_told_where_the_machine_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc here")
    before = heap.held(None)
    big = torch.ones(2**24)
    after, free = heap.held(None), heap.available(None)
    assert before is not None
    assert after is not None
    assert free is not None
    assert after - before > 0.9 * big.nbytes
    assert 0 < free < 2**50
    room = Room(None, most=2**22)
    assert room.left()
    given_back: list[int] = []
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(1))
    assert room.left()
    assert not given_back  # it takes time, and what is free would have to be got again
    big = torch.cat([big, big])
    assert not room.left()
    assert given_back  # before that is said
    for name, text in (("memory.max", str(3 * 2**20)), ("memory.current", str(2**20))):
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(heap, "GROUP", tmp_path)
    assert heap.available(None) == 2 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert heap.available(None) == pytest.approx(free, rel=0.2)
    for name in ("STATUS", "MACHINE"):
        monkeypatch.setattr(heap, name, tmp_path / "missing")
    assert heap.held(None) is heap.available(None) is None
    assert not Room(None).left()
