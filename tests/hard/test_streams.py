"""Many calibration images, read as a stream: nothing is kept that need not be."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import vitq
from vitq.calibrate import capture, observe
from vitq.calibrate.observe import Sketch
from vitq.calibrate.search import Search
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.uniform import UniformQuantizer


class Stream:
    """Batches made when they are asked for; counts how many of them are alive."""

    def __init__(self, batches: int, size: int = 32) -> None:
        self.batches, self.size = batches, size
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = self.gone_through = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.gone_through += 1
        for number in range(self.batches):
            batch = seeded_images(self.size, seed=number)
            self.alive.add(batch)
            self.most = max(self.most, len(self.alive))
            yield batch
            del batch


@pytest.mark.parametrize("recipe", ["minmax", "percentile", "repq_vit"])
def test_a_stream_is_not_kept_and_gives_the_same_bits_as_a_list(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "most", lambda: 4)  # that wait for one another inside of the model: fewer than come
    stream = Stream(8, size=2)
    streamed = vitq.quantize(build_zoo("seeded_vit"), recipe, "w4a4", stream)
    assert stream.gone_through > 1
    assert stream.most <= 3, "the batch at work, the one before and the one just made"
    monkeypatch.undo()
    kept = vitq.quantize(build_zoo("seeded_vit"), recipe, "w4a4", list(Stream(8, size=2)))
    state = kept.state_dict()
    assert all(torch.equal(state[name], value) for name, value in streamed.state_dict().items())


def test_generators_and_data_loaders_are_taken() -> None:
    images = seeded_images(10)
    expected = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", list(images.split(4))).state_dict()
    for data in (DataLoader(images, batch_size=4), iter(images.split(4)), (b for b in images.split(4))):  # type: ignore[arg-type]
        found = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", data).state_dict()
        assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.mark.parametrize("later", [[4, 4], [4, 4, 4, 4], [4, 3, 4], []])
def test_data_that_changes_between_two_goes_is_refused(later: list[int]) -> None:
    class Changing:
        sizes = [4, 4, 4]  # noqa: RUF012

        def __iter__(self) -> Iterator[Tensor]:
            sizes, self.sizes = self.sizes, later
            return (torch.zeros(n, 3) for n in sizes)

    data = Batches.of(Changing())
    with pytest.raises(DataError, match=r"calibration batch \d of 3 .* gone through several times"):
        list(data)


@pytest.mark.parametrize("percentile", [0.999, 0.9999, 0.99999, 1.0])
@pytest.mark.parametrize("batches", [1, 25])
def test_percentiles_are_exact_though_each_keeps_only_its_own_tail(percentile: float, batches: int) -> None:
    quantizer = UniformQuantizer(8)
    search = Search("percentile", percentile)
    x = torch.randn(1, 600_000).pow(3)
    sketch = search.sketch(quantizer, None if batches == 1 else batches)
    for part in x.chunk(batches, 1):
        sketch.observe(part)
    stats = sketch.statistics()
    kept = stats.top.numel() + stats.bottom.numel()
    assert kept <= 4 * (1 - percentile) * x.numel() + 10
    assert torch.equal(stats.quantile(percentile), torch.quantile(x[0], percentile)[None])


@pytest.mark.parametrize("needs", ["range", "tails", "sample"])
def test_what_waits_to_be_merged_is_bounded(needs: str) -> None:
    """Found by measuring: whole micro-batches waited, nine at a time, because 0.1 % of 10,000 images is most of one."""
    batches, values = 150, 10_000
    sketch = Sketch(images=batches, needs=needs)
    most = 0
    for _ in range(batches):
        sketch.observe(torch.randn(1, values))
        most = max(most, sum(t.numel() for t in (*sketch._tops, *sketch._bottoms)))
    tail = 2 * observe.TAIL * batches * values + 2
    assert most <= 2 * (2 * max(tail, observe.PENDING) + values)
    assert sum(t.numel() for t in sketch._bodies) <= 1.2 * observe.SAMPLE
