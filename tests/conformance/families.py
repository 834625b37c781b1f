"""What a model family is to the conformance suite, and all families that vitq promises.

Small random configurations. Used by test_trace.py, test_families.py and tools/models_table.py; the folder of this
file must be on sys.path, because pytest imports test modules by file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.batches import ForwardFn, default_forward

SEED = 0
BATCH = 2


@dataclass(frozen=True)
class Family:
    """A model family and what its trace must say.

    Attributes:
        name: row of the table.
        make: builds the model with random weights.
        block: roles of the sites of one block; a tuple where blocks differ, in order; None where not pinned.
        blocks: number of blocks.
        outside: roles of the sites outside of blocks; None where not pinned.
        pairs: role of the linears -> how many norms feed such; None where not pinned.
        inputs: number of examples -> what the model is given; images of `size` unless given.
        forward_fn: how the model is called.
        decomposed: attention runs taken apart even with quantizers off.
        size: height and width of the images.
        fit_norms: give batch norms the statistics of the batch; with made-up ones its signals die out on the way.
    """

    name: str
    make: Callable[[], nn.Module]
    block: Counter[str] | tuple[Counter[str], ...] | None = None
    blocks: int = 2
    outside: Counter[str] | None = None
    pairs: dict[str, int] | None = None
    inputs: Callable[[int], Any] | None = None
    forward_fn: ForwardFn = default_forward
    decomposed: bool = False
    size: int = 32
    fit_norms: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The model in eval mode, seeded, with weights large enough for attention to do something."""
        torch.manual_seed(SEED)
        model = self.make().eval().requires_grad_(False)
        for p in model.parameters():
            if p.is_floating_point() and (p.ndim < 2 or (p.numel() and float(p.std()) < 0.05)):
                p.add_(torch.randn_like(p) * 0.1)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms and self.fit_norms:
            for norm in norms:
                norm.train().momentum = 1.0
            self.run(model, self.batch())
        return model.eval()

    def batch(self, examples: int = BATCH) -> Any:
        """Seeded inputs."""
        torch.manual_seed(SEED + 1)
        return torch.randn(examples, 3, self.size, self.size) if self.inputs is None else self.inputs(examples)

    def run(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """The tensors that the model gives for a batch."""
        with torch.no_grad():
            out = self.forward_fn(model, batch)
        tree = out.to_tuple() if hasattr(out, "to_tuple") else out
        return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
