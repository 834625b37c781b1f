"""Change the basis of the channels of attention heads: in the rows that make them, and in what takes them.

Shapes:  a part is (H, D) rows or columns of a weight: D channels of each of H heads
Formula: rows w, bias b -> M^T w, M^T b and columns c -> c N with M N^T = 1: a matrix with its inverse transposed, which
         for an orthogonal one is itself
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from vitq.core.rewrite import REWRITES, Rewrite
from vitq.graph.channels import Part
from vitq.passes.reparam.orthogonal import random_flat
from vitq.passes.reparam.tensors import store

Sides = Iterable[tuple[Part, int]]  # parts, with the dimension of the weight that their channels are


def part_arguments(sides: Sides) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Parts as arguments and tensors of a rewrite."""
    sides = list(sides)
    names = [{"weight": part.weight, "bias": part.bias, "dim": dim} for part, dim in sides]
    return names, {str(n): torch.tensor(part.index, dtype=torch.int32) for n, (part, _) in enumerate(sides)}


def part_names(rewrite: Rewrite) -> list[str]:
    """The parameters that a rewrite of parts changes."""
    parts = rewrite.args["parts"]
    return [part[key] for part in parts for key in ("weight", "bias") if part[key] is not None]


class _HeadsRewrite(Rewrite):
    """args: parts (weight, bias or None, dim); tensors: (H, D) numbers of rows (dim 0) or columns (dim 1) as "0", …"""

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Change weights and biases in place; arithmetic in float64, rounded once."""
        for number, part in enumerate(self.args["parts"]):
            index = self.tensors[str(number)].long()
            for name, dim in ((part["weight"], part["dim"]), (part["bias"], 0)):
                if name is not None:
                    parameter = model.get_parameter(name)
                    whole = parameter.double().movedim(dim, 0).clone()
                    old = whole[index].reshape(*index.shape, -1)
                    whole[index] = self.changed(old, number).reshape(whole[index].shape)
                    store(parameter, whole.movedim(0, dim))

    def changed(self, channels: Tensor, part: int) -> Tensor:
        """(H, D, n) float64 channels of a part in the new basis."""
        raise NotImplementedError


@REWRITES.register("rotate_heads")
@final
class RotateHeads(_HeadsRewrite):
    """Every head gets an orthogonal matrix of its own, the same in all parts. args: seed, too."""

    name = "rotate_heads"

    def changed(self, channels: Tensor, part: int) -> Tensor:
        """R^T w"""
        heads, size, _ = channels.shape
        matrices = random_flat(size, self.args["seed"], heads).to(channels.device)
        return matrices.transpose(1, 2) @ channels


@REWRITES.register("scale_heads")
@final
class ScaleHeads(_HeadsRewrite):
    """Every channel gets a factor: parts are divided by it, and those in args `multiplied` multiplied with it.

    tensors: ratio (H, D), too.
    """

    name = "scale_heads"

    def changed(self, channels: Tensor, part: int) -> Tensor:
        """w / r, or w r"""
        ratio = self.tensors["ratio"].double()[..., None]
        return channels * ratio if part in self.args["multiplied"] else channels / ratio
