"""Calibration inputs: re-iterable, cut into fixed micro-batches so that no other batch size can change a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.core.errors import DataError, InputError

MICRO_BATCH = 32
LARGEST_EXAMPLE = 2**26  # values of one tensor in a description: an image of 4,700 x 4,700
LARGEST_NDIM = 16
SMALLEST_IMAGE = 16  # pixels of a side, from which on (3, H, W) tensors in a list count as images
PIXEL_MASK = "pixel_mask"  # as transformers calls what says where an image is padded
ForwardFn = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch.

    A tensor is the only argument, and so is a list of images (3, H, W), as detectors take it; a mapping gives keyword
    arguments (without labels); (images, labels) as data loaders give it is `images`; any other tuple or list gives
    positional arguments.
    """
    if isinstance(batch, Tensor) or is_image_list(batch):
        return model(batch)
    if isinstance(batch, dict):
        return model(**{k: v for k, v in batch.items() if k not in ("label", "labels")})
    if len(batch) == 2 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point() and batch[1].ndim == 1:
        return model(batch[0])
    return model(*batch)


class Batches:
    """Micro-batches that can be gone through again and again.

    Args:
        make: gives a fresh iterator over micro-batches, each a pytree of tensors.
        sizes: number of examples in each of them.
        forward: runs the model on one of them.
    """

    def __init__(
        self, make: Callable[[], Iterator[Any]], sizes: list[int], forward: ForwardFn = default_forward
    ) -> None:
        self._make = make
        self.sizes = sizes
        self.forward = forward

    def __iter__(self) -> Iterator[Any]:
        return self._make()

    @property
    def count(self) -> int:
        """Number of examples."""
        return sum(self.sizes)

    def on(self, device: torch.device) -> Batches:
        """The same micro-batches, each moved to a device when it is its turn."""
        return Batches(lambda: (moved(batch, device) for batch in self), self.sizes, self.forward)

    @classmethod
    def of(cls, data: Any, forward: ForwardFn = default_forward) -> Batches:
        """Wrap a tensor, a list of images, a pytree of tensors with one leading size, or an iterable of batches.

        Tensors are cut into micro-batches of 32, where all of them agree in the first dimension. An iterable's batches
        are taken as they come, but for images of several sizes, which are taken one by one and without padding (see
        `without_padding`). Those of a generator are kept, so that it can be gone through again; a data loader, or
        whatever else gives a fresh iterator every time, is read again and again, so that memory stays flat; one that
        shuffles gives up that the same seed means the same bits.

        Raises:
            DataError: no data, or NaN or Inf in it.
        """
        if isinstance(data, Batches):
            return data
        if is_image_list(data):
            data = [data]
        if isinstance(data, (Tensor, dict)) or (isinstance(data, tuple) and all(isinstance(t, Tensor) for t in data)):
            _check(data, "calibration data")
            if isinstance(data, dict) and PIXEL_MASK in data:
                return cls.of([data], forward)
            count = leading_size(data)
            return cls(lambda: split(data, MICRO_BATCH), sizes_of(count) if _agree(data) else [count], forward)
        if not isinstance(data, Iterable):
            raise DataError(f"calibration data of type {type(data).__name__}; give a tensor or batches of tensors")
        kept = list(data) if isinstance(data, Iterator) else data
        sizes = []
        for number, batch in enumerate(kept):
            _check(batch, f"calibration batch {number}")
            sizes += [leading_size(part) for part in without_padding(batch)]
        if not sizes:
            raise DataError("calibration data holds no batches; give at least one image")
        return cls(lambda: _same_sizes(chain.from_iterable(map(without_padding, kept)), sizes), sizes, forward)


def sizes_of(count: int, size: int = MICRO_BATCH) -> list[int]:
    """Sizes of the micro-batches that `count` examples are cut into."""
    return [min(size, count - start) for start in range(0, count, size)]


def is_image_list(batch: Any) -> bool:
    """Whether a batch is a list of images (3, H, W), whose sizes may differ."""
    return (
        isinstance(batch, list)
        and bool(batch)
        and all(isinstance(t, Tensor) and t.ndim == 3 and t.shape[0] == 3 for t in batch)
        and min(min(t.shape[1:]) for t in batch) >= SMALLEST_IMAGE
    )


