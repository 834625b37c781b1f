"""Batches with tensors that are for all of their examples: passes that cut batches leave such ones whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.batches import Batches, split
from vitq.core.qmodel import QuantModel

EXAMPLES = 12


class Masked(nn.Module):
    """Takes a mask and a number that are for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.head = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor, gain: Tensor) -> Tensor:
        made: Tensor = self.head(self.act(self.up(x * gain)) * mask[..., None])
        return made.mean(1)


def batch(examples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, 6, generator=generator)
    return {"x": x, "mask": torch.tensor([[1.0, 1, 1, 1, 0]]), "gain": torch.tensor(2.0)}


def called(model: nn.Module, given: Any) -> Any:
    return model(**given)


@pytest.mark.parametrize("recipe", ["minmax", "percentile", "liu2021", "ptq4vit", "apq_vit", "adalog", "vitq_calib"])
def test_a_mask_and_a_number_for_all_examples(recipe: str) -> None:
    torch.manual_seed(0)
    model = Masked()
    made: list[QuantModel] = []
    for data in (batch(EXAMPLES), [batch(EXAMPLES)]):
        found = vitq.quantize(model, recipe, "w4a4", data, forward_fn=called)
        assert isinstance(found, QuantModel)
        made.append(found)
    with torch.no_grad():
        outputs = [called(each, batch(3)) for each in (model, *made)]
    assert torch.equal(*outputs[1:])
    distance = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 0 < float(distance) < 0.5


def test_what_agrees_is_cut_and_the_rest_stays_whole() -> None:
    def shapes(parts: Iterator[Any]) -> list[tuple[int, ...]]:
        return [tuple(part["x"].shape) for part in parts]

    per_image = batch(EXAMPLES) | {"mask": torch.ones(EXAMPLES, 5), "gain": torch.ones(EXAMPLES, 1, 1)}
    assert shapes(split(per_image, 8)) == [(8, 5, 6), (4, 5, 6)]
    assert shapes(split(batch(EXAMPLES), 8)) == [(EXAMPLES, 5, 6)]
    assert Batches.of(batch(40)).sizes == [40]
    assert Batches.of({"x": torch.ones(40, 2)}).sizes == [32, 8]
