"""What a record keeps of the forward that it was made from."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from vitq.graph.record import record


class Watched(nn.Module):
    """Counts how many of its layers' outputs are still there when the forward ends."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.left = -1

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(weakref.ref(x))
        self.left = sum(each() is not None for each in seen)
        return x


def test_a_record_holds_no_tensor_that_the_forward_lets_go_of() -> None:
    model = Watched(6)
    x = torch.randn(2, 4)
    found = record(model, lambda m: m(x), x)
    assert model.left == 1, "of what the layers made only the output is needed"
    # Numbers of tensors that are gone are not given again: the chain of calls is whole.
    assert [node.name for node in found.nodes] == ["linear"] * 6
    assert len(found.shapes) == 1 + 12 + 6
    for before, after in zip(found.nodes, found.nodes[1:], strict=False):
        assert before.outputs[0] in after.inputs
