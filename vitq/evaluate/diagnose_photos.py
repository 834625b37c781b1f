"""Where the loss of a detector or segmenter comes from: one group of sites quantized at a time, no labels needed.

Units:  kept in percent, SQNR in dB
Kept:   of a detector, the share of the float model's detections that are found again (evaluate/output_fidelity.py); of
        a segmenter, the share of pixels that keep their class
Rank:   what keeps least comes first; of those that keep alike, what has the lowest SQNR at any output
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitq.core.progress import Progress, Silent
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site
from vitq.evaluate.detections import Detections
from vitq.evaluate.diagnose import groups_of
from vitq.evaluate.finders import Photos
from vitq.evaluate.metrics import rounded
from vitq.evaluate.output_fidelity import OutputFidelity, found_again, watched

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PhotoSuspect:
    """One group of sites, quantized alone.

    Attributes:
        name: site id, role or block.
        sites: how many it holds.
        kept: percent; None where the float model found nothing.
        sqnr: by output and level of the pyramid.
    """

    name: str
    sites: int
    kept: float | None
    sqnr: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        told = {"name": self.name, "sites": self.sites, "kept": rounded(self.kept)}
        return told | {"sqnr": {name: rounded(value) for name, value in self.sqnr.items()}}

    def row(self) -> dict[str, Any]:
        """For a table: an output per column."""
        told = self.to_json()
        return {**{key: value for key, value in told.items() if key != "sqnr"}, **told["sqnr"]}


@dataclass
class _Group:
    sites: list[Site]
    close: OutputFidelity = field(default_factory=OutputFidelity)
    answers: list[Any] = field(default_factory=list)


def diagnose_photos(
    qmodel: QuantModel,
    reader: Photos[Any],
    photos: Sequence[Image],
    by: str = "site",
    progress: Progress | None = None,
) -> list[PhotoSuspect]:
    """Quantize each group alone and rank the groups, worst first. Ends with all of them, as "(all)".

    Args:
        qmodel: fitted, with its float weights: `quantize(..., freeze=False)` or `load(..., float_model=)`.
        reader: a Finder or a Segmenter of this model.
        photos: RGB. The cost is one forward of them per group.
        by: "site", "role" or "block".

    Raises:
        InputError: unknown grouping, or outputs that the reader cannot read.
        VitqError: the float weights are gone.
    """
    groups = {name: _Group(sites) for name, sites in groups_of(qmodel, by).items()}
    expected: list[Any] = []
    qmodel.set_state("off")
    try:
        with (progress or Silent()).task(f"quantizing one {by} at a time", len(groups) * len(photos)) as task:
            for photo in photos:
                plain = watched(reader, photo)
                expected.append(reader.read(plain.out, photo.size))
                for group in groups.values():
                    qmodel.set_state("on", group.sites)
                    found = watched(reader, photo)
                    group.close.compare(plain, found)
                    group.answers.append(_small(reader.read(found.out, photo.size), expected[-1]))
                    qmodel.set_state("off", group.sites)
                    task.advance()
    finally:
        qmodel.set_state("on")
    told = [PhotoSuspect(name, len(g.sites), _kept(expected, g.answers), g.close.sqnr()) for name, g in groups.items()]
    return [*sorted(told[:-1], key=_rank), told[-1]]


def _small(answer: Any, expected: Any) -> Any:
    """Detections as they are; of classes of pixels, only how many stayed and of how many."""
    if isinstance(answer, Tensor):
        return int(answer.eq(expected).sum()), answer.numel()
    return answer


def _kept(expected: list[Any], answers: list[Any]) -> float | None:
    if expected and isinstance(expected[0], Detections):
        share: float | None = found_again(expected, answers)["found_again"]
        return share
    same, total = (sum(part) for part in zip(*answers, strict=True))
    return 100 * same / total if total else None


def _rank(suspect: PhotoSuspect) -> tuple[float, float]:
    lowest = min(suspect.sqnr.values(), default=math.inf)
    return (math.inf if suspect.kept is None else suspect.kept, -math.inf if math.isnan(lowest) else lowest)