def without_padding(batch: Any) -> Iterator[Any]:
    """A batch, or its images one by one where they differ in size.

    In one batch, smaller images are padded: by the model, or with a pixel mask beside them that says so. What a model
    makes of padding does not matter, and must not decide a scale. So such images go alone, cut to what the mask shows.
    """
    if is_image_list(batch) and len({t.shape for t in batch}) > 1:
        yield from split(batch, 1)
        return
    mask = batch.get(PIXEL_MASK) if isinstance(batch, dict) else None
    if not isinstance(mask, Tensor) or bool(mask.all()) or not _agree(batch):
        yield batch
        return
    frame = mask.shape[-2:]
    for one in split(batch, 1):
        shown = one[PIXEL_MASK][0].bool()
        height, width = int(shown.any(1).sum()), int(shown.any(0).sum())
        yield pytree.tree_map(
            lambda t, h=height, w=width: t[..., :h, :w] if isinstance(t, Tensor) and t.shape[-2:] == frame else t, one
        )


def leading_size(batch: Any) -> int:
    """Images of a list of them; else size of the first dimension of the first tensor of a pytree, 0 without tensors."""
    if is_image_list(batch):
        return len(batch)
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
    return tensors[0].shape[0] if tensors else 0


def split(batch: Any, size: int) -> Iterator[Any]:
    """Cut a list of images, or a pytree of tensors along their first dimension.

    One whose tensors do not agree in that stays whole.
    """
    if is_image_list(batch):
        yield from (batch[start : start + size] for start in range(0, len(batch), size))
        return
    if not _agree(batch):
        yield batch
        return
    for start in range(0, leading_size(batch), size):
        part = slice(start, start + size)
        yield pytree.tree_map(lambda t, part=part: t[part] if isinstance(t, Tensor) else t, batch)


def _agree(batch: Any) -> bool:
    """Whether the first dimension of every tensor is the batch: a mask or a number may be for all of its examples."""
    return all(t.ndim and t.shape[0] == leading_size(batch) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))


def first_of(batch: Any) -> Any:
    """The first example of a list of images or a pytree of tensors, as a batch of one."""
    if is_image_list(batch):
        return batch[:1]
    return pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.ndim else t, batch)


def device_of(model: nn.Module) -> torch.device | None:
    """The device that the model is on, None if it has no parameters or is spread over several."""
    devices = {p.device for p in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def moved(batch: Any, device: torch.device) -> Any:
    """A pytree with its tensors on a device; tensors that are there stay themselves."""
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)


def _same_sizes(batches: Iterable[Any], sizes: list[int]) -> Iterator[Any]:
    """The batches, which must come in the sizes of the first time."""
    number = 0
    for batch in batches:
        if leading_size(batch) != next(iter(sizes[number : number + 1]), None):
            break
        yield batch
        number += 1
    else:
        if number == len(sizes):
            return
    raise DataError(
        f"calibration batch {number} of {len(sizes)} is another one than in the first go over the data, or is missing; "
        f"give data that can be gone through several times, such as a list of batches"
    )


def _check(batch: Any, where: str) -> None:
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors or leading_size(batch) == 0:
        raise DataError(f"{where} holds no tensors; give at least one image")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where} contains NaN or Inf; look at the images or the preprocessing")


def describe_example(example: Any) -> Any:
    """JSON that says what an example looks like: shapes and types of its tensors, and plain values.

    Raises:
        InputError: it holds something else.
    """
    if isinstance(example, Tensor):
        return {"tensor": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
    if isinstance(example, dict):
        return {"dict": {str(k): describe_example(v) for k, v in example.items()}}
    if isinstance(example, (list, tuple)):
        return {type(example).__name__: [describe_example(v) for v in example]}
    if example is None or isinstance(example, (bool, int, float, str)):
        return {"value": example}
    raise InputError(f"an example may hold tensors and plain values, not {type(example).__name__}")


def example_from(description: Any) -> Any:
    """An example of that description: seeded random tensors, which serve to trace.

    Raises:
        InputError: not a description, or one of a tensor that no image model takes.
    """
    match description:
        case {"tensor": [*shape], "dtype": str()} if not _is_small(shape):
            raise InputError(f"an example of shape {str(shape)[:80]} is not one of an image model")
        case {"tensor": [*shape], "dtype": str(dtype)} if isinstance(getattr(torch, dtype, None), torch.dtype):
            kind = getattr(torch, dtype)
            if not kind.is_floating_point:
                return torch.zeros(shape, dtype=kind)
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind)
        case {"dict": dict(items)}:
            return {k: example_from(v) for k, v in items.items()}
        case {"list": [*items]}:
            return [example_from(v) for v in items]
        case {"tuple": [*items]}:
            return tuple(example_from(v) for v in items)
        case {"value": value}:
            return value
    raise InputError(f"not the description of an example: {description!r:.80}")


def _is_small(shape: list[Any]) -> bool:
    size = 1
    for n in shape:
        if not isinstance(n, int) or n < 0 or len(shape) > LARGEST_NDIM:
            return False
        size *= n
    return size <= LARGEST_EXAMPLE
