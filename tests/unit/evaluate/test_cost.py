"""The measures of cost: float forwards, and multiply-accumulates that do not depend on the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitq
from vitq.core.batches import Batches, sizes_of
from vitq.data.zoo import build_zoo, seeded_images
from vitq.evaluate import cost
from vitq.graph.trace import trace


@pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
def test_a_float_forward_counts_what_the_trace_counts(name: str) -> None:
    model, images = build_zoo(name), seeded_images(8)
    with torch.no_grad():
        counted = cost.count_macs(lambda: model(images))
    assert counted == 8 * trace(model, images[:1]).macs > 0


def test_counting_agrees_with_torch_also_backwards() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(4)

    def work() -> None:
        model(images).square().sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    assert cost.count_macs(work) == theirs.get_total_flops() // 2 > 0


@pytest.mark.parametrize(("recipe", "at_least"), [("minmax", 1.0), ("repq_vit+gptq", 2.0)])
def test_what_runs_inside_quantize_is_counted_and_is_the_same_twice(recipe: str, at_least: float) -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(16)
    with torch.no_grad():
        forward = cost.count_macs(lambda: model(images))
    counts = [cost.count_macs(lambda: vitq.quantize(model, recipe, "w4a4", images)) for _ in range(2)]
    assert counts[0] == counts[1] >= at_least * forward


class Sleeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002 * len(x) / 32)
        return x


def test_the_seconds_are_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    few = cost.float_forward_seconds(Sleeps(), Batches.of(torch.zeros(32, 1)))
    asked: list[int] = []

    def stream() -> Iterator[Tensor]:
        for size in sizes_of(320):
            asked.append(size)
            yield torch.zeros(size, 1)

    monkeypatch.setattr(cost, "TIMED", 64)
    many = cost.float_forward_seconds(Sleeps(), Batches(stream, sizes_of(320)))
    assert few >= 0.002
    assert 0.02 <= many < 20 * few, "scaled to ten times as many images"
    assert len(asked) == 2, "what is not timed is not decoded"
