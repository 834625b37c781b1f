"""Layout: which dimensions of a tensor keep a scale of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vitq.core.errors import DataError, InputError
from vitq.core.format import Format


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a tensor keep a scale of their own.

    Attributes:
        keep: negative dimensions with one scale per index; empty for one scale in all.
        sizes: their sizes, aligned with `keep`.
        ndim: dimensions of the scale, counted from the right.
        group: size of the groups that the last dimension is cut into, 0 for none. The groups become a kept
            dimension right before their members.
    """

    keep: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    ndim: int = 0
    group: int = 0

    @classmethod
    def for_site(cls, fmt: Format, axes: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
        """Layout of a format at a site.

        Raises:
            InputError: the site has no such axis, or the group size does not divide its channels.
        """
        if fmt.per == "tensor":
            return cls()
        ndim = len(axes)
        if fmt.per.startswith("group:"):
            return cls._grouped(int(fmt.per.removeprefix("group:")), axes, shape)
        dims = [i for i, axis in enumerate(axes) if axis == fmt.per]
        if not dims:
            raise InputError(f"format {fmt} needs an axis {fmt.per!r}; this site has {', '.join(axes)}")
        dim = dims[0] - ndim
        return cls((dim,), (shape[dim],), -dim)

    @classmethod
    def _grouped(cls, size: int, axes: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
        weight = "in" in axes
        name = "in" if weight else "channel"
        if name not in axes or axes.index(name) != len(axes) - 1:
            raise InputError(f"groups of {size} need {name!r} as the last axis; this site has {', '.join(axes)}")
        if shape[-1] % size:
            raise InputError(f"groups of {size} do not divide {shape[-1]} channels; choose a divisor")
        keep = (-3, -2) if weight else (-2,)
        sizes = (shape[0], shape[-1] // size) if weight else (shape[-1] // size,)
        return cls(keep, sizes, -keep[0], size)

    @property
    def groups(self) -> int:
        """How many scales there are."""
        return math.prod(self.sizes)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of a scale that broadcasts to a split tensor."""
        shape = [1] * self.ndim
        for dim, size in zip(self.keep, self.sizes, strict=True):
            shape[dim] = size
        return tuple(shape)

    def split(self, x: Tensor) -> Tensor:
        """View of x with the groups as a dimension (x itself without groups).

        Raises:
            DataError: the sizes of x are not those that the scales were made for.
        """
        if not self.keep:
            return x
        if self.group and x.ndim and x.shape[-1] % self.group == 0:
            x = x.unflatten(-1, (-1, self.group))
        # Broadcasting would share a scale among what has none, or fail with a message about tensors.
        found = tuple(x.shape[d] if x.ndim >= -d else 0 for d in self.keep)
        if found != self.sizes:
            raise DataError(
                f"scales for {self.sizes} at dimensions {self.keep} do not fit a tensor of shape {tuple(x.shape)}; "
                f"give inputs of the size that was calibrated on, or use one scale per tensor or per channel there"
            )
        return x

    def join(self, x: Tensor) -> Tensor:
        """Inverse of `split`."""
        return x.flatten(-2) if self.group else x

    def by_group(self, x: Tensor) -> Tensor:
        """x as (groups, values of the group), rows contiguous."""
        x = self.split(x)
        front = [d % x.ndim for d in self.keep]
        rest = [d for d in range(x.ndim) if d not in front]
        return x.permute(*front, *rest).reshape(self.groups, -1)
