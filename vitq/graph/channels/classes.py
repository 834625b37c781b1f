"""Classes of labels that mean the same channel, and what happens to each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitq.graph.channels.labels import COMPUTED, ELEMENTS, ZERO, Range, Trail

Numbers = NDArray[np.int64]  # of classes; ZERO for exact zeros


class Left(Exception):  # noqa: N818  it says why something is left as it is
    """Why something is left as it is."""


class Classes:
    """Sorts the labels of a trail into classes.

    Attributes:
        trail: what was followed.
        of: (labels,) class of each label.
        members: (classes,) number of labels in each.
    """

    def __init__(self, trail: Trail) -> None:
        self.trail = trail
        self.of = _united(trail)
        self.members = np.bincount(self.of)
        self._lost = {int(self.of[0]): "comes from where it is not followed"}
        for labels, reason in trail.lost:
            for number in self.numbers(labels):
                self._lost.setdefault(int(number), reason)
        self._uses: dict[int, set[tuple[str, str]]] = {}
        for kind, events in (("enter", trail.entered), ("norm", trail.normed)):
            for name, several in events.items():
                self._note(several, kind, name)
        for name, pairs in trail.gated.items():
            self._note([pair[0] for pair in pairs], "gate", name)
        for kind, products in (("score", trail.scores), ("mix", trail.mixed)):
            for number, labels in enumerate(products):
                self._note([labels], kind, str(number))
        self._biases = Counter(trail.biases.values())

    def _note(self, several: Iterable[Tensor], kind: str, name: str) -> None:
        for labels in several:
            for number in np.unique(self.numbers(labels)):
                self._uses.setdefault(int(number), set()).add((kind, name))

    # -- classes ---------------------------------------------------------------------------------------

    def numbers(self, labels: Tensor) -> Numbers:
        """Classes of labels."""
        raw = labels.numpy()
        return np.where(raw == ZERO, ZERO, self.of[np.maximum(raw, 0)])

    def of_range(self, kind: str, name: str) -> Numbers:
        """Classes of all labels of a range."""
        found = self.trail.ranges[kind, name]
        return self.of[found.first : found.first + found.size]

    def uses(self, numbers: Numbers) -> list[tuple[str, str]]:
        """What happens to any of these classes: (kind, name or number of the event)."""
        return sorted(set().union(*(self._uses.get(int(number), set()) for number in numbers.flat)))

    def made_of(self, numbers: Numbers) -> list[Range]:
        """What the members of these classes stand for."""
        labels = np.flatnonzero(np.isin(self.of, numbers))
        return [r for r in self.trail.ranges.values() if np.diff(np.searchsorted(labels, [r.first, r.first + r.size]))]

    def require_followed(self, numbers: Numbers) -> None:
        """Refuse classes that went where they are not followed."""
        for number in numbers.flat:
            if int(number) in self._lost:
                raise Left(self._lost[int(number)])

    def one_run(self, several: list[Tensor]) -> tuple[Numbers, bool]:
        """The one run of classes that all tokens have, and whether there was padding among them."""
        rows = np.unique(np.concatenate([self.numbers(labels) for labels in several]), axis=0)
        padding = (rows == ZERO).all(1)
        if len(rows) - padding.sum() != 1:
            raise Left("has other channels for other tokens")
        return rows[~padding][0], bool(padding.any())

    # -- parameters ------------------------------------------------------------------------------------

    def require_unread(self, *names: str | None) -> None:
        """Refuse parameters that something reads as they are, which are weights, biases or a norm's here."""
        for name in names:
            if name is not None and (name in self.trail.read or (ELEMENTS, name) in self.trail.ranges):
                raise Left("a parameter is used in another way, too")

    def bias_of(self, weight: str) -> str | None:
        """The bias of a weight, which nothing else may use, like the weight itself."""
        bias = self.trail.biases[weight]
        if bias == COMPUTED:
            raise Left("a bias is computed at every call")
        if bias is not None and self._biases[bias] > 1:
            raise Left("a bias is used in another way, too")
        self.require_unread(weight, bias)
        return bias


def tiles(numbers: Numbers, one: Numbers) -> bool:
    """Whether these are the channels `one` of one or several tokens side by side."""
    return len(numbers) % len(one) == 0 and bool((numbers.reshape(-1, len(one)) == one).all())


def _united(trail: Trail) -> Numbers:
    """Labels that are added to one another share a class, and those that enter the same column of a weight."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = [*trail.same]
    for several in (*trail.entered.values(), *trail.normed.values()):
        rows = torch.cat(several)
        pairs = torch.stack([rows.flatten(), rows.amax(0).expand_as(rows).flatten()])
        links.append(pairs[:, (pairs > 0).all(0)])
    a, b = torch.cat(links, dim=1).numpy() if links else np.zeros((2, 0), dtype=np.int64)
    matrix = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(trail.count, trail.count))
    return connected_components(matrix, directed=False)[1].astype(np.int64)  # type: ignore[no-any-return]
