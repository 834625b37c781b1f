"""A sample that is spread evenly over images and over what each image has, whatever the micro-batches."""

from __future__ import annotations

import math

GOLDEN = (math.sqrt(5) - 1) / 2


class Places:
    """Where in the data the model is, and which items (matrices, rows) of each image are looked at.

    Args:
        items: how many are looked at in all.
        images: how many images there are in all.
    """

    def __init__(self, items: int, images: int) -> None:
        self.share = items / images
        self.first = self.images = 0

    def at(self, images: int) -> bool:
        """The next micro-batch has so many images; whether any of them is looked at."""
        self.first, self.images = self.first + self.images, images
        return any(self._turns(image) for image in range(images))

    def chosen(self, items: int) -> list[int]:
        """Positions in the present micro-batch's items, which are those of one image after the other."""
        each = items // self.images
        found: list[int] = []
        for image in range(self.images):
            turns = self._turns(image)
            # Multiples of the golden ratio spread evenly, however many there will be.
            some = range(each) if len(turns) >= each else sorted({int(turn * GOLDEN % 1 * each) for turn in turns})
            found += [image * each + number for number in some]
        return found

    def _turns(self, image: int) -> range:
        number = self.first + image
        return range(math.ceil(number * self.share), math.ceil((number + 1) * self.share))
